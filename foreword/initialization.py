"""Where a prefix starts: demonstrations, text, random numbers, or an exact no-op.

Everything here is found by running the model itself with its attention calls intercepted; nothing depends on how a
family computes its keys or rotates them. S text tokens, T tokens of a further row, N its batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import attention_sites, input_device, layers_without_sites, sample_inputs, stacks, text_room, text_stack
from .attention import AttentionCall, intercept
from .config import PrefixConfig
from .data import Example
from .errors import ConfigError, PositionError
from .fingerprint import fingerprint
from .kernels import Prefixes, concatenate, extend_mask
from .prefix import AttentionSite, Prefix, SiteTensors

__all__ = [
    "compact_prefix",
    "demonstrate",
    "embedding_prefix",
    "initialize",
    "noop_prefix",
    "random_prefix",
    "text_prefix",
]

_NOOP_GATE = 1e-30  # adds nothing that a float format can see, yet its gradient is exact
_RANDOM_TOKENS = 64
_RIDGE = 0.1
_FURTHER_ROWS = 32  # rows whose attention decides what is kept of the demonstrations


def demonstrate(examples: Sequence[Example], count: int) -> list[int]:
    """The first `count` rows, prompt and completion, one after the other as token ids: a few-shot prompt."""
    return [token for example in examples[:count] for token in example.input_ids]


def initialize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: PrefixConfig,
    seed: int = 0,
) -> Prefix:
    """The prefix that training starts from, as `config` says.

    Args:
        examples: training rows; the first `config.num_demonstrations` become demonstrations.
        seed: for the starts that draw random numbers.

    Raises:
        ConfigError: no rows are left besides the demonstrations, the text is empty, or the model has fewer layers.
    """
    start = _initialize(model, tokenizer, examples, config, seed)
    return start if config.num_layers is None else _first_layers(start, config.num_layers)


def _initialize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: PrefixConfig,
    seed: int,
) -> Prefix:
    if config.initialization == "random":
        return random_prefix(model, _lengths(model, config), seed)
    if config.initialization == "noop":
        return noop_prefix(model, _lengths(model, config), seed)
    if config.initialization == "text":
        ids = tokenizer(config.init_text)["input_ids"]
    else:
        ids = demonstrate(examples, config.num_demonstrations)
    if any(site.kind == "encoder" for site in attention_sites(model)):  # what it reads depends on all of the text
        return text_prefix(model, _at_least(ids, config.num_virtual_tokens)[: config.num_virtual_tokens])
    further = examples[config.num_demonstrations :][:_FURTHER_ROWS] or examples
    prefix = compact_prefix(model, ids, [(e.input_ids, e.prompt_length) for e in further], config.num_virtual_tokens)
    if config.initialization != "text":
        prefix.metadata["demonstrations"] = list(ids)
    return prefix


def _first_layers(prefix: Prefix, count: int) -> Prefix:
    """The prefix at the first `count` sites of each kind; the layers above see none."""
    own = {kind: [i for i, site in enumerate(prefix.sites) if site.kind == kind] for kind in prefix.lengths}
    if count > (most := max(map(len, own.values()))):
        raise ConfigError(
            f"num_layers is {count}, but the model has {most} layers with attention. Ask for at most {most}."
        )
    kept = sorted(i for numbers in own.values() for i in numbers[:count])
    tensors = prefix.tensors()
    return Prefix(
        [prefix.sites[i] for i in kept],
        [tensors[i] for i in kept],
        position_offset=prefix.position_offset,
        base=prefix.base,
        metadata=prefix.metadata,
    )


def text_prefix(model: PreTrainedModel, input_ids: Sequence[int]) -> Prefix:
    """The prefix that equals having these tokens in context: their own keys and values.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))
        >>> text_prefix(model, [1, 2, 3, 4]).num_virtual_tokens
        4
    """
    seen = _observe(model, _batch_of_one(model, input_ids))
    tensors = [SiteTensors(s.key[0].transpose(0, 1), s.value[0].transpose(0, 1)) for s in seen]
    return _prefix(model, tensors, attention_sink=True)


def embedding_prefix(model: PreTrainedModel, embeddings: Float[Tensor, "P C"]) -> Prefix:
    """The prefix that equals having these embeddings, for example a trained soft prompt, in front of every text."""
    own = embeddings.to(input_device(model), model.dtype)
    seen = _record(model, model, {"inputs_embeds": own[None], "use_cache": False})
    tensors = [SiteTensors(s.key[0].transpose(0, 1), s.value[0].transpose(0, 1)) for s in seen]
    return _prefix(model, tensors)


def random_prefix(model: PreTrainedModel, num_virtual_tokens: int | Mapping[str, int], seed: int = 0) -> Prefix:
    """Keys and values drawn from normal distributions with the mean and spread of the model's own, per head and dim.

    Args:
        model: the base model.
        num_virtual_tokens: P, or P by kind of site (`self`, `encoder`, `cross`); sites of a kind left out get none.
        seed: for the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = attention_sites(model)
    lengths = (
        num_virtual_tokens if isinstance(num_virtual_tokens, Mapping) else {s.kind: num_virtual_tokens for s in sites}
    )

    def draw(own: Float[Tensor, "G S D"], length: int) -> Float[Tensor, "P G D"]:
        own = own.float().cpu()
        noise = torch.randn(length, own.shape[0], own.shape[2], generator=generator)
        return own.mean(1) + noise * own.std(1)

    inputs = sample_inputs(model, min(_RANDOM_TOKENS, text_room(model) or _RANDOM_TOKENS), generator)
    seen = [
        (site, s, lengths[site.kind])
        for site, s in zip(sites, _record(model, model, inputs), strict=True)
        if lengths.get(site.kind)
    ]
    tensors = [SiteTensors(draw(s.key[0], length), draw(s.value[0], length)) for _, s, length in seen]
    return _prefix(model, tensors, [site for site, _, _ in seen])


