"""Attach prefixes to a model. The only file that knows Transformers' attention registry.

A model looks its attention function up in a registry by the name in its config, `sdpa` for instance. We register a
function `foreword_sdpa` that wraps the one in use, and its mask function under the same name, then change the name in
the model's config. Attention modules that carry a handler are handled; all others pass through.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import ConfigError, ModelMismatchError, PositionError, UnsupportedModelError
from .fingerprint import check_fingerprint
from .kernels import PrefixPart, concatenate, extend_mask, has_token_kernel, merged_attention
from .prefix import AttentionSite, SiteTensors

__all__ = [
    "Attachment",
    "AttentionCall",
    "PrefixSource",
    "attach",
    "attention_sites",
    "entry_module",
    "intercept",
    "position_limit",
    "takes_positions",
]

_NAME, _HANDLER = "foreword_", "_foreword_handler"
_SUPPORTED = ("sdpa", "eager")


@runtime_checkable
class PrefixSource(Protocol):
    """What can be attached: a `Prefix`, or anything in training that yields one's tensors."""

    sites: tuple[AttentionSite, ...]
    position_offset: int
    base: dict[str, Any]

    def tensors(self) -> list[SiteTensors]: ...


@dataclass
class AttentionCall:
    """One call of an attention function. `run` calls the implementation that the model would use without us."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    implementation: str
    module: nn.Module
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, G, S, D]
    value: Tensor  # [B, G, S, E]
    mask: Tensor | None
    options: dict[str, Any]

    def run(self, **changes: Any) -> tuple[Tensor, Tensor | None]:
        """The output `[B, T, H, E]` and the attention weights, where the implementation returns them."""
        used = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask} | changes
        return self.function(self.module, used["query"], used["key"], used["value"], used["mask"], **self.options)

    @property
    def is_causal(self) -> bool:
        """Whether the implementation would apply a causal mask of its own."""
        if self.implementation == "eager" or self.mask is not None:
            return False
        causal = self.options.get("is_causal")
        return self.query.shape[2] > 1 and (getattr(self.module, "is_causal", True) if causal is None else causal)


Handler = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

# --------------------------------------------------------------------------------------------------- interception


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(module).__name__} runs with attn_implementation='eager', and its module {type(module).__module__} has "
        "no eager_attention_forward to wrap. Load the model with attn_implementation='sdpa'."
    )


def _register(implementation: str) -> str:
    name = _NAME + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(module, query, key, value, attention_mask, **options):
            function = _eager(module) if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
            handler: Handler | None = module.__dict__.get(_HANDLER)
            if handler is None:
                return function(module, query, key, value, attention_mask, **options)
            return handler(AttentionCall(function, implementation, module, query, key, value, attention_mask, options))

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        # Without a mask function under the same name the model would get no mask at all, and drop padding silently.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _install(model: PreTrainedModel, handlers: dict[nn.Module, Handler]) -> Callable[[], None]:
    """Route the attention of `handlers`' modules through them; returns what undoes it."""
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    for implementation in {name for name in before.values() if name is not None}:
        if implementation.startswith(_NAME):
            raise ConfigError(
                f"{type(model).__name__} has a prefix attached already. Detach it first, or change what it sees with "
                "Attachment.use(...): one prefix, or a list with one prefix or None for each row."
            )
        if implementation not in _SUPPORTED:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs with attn_implementation={implementation!r}; a prefix can be attached to "
                f"{' and '.join(_SUPPORTED)}. Load the model with attn_implementation='sdpa'."
            )
    for key, config in configs.items():
        if before[key] is not None:
            config._attn_implementation_internal = _register(before[key])
    for module, handler in handlers.items():
        setattr(module, _HANDLER, handler)

    def undo() -> None:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in handlers:
            delattr(module, _HANDLER)

    return undo


@contextmanager
def intercept(model: PreTrainedModel, handler: Handler, names: Sequence[str] | None = None) -> Iterator[None]:
    """Inside, every attention call of the named modules (default: all) goes to `handler`."""
    modules = list(model.modules()) if names is None else [model.get_submodule(name) for name in names]
    undo = _install(model, dict.fromkeys(modules, handler))
    try:
        yield
    finally:
        undo()


# -------------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class _Anatomy:
    """What one probe forward finds out about a model."""

    sites: tuple[AttentionSite, ...]
    entry: str  # the innermost module whose forward takes the tokens of all sites
    takes_positions: bool
    max_positions: int | None  # size of the table of learned positions