def noop_prefix(model: PreTrainedModel, num_virtual_tokens: int | Mapping[str, int], seed: int = 0) -> Prefix:
    """A random prefix behind closed gates, which shifts no positions: with it the model is exactly the base.

    Zero keys would not do: a zero key still gets weight exp(0). A gate g multiplies exp(query @ key).
    """
    start = random_prefix(model, num_virtual_tokens, seed)
    tensors = [
        SiteTensors(key.data, value.data, torch.full(key.shape[:2], _NOOP_GATE)) for key, value, _ in start.tensors()
    ]
    return Prefix(start.sites, tensors, position_offset=0, base=start.base)


def compact_prefix(
    model: PreTrainedModel,
    input_ids: Sequence[int],
    further: Sequence[tuple[Sequence[int], int]],
    num_virtual_tokens: int,
    refit: bool = True,
) -> Prefix:
    """A text's keys and values compacted into fewer virtual tokens.

    Kept are the first token, which serves as attention sink, and per key/value head the tokens that the completions of
    `further` rows attend to most when they follow the text. Keys are moved to positions 0 to P-1. With `refit` the
    values are then fitted by least squares, so that attention over the kept tokens gives the outputs that attention
    over the whole text gave (Attention Matching).

    Args:
        input_ids: the text, for example rendered demonstrations.
        further: other rendered rows, each with the length of its prompt.
        num_virtual_tokens: P. With P tokens in the text all are kept: the prefix equals the text in context.

    Raises:
        ConfigError: the text has fewer than P tokens.
    """
    if len(_at_least(input_ids, num_virtual_tokens)) == num_virtual_tokens:
        return text_prefix(model, input_ids)
    text_ids = _batch_of_one(model, input_ids)
    text = _observe(model, text_ids)
    rows = pad_sequence([torch.tensor(list(row)) for row, _ in further], batch_first=True).to(input_device(model))
    column = torch.arange(rows.shape[1])
    asks = torch.stack([(column >= prompt - 1) & (column < len(row) - 1) for row, prompt in further]).to(
        input_device(model)
    )

    # Read the further rows after the whole text: what do their completions attend to, what do they get?
    reading = _observe(model, rows, len(input_ids), lambda i, call: _run_after(text[i], call))
    chosen = [
        _most_attended(
            _weights(after, before.key, before.value)[..., : len(input_ids)], asks, before, num_virtual_tokens
        )
        for before, after in zip(text, reading, strict=True)
    ]
    keys = _move(model, text_ids, text, chosen)
    values = [
        seen.value[0].gather(1, at[..., None].expand(-1, -1, seen.value.shape[-1]))
        for seen, at in zip(text, chosen, strict=True)
    ]
    if refit:
        # The same rows once more, now at the positions that follow the compact prefix.
        moved = _observe(model, rows, num_virtual_tokens, lambda i, call: reading[i].output)
        values = [_refit(*entry, asks) for entry in zip(moved, keys, values, (r.output for r in reading), strict=True)]
    tensors = [SiteTensors(k.transpose(0, 1), v.transpose(0, 1)) for k, v in zip(keys, values, strict=True)]
    return _prefix(model, tensors, attention_sink=True)


def _at_least(input_ids: Sequence[int], num_virtual_tokens: int) -> Sequence[int]:
    if len(input_ids) < num_virtual_tokens:
        raise ConfigError(
            f"{num_virtual_tokens} virtual tokens cannot start from a text of {len(input_ids)} tokens. "
            f"Ask for at most {len(input_ids)} virtual tokens, or start from more demonstrations or a longer text."
        )
    return input_ids


# ------------------------------------------------------------------------------------------------------- observation


class _Seen(NamedTuple):
    """One attention call of one site."""

    query: Float[Tensor, "N H T D"]
    key: Float[Tensor, "N G T D"]
    value: Float[Tensor, "N G T E"]
    output: Float[Tensor, "N T H E"]
    mask: Tensor | None
    is_causal: bool
    scale: float


def _observe(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "N T"],
    position: int | Tensor = 0,
    respond: Callable[[int, AttentionCall], Tensor] | None = None,
) -> list[_Seen]:
    """Run the model below its head, first token at `position`; at each site answer with what `respond` returns."""
    stack, options = text_stack(model), {}
    if stack.takes_positions:
        positions = position if isinstance(position, Tensor) else torch.arange(input_ids.shape[1]) + position
        limit = stack.position_limit
        if limit is not None and int(positions.max()) >= limit:
            raise PositionError(
                f"The text that the prefix should start from needs position {int(positions.max())}, but "
                f"{type(model).__name__} has learned positions up to {limit - 1}. Use fewer or shorter demonstrations."
            )
        options["position_ids"] = (positions + stack.first_position).to(input_ids.device).expand_as(input_ids)
    inputs = {"input_ids": input_ids, "use_cache": False} | options
    return _record(model, model.get_submodule(stack.name), inputs, respond)


@torch.no_grad()
def _record(
    model: PreTrainedModel,
    module: nn.Module,
    inputs: dict[str, Any],
    respond: Callable[[int, AttentionCall], Tensor] | None = None,
) -> list[_Seen]:
    """Call `module`, the model or a part of it; what each of the model's sites saw."""
    sites = attention_sites(model)
    number = {model.get_submodule(site.name): i for i, site in enumerate(sites)}
    seen: dict[int, _Seen] = {}

    def handle(call: AttentionCall) -> tuple[Tensor, None]:
        i = number[call.module]
        output = call.run()[0] if respond is None else respond(i, call)
        scale = call.options.get("scaling") or call.query.shape[-1] ** -0.5
        seen[i] = _Seen(call.query, call.key, call.value, output, call.mask, call.is_causal, scale)
        return output, None

    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with intercept(model, handle, [site.name for site in sites]):
            module(**inputs)
    finally:
        for part, mode in training.items():
            part.training = mode
    return [seen[i] for i in range(len(sites))]


def _batch_of_one(model: PreTrainedModel, input_ids: Sequence[int]) -> Int[Tensor, "1 S"]:
    if not len(input_ids):
        raise ConfigError("The text that the prefix should start from has no tokens.")
    return torch.tensor([list(input_ids)], device=input_device(model))


def _lengths(model: PreTrainedModel, config: PrefixConfig) -> dict[str, int]:
    """P by kind, for the kinds that the model has."""
    kinds = {site.kind for site in attention_sites(model)}
    asked = {
        "self": config.num_virtual_tokens,
        "encoder": config.num_encoder_virtual_tokens,
        "cross": config.num_cross_virtual_tokens,
    }
    if absent := [
        kind for kind, length in asked.items() if kind != "self" and length is not None and kind not in kinds
    ]:
        raise ConfigError(
            f"num_{absent[0]}_virtual_tokens was given, but {type(model).__name__} has no {absent[0]} attention. "
            "Leave it out; num_virtual_tokens is the length at every site."
        )
    return {kind: config.num_virtual_tokens if (length := asked[kind]) is None else length for kind in sorted(kinds)}


def _prefix(
    model: PreTrainedModel, tensors: list[SiteTensors], sites: Sequence[AttentionSite] | None = None, **metadata: Any
) -> Prefix:
    dtype = torch.promote_types(torch.float32, model.dtype)
    copies = [SiteTensors(*(t.to("cpu", dtype).contiguous() for t in entry[:2])) for entry in tensors]
    sites = attention_sites(model) if sites is None else sites
    # The virtual tokens that hold positions are those of causal attention.
    placed = {site.name for stack in stacks(model) if stack.takes_positions for site in stack.sites}
    offset = max(
        (len(t.key) for s, t in zip(sites, copies, strict=True) if s.kind == "self" and s.name in placed), default=0
    )
    base = {"name": model.config._name_or_path or type(model).__name__, "fingerprint": fingerprint(model)}
    if bare := layers_without_sites(model):
        base["layers_without_sites"] = bare
    return Prefix(sites, copies, position_offset=offset, base=base, metadata=metadata)