_anatomies: "weakref.WeakKeyDictionary[nn.Module, _Anatomy]" = weakref.WeakKeyDictionary()


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Every attention module of the model that can carry a prefix, found by one forward pass over four tokens.

    Raises:
        UnsupportedModelError: no attention goes through Transformers' attention registry, or the model is of a kind
            that Foreword cannot run.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> [site.name for site in attention_sites(LlamaForCausalLM(config))]
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
    """
    return _anatomy(model).sites


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model places its tokens by `position_ids`, so that a prefix has to shift them."""
    return _anatomy(model).takes_positions


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has learned, if it learned any: prefix and text must fit in."""
    return _anatomy(model).max_positions


def entry_module(model: PreTrainedModel) -> nn.Module:
    """The innermost pretrained model around all sites: the model below its head."""
    return model.get_submodule(_anatomy(model).entry)


def _anatomy(model: PreTrainedModel) -> _Anatomy:
    if model not in _anatomies:
        _anatomies[model] = _probe(model)
    return _anatomies[model]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> _Anatomy:
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder; this version attaches to models with one stack only."
        )
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{kind} reads {model.main_input_name!r}; this version needs 'input_ids'.")
    names = {module: name for name, module in model.named_modules()}
    sites: dict[str, AttentionSite] = {}
    tables: list[int] = []

    def record(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        causal = call.options.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        sites[names[call.module]] = AttentionSite(
            names[call.module],
            "self" if causal else "encoder",
            num_kv_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
            sliding_window=call.options.get("sliding_window"),
        )
        return call.run()

    def look_up(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        index = args[0].reshape(-1) if args and isinstance(args[0], Tensor) else torch.empty(0)
        if len(index) == 4 and bool((index.diff() == 1).all()):  # looked up by position: the token ids are all equal
            tables.append(module.num_embeddings - int(index[0]))

    training = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_pre_hook(look_up) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model.eval()
        with intercept(model, record):
            model(input_ids=torch.full((1, 4), 5, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not sites:
        raise UnsupportedModelError(
            f"{kind} does not call its attention through Transformers' attention registry, so nothing can be attached."
        )
    entry = _entry(model, list(sites))
    positions = "position_ids" in inspect.signature(model.get_submodule(entry).forward).parameters
    return _Anatomy(tuple(sites.values()), entry, positions, min(tables, default=None))


def _entry(model: PreTrainedModel, sites: list[str]) -> str:
    """The innermost pretrained model around all sites, preferring one that takes `position_ids`."""
    around = [
        (name, "position_ids" in inspect.signature(module.forward).parameters)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(s.startswith(f"{name}.") or not name for s in sites)
    ]
    return max(around, key=lambda entry: (entry[1], len(entry[0])))[0]


# -------------------------------------------------------------------------------------------------------- attaching


def attach(model: PreTrainedModel, prefix: PrefixSource | Sequence[PrefixSource | None]) -> "Attachment":
    """Let every attention layer of `model` see `prefix` before the real tokens.

    The model object stays the same: call it, generate with it, train through it as before. Use the result in a `with`
    statement, after which the model is itself again, or keep it and call `detach`.

    Args:
        model: a Transformers model.
        prefix: one prefix for all rows, or a list with one prefix or `None` for each row of the batch. A batch k times
            as long (beams, several return sequences) repeats each entry k times, as `generate` does. Swap prefixes
            later with `Attachment.use`.

    Without `position_ids`, rows are placed as their `attention_mask` says: the first real token of each row has
    position `prefix.position_offset`, however the row is padded.

    Raises:
        ModelMismatchError: the prefix was made for another model.
        UnsupportedModelError: the model cannot carry a prefix.
        ConfigError: the model has prefixes attached already.

    Example:
        >>> import torch, foreword
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))
        >>> prefix = foreword.text_prefix(model, input_ids=[7, 8, 9])
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> with foreword.attach(model, [prefix, None]):   # row 0 sees the prefix, row 1 does not
        ...     logits = model(ids).logits
    """
    return Attachment(model, prefix)


class Attachment:
    """The tie between a model and its prefixes. Made by `attach`."""

    def __init__(self, model: PreTrainedModel, prefix: PrefixSource | Sequence[PrefixSource | None]) -> None:
        self.model = model
        self._anatomy = _anatomy(model)
        self._parts: list[list[PrefixPart]] = []
        self._checked: set[int] = set()
        self.use(prefix)
        modules = [model.get_submodule(site.name) for site in self._anatomy.sites]
        undo = _install(model, {m: partial(self._attend, i) for i, m in enumerate(modules)})
        entry = model.get_submodule(self._anatomy.entry)
        self._parameters = list(inspect.signature(entry.forward).parameters)
        hook = entry.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo: Callable[[], None] | None = lambda: (hook.remove(), undo())[1]

    def use(self, prefix: PrefixSource | Sequence[PrefixSource | None]) -> None:
        """From the next forward pass on, see this prefix, or these: one prefix or `None` for each row."""
        rows = list(prefix) if isinstance(prefix, Sequence) else [prefix]
        if not rows:
            raise ConfigError("An empty list of prefixes: expected one prefix or None for each row of the batch.")
        self._sources = list({id(source): source for source in rows if source is not None}.values())
        for source in self._sources:
            self._check(source)
        number = {id(source): i for i, source in enumerate(self._sources)}
        self._rows = [-1 if source is None else number[id(source)] for source in rows]
        self._shared = not isinstance(prefix, Sequence)

    def detach(self) -> None:
        """Make the model itself again. May be called twice."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _check(self, source: PrefixSource) -> None:
        if id(source) in self._checked:
            return
        name = source.base.get("name", "another model")
        known = {site.name: site for site in self._anatomy.sites}
        for site in source.sites:
            if known.get(site.name) != site:
                found = known.get(site.name, f"no such site among its {len(known)}")
                raise ModelMismatchError(
                    f"The prefix was made for {name} and has a site {site}, but {type(self.model).__name__} has {found}. "
                    "Load the base that the prefix was trained on."
                )
        if "fingerprint" in source.base:
            check_fingerprint(source.base["fingerprint"], self.model, name)
        self._checked.add(id(source))

    # What happens in a forward pass: positions are shifted and prefixes laid out once, then each site attends.

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        batch, length = tokens.shape[:2]
        if self._shared:
            rows = None
        elif batch % len(self._rows):
            raise ConfigError(
                f"{len(self._rows)} prefixes for a batch of {batch} rows: give one prefix or None for each row "
                "(generate with k beams or return sequences repeats each entry k times)."
            )
        else:
            rows = torch.tensor(self._rows, device=tokens.device).repeat_interleave(batch // len(self._rows))
        self._lay_out(rows)
        if not self._anatomy.takes_positions:
            return args, kwargs
        offsets = [source.position_offset for source in self._sources]
        offset = offsets[0] if rows is None else torch.tensor([*offsets, 0], device=tokens.device)[rows][:, None]
        positions = given.get("position_ids")
        if positions is None:
            positions = _positions(given, length, tokens.device)
        positions = positions + offset
        limit = self._anatomy.max_positions
        if limit is not None and int(positions.max()) >= limit:
            raise PositionError(
                f"Prefix and text need position {int(positions.max())}, but {type(self.model).__name__} has learned "
                f"positions up to {limit - 1}. Shorten the text to {limit - max(offsets)} tokens or the prefix."
            )
        where = self._parameters.index("position_ids")
        if where < len(args):
            return (*args[:where], positions, *args[where + 1 :]), kwargs
        return args, kwargs | {"position_ids": positions}

    def _lay_out(self, rows: Tensor | None) -> None:
        """Fill `_parts`: for each site of the model the prefixes that its queries see."""
        self._parts = [[] for _ in self._anatomy.sites]
        index = {site.name: i for i, site in enumerate(self._anatomy.sites)}
        for number, source in enumerate(self._sources):
            own = None if rows is None else (rows == number).nonzero().squeeze(-1)
            for site, (key, value, gate) in zip(source.sites, source.tensors(), strict=True):
                bias = None if gate is None else gate.log()
                self._parts[index[site.name]].append(PrefixPart(key, value, bias, own))

    def _attend(self, index: int, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        query, options = call.query, call.options
        parts = [
            PrefixPart(
                key.to(query.device, query.dtype),
                value.to(query.device, query.dtype),
                None if bias is None else bias.to(query.device),
                rows,
            )
            for key, value, bias, rows in self._parts[index]
        ]
        if not parts:
            return call.run()
        plain = call.implementation == "sdpa" and not options.get("dropout")
        plain = plain and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
        square = not call.is_causal or query.shape[2] == call.key.shape[2]
        if plain and square and has_token_kernel(query, call.value, call.mask):
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            output = merged_attention(
                query, call.key, call.value, parts, scale=scale, mask=call.mask, is_causal=call.is_causal
            )
            return output.transpose(1, 2).contiguous(), None
        key, value, bias = concatenate(call.key, call.value, parts)
        new = key.shape[2] - call.key.shape[2]
        mask = extend_mask(call.mask, bias, query, call.key.shape[2], new, call.is_causal)
        return call.run(key=key, value=value, mask=mask)


def _positions(given: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Positions of the tokens as the attention mask places them, or after what the cache holds."""
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.to(device).long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    cache = given.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(length, device=device)[None] + past