# -------------------------------------------------------------------------------------------------------- compaction


def _run_after(text: _Seen, call: AttentionCall) -> Float[Tensor, "N T H E"]:
    """What the call returns when the text precedes its tokens."""
    before = Prefixes(text.key.transpose(1, 2), text.value.transpose(1, 2))
    key, value, _ = concatenate(call.key, call.value, before)
    mask = extend_mask(call.mask, None, call.query, call.key.shape[2], before.key.shape[1], call.is_causal)
    return call.run(key=key, value=value, mask=mask)[0]


def _weights(seen: _Seen, key: Float[Tensor, "1 G P D"], value: Float[Tensor, "1 G P E"]) -> Float[Tensor, "N H T M"]:
    """Attention weights over [given keys; own keys] in float32."""
    before = Prefixes(key.transpose(1, 2), value.transpose(1, 2))
    keys, _, _ = concatenate(seen.key, seen.value, before)
    mask = extend_mask(seen.mask, None, seen.query, seen.key.shape[2], key.shape[2], seen.is_causal)
    groups = seen.query.shape[1] // keys.shape[1]
    scores = seen.query.float() @ keys.float().repeat_interleave(groups, 1).mT * seen.scale
    return (scores if mask is None else scores + mask.float()).softmax(-1)


def _most_attended(
    weights: Float[Tensor, "N H T S"], asks: Tensor, text: _Seen, num_virtual_tokens: int
) -> Int[Tensor, "G P"]:
    """Per key/value head the first token and those with the most attention, in the order of the text."""
    total = (weights * asks[:, None, :, None]).sum((0, 2))
    per_head = total.reshape(text.key.shape[1], -1, total.shape[-1]).sum(1)
    per_head[:, 0] = torch.inf
    return per_head.topk(num_virtual_tokens, -1).indices.sort(-1).values


def _move(
    model: PreTrainedModel, text_ids: Tensor, text: list[_Seen], chosen: list[Tensor]
) -> list[Float[Tensor, "G P D"]]:
    """The chosen keys as if they stood at positions 0 to P-1.

    The text is replayed with all its tokens at position j, for each j, while attention returns what it returned
    before: then only the position inside the keys changes. If the values change as well, positions enter the hidden
    states themselves (learned embeddings), keys cannot be moved, and stay as they are.
    """
    length = chosen[0].shape[1]
    targets = torch.arange(length, device=text_ids.device)[:, None]
    ids = text_ids.expand(length, -1)
    replayed = _observe(model, ids, targets, lambda i, call: text[i].output.expand(length, -1, -1, -1))
    drift = max(
        float((r.value - t.value).norm() / t.value.norm()) / length**0.5 for r, t in zip(replayed, text, strict=True)
    )
    keys = []
    for before, after, at in zip(text, replayed, chosen, strict=True):
        heads = torch.arange(len(at), device=at.device)[:, None]
        keys.append(after.key[targets.T, heads, at] if drift < 0.05 else before.key[0][heads, at])
    return keys


def _refit(
    seen: _Seen,
    key: Float[Tensor, "G P D"],
    value: Float[Tensor, "G P E"],
    wanted: Float[Tensor, "N T H E"],
    asks: Tensor,
) -> Float[Tensor, "G P E"]:
    """Values for which attention over [key; own keys] gives the wanted outputs, by ridge regression towards `value`."""
    weights = _weights(seen, key[None], value[None])
    groups = seen.query.shape[1] // len(key)
    own = weights[..., key.shape[1] :] @ seen.value.float().repeat_interleave(groups, 1)
    residual = (
        wanted.float().transpose(1, 2) - own - weights[..., : key.shape[1]] @ value.float().repeat_interleave(groups, 0)
    )
    rows = asks[:, None].expand(-1, groups, -1)
    fitted = []
    for head in range(len(key)):
        span = slice(head * groups, (head + 1) * groups)
        a, b = weights[:, span, :, : key.shape[1]][rows].double(), residual[:, span][rows].double()
        gram = a.mT @ a
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        change = torch.linalg.solve(gram + ridge, a.mT @ b)
        change[0] = 0  # the sink stays
        fitted.append(value[head].float() + change.float())
    return torch.stack(fitted)
