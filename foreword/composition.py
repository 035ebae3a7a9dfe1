"""Several prefixes made into one: one behind the other, or their mean.

To stand behind another, a prefix has to move to later positions, and with it the rotation of its keys. How a model
rotates is not looked up: a few random tokens are run at the old and at the new positions while attention answers zero,
so that only the position inside the keys changes, and the rotation is read off the keys that the model then makes.
P virtual tokens, G key/value heads, D head dim, N observed keys.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import isfinite
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import attention_sites, place, sample_inputs, stacks, text_room
from .attention import AttentionCall, intercept
from .errors import ConfigError, ModelMismatchError, PositionError, UnsupportedModelError
from .fingerprint import check_fingerprint
from .prefix import Prefix, SiteTensors

__all__ = ["average", "compose", "concatenate", "starts_with_sink"]

_TOKENS, _PLACES = 64, 4  # random tokens, and the positions between a prefix's first and last at which they are seen
_SHARED = {  # in the metadata: prefixes that differ in it are for different prompts
    "task": "tasks",
    "labels": "labels",
    "template": "chat templates",
    "encoder": "kinds of model",
}
_EXPLAINED = 0.5  # a pair of dimensions rotates if that leaves less than this of the change


def compose(
    model: PreTrainedModel,
    prefixes: Sequence[Prefix],
    how: str = "concatenate",
    weights: Sequence[float] | None = None,
) -> Prefix:
    """One prefix made of several, for one row to see all of them. One prefix alone comes back as it is.

    What it is good for and what not, with figures: docs/composition.md.

    `concatenate` puts them one behind the other. Each moves to the positions after those before it, its keys rotated
    accordingly, so that no two virtual tokens share a position and the real tokens follow the last one:

    - Of several attention sinks the first stays and the others are dropped. A sink is the first virtual token of a
      prefix that starts from text or demonstrations and kept it frozen, as it does by default, or was not trained.
    - A prefix with `position_offset` 0 on a model with positions (a no-op start) holds no positions, and takes none
      here: its keys move by the positions held before it, and the prefixes after it start where it does.
    - Gates stay; a prefix without gates gets gates of one beside one that has some.
    - Models that add positions to their embeddings, learned ones for instance (GPT-2, OPT), do not rotate keys. There
      is nothing that could be moved, and keys stay as they are: each prefix still reads as if it were the first.
      Encoders and models without positions move nothing either.

    `average` takes the mean of keys, values and gates. The prefixes need the same number of virtual tokens, and hold
    the same positions; a missing gate counts as one. Trained heads are averaged too.

    Args:
        model: the base model of all the prefixes.
        prefixes: in the order in which they shall stand.
        how: `concatenate` or `average`.
        weights: for `average`, one number for each prefix; they are divided by their sum. Equal by default.

    Raises:
        ModelMismatchError: a prefix was made for another model.
        ConfigError: the prefixes do not fit each other (sites, lengths, tasks, labels, heads, chat templates), or the weights do not
            fit.
        UnsupportedModelError: the model does something else to its keys than rotating pairs of their dimensions.
        PositionError: together they overrun the model's table of learned positions.

    Example:
        >>> import foreword
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...                                      num_hidden_layers=2, num_attention_heads=4))
        >>> fox, owl = foreword.text_prefix(model, [7, 8, 9]), foreword.text_prefix(model, [7, 5, 6, 4])
        >>> foreword.compose(model, [fox, owl]).num_virtual_tokens   # owl's 7 is a second sink
        6
    """
    if how == "average":
        return average(model, prefixes, weights)
    if how != "concatenate":
        raise ConfigError(f"how={how!r}: prefixes are composed with 'concatenate' or 'average'.")
    if weights is not None:
        raise ConfigError(
            f"weights={list(weights)!r} with how='concatenate': prefixes that stand one behind the other are not "
            "weighted. Leave the weights out, or use how='average'."
        )
    return concatenate(model, prefixes)


def concatenate(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> Prefix:
    """The prefixes one behind the other, keys rotated to their new positions; see `compose`."""
    metadata = _checked(model, prefixes)
    if len(prefixes) == 1:
        return deepcopy(prefixes[0])
    for i, prefix in enumerate(prefixes):
        if prefix.head is not None:
            raise ConfigError(
                f"Prefix {i + 1} of {len(prefixes)} has a trained head, and two heads cannot stand one behind the other. "
                "Prefixes of one task with the same labels can be averaged: how='average'."
            )
    offset, sink, pieces, parts = 0, False, [], []
    gated = any(prefix.gates is not None for prefix in prefixes)
    for prefix in prefixes:
        dropped = int(sink and starts_with_sink(prefix))
        held = prefix.position_offset - dropped if prefix.position_offset else 0
        shift = offset - dropped if prefix.position_offset else offset
        pieces.append(_piece(model, prefix, dropped, shift, gated))
        told = {"virtual_tokens": prefix.num_virtual_tokens - dropped, "shift": shift, "sink_dropped": bool(dropped)}
        parts.append(told | {"metadata": _without_template(prefix)})
        offset, sink = offset + held, sink or starts_with_sink(prefix)
    if (room := text_room(model, offset)) is not None and room <= 0:
        raise PositionError(
            f"Together the prefixes hold {offset} positions, but {type(model).__name__} has learned {room + offset}, and "
            "the text needs some too. Compose fewer or shorter prefixes."
        )
    metadata |= {
        "attention_sink": starts_with_sink(prefixes[0]),
        "composition": {"how": "concatenate", "parts": parts},
    }
    tensors = [
        SiteTensors(torch.cat(keys), torch.cat(values), torch.cat(gates) if gated else None)
        for keys, values, gates in (zip(*entries, strict=True) for entries in zip(*pieces, strict=True))
    ]
    return Prefix(prefixes[0].sites, tensors, position_offset=offset, base=prefixes[0].base, metadata=metadata)


def average(model: PreTrainedModel, prefixes: Sequence[Prefix], weights: Sequence[float] | None = None) -> Prefix:
    """The weighted mean of keys, values and gates; see `compose`."""
    metadata = _checked(model, prefixes)
    shares = _shares(weights, len(prefixes))
    lengths = [prefix.num_virtual_tokens for prefix in prefixes]
    offsets = [prefix.position_offset for prefix in prefixes]
    if len(set(lengths)) > 1 or len(set(offsets)) > 1:
        raise ConfigError(
            f"Prefixes of {_listed(lengths)} virtual tokens that hold {_listed(offsets)} positions have no mean. "
            "Train them with the same number of virtual tokens and the same start, or use how='concatenate'."
        )
    if len(prefixes) == 1:
        return deepcopy(prefixes[0])
    gated = any(prefix.gates is not None for prefix in prefixes)
    pieces = [_piece(model, prefix, 0, 0, gated) for prefix in prefixes]
    tensors = [
        SiteTensors(_mean(keys, shares), _mean(values, shares), _mean(gates, shares) if gated else None)
        for keys, values, gates in (zip(*entries, strict=True) for entries in zip(*pieces, strict=True))
    ]
    metadata |= {
        "attention_sink": all(starts_with_sink(prefix) for prefix in prefixes),
        "composition": {
            "how": "average",
            "parts": [
                {"virtual_tokens": prefix.num_virtual_tokens, "weight": share, "metadata": _without_template(prefix)}
                for prefix, share in zip(prefixes, shares, strict=True)
            ],
        },
    }
    return Prefix(
        prefixes[0].sites,
        tensors,
        position_offset=offsets[0],
        base=prefixes[0].base,
        metadata=metadata,
        head=_mean_head(prefixes, shares),
    )


def starts_with_sink(prefix: Prefix) -> bool:
    """Whether the first virtual token is that of a text, as the model itself computes it."""
    training = prefix.metadata.get("training")
    if training is None:
        return bool(prefix.metadata.get("attention_sink"))
    asked = training["prefix"]
    return asked["initialization"] in ("demonstrations", "text") and asked["freeze_first"] is not False


# ----------------------------------------------------------------------------------------------------------- checks


def _checked(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> dict[str, Any]:
    """Raises unless the prefixes fit the model and each other; returns the metadata that they share."""
    if not prefixes:
        raise ConfigError("No prefixes to compose: give one or more.")
    known = set(attention_sites(model))
    for i, prefix in enumerate(prefixes):
        which, name = f"Prefix {i + 1} of {len(prefixes)}", prefix.base.get("name", "another model")
        if unknown := [site for site in prefix.sites if site not in known]:
            raise ModelMismatchError(
                f"{which} was made for {name} and has a site {unknown[0]}, which {type(model).__name__} has not. "
                "Prefixes are composed on the one base that all of them were made for."
            )
        if "fingerprint" in prefix.base:
            try:
                check_fingerprint(prefix.base["fingerprint"], model, name)
            except ModelMismatchError as error:
                raise ModelMismatchError(f"{which}: {error}") from None
        if prefix.sites != prefixes[0].sites:
            raise ConfigError(
                f"{which} has {len(prefix.sites)} sites, the first one has {len(prefixes[0].sites)}, and they are not "
                "the same ones. Compose prefixes of the same sites."
            )
    shared: dict[str, Any] = {}
    for key, told in _SHARED.items():
        values = [prefix.metadata[key] for prefix in prefixes if key in prefix.metadata]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"The prefixes were trained with different {told}, so nothing suits all of them. Compose prefixes of one "
                "task, trained alike."
            )
        shared |= {key: values[0]} if values else {}
    return shared


def _mean_head(prefixes: Sequence[Prefix], shares: Sequence[float]) -> dict[str, Tensor] | None:
    """The weighted mean of the trained heads, which all the prefixes have or none."""
    heads = [prefix.head or {} for prefix in prefixes]
    shapes = [{name: tensor.shape for name, tensor in head.items()} for head in heads]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError(
            "The prefixes have trained heads that differ in their tensors, or some have none: no mean of them."
        )
    names = list(heads[0])
    means = [_mean([head[name].detach() for head in heads], shares) for name in names]
    return dict(zip(names, means, strict=True)) or None


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.stack([share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)]).sum(0)
    return total.to(tensors[0].dtype)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} prefixes: give one number for each prefix.")
    if any(weight < 0 or not isfinite(weight) for weight in weights) or not sum(weights) > 0:
        raise ConfigError(f"Weights {_listed(weights)}: expected numbers of 0 or more, and not all of them 0.")
    return [weight / sum(weights) for weight in weights]


def _listed(numbers: Sequence[int] | Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _without_template(prefix: Prefix) -> dict[str, Any]:
    return {key: value for key, value in prefix.metadata.items() if key != "template"}


# --------------------------------------------------------------------------------------------------------- rotation


class _Piece(NamedTuple):
    key: Float[Tensor, "P G D"]
    value: Float[Tensor, "P G E"]
    gate: Float[Tensor, "P G"]


def _piece(model: PreTrainedModel, prefix: Prefix, first: int, shift: int, gated: bool) -> list[_Piece]:
    """For each site the virtual tokens from number `first` on, keys moved by `shift` positions."""
    rotations = _rotations(model, prefix, first, shift)
    pieces = []
    for (key, value, gate), rotation in zip(prefix.tensors(), rotations, strict=True):
        key, value = key.detach()[first:], value.detach()[first:]
        gate = torch.ones_like(key[..., 0]) if gate is None else gate.detach()[first:]
        if rotation is not None:
            key = (key.double() @ rotation.to(key.device).mT).to(key.dtype)
        pieces.append(_Piece(key.clone(), value.clone(), gate.clone()))
    return pieces


def _rotations(model: PreTrainedModel, prefix: Prefix, first: int, shift: int) -> list[Float[Tensor, "D D"] | None]:
    """For each site the matrix that moves its keys by `shift` positions; `None` where nothing is to be moved."""
    length = prefix.lengths.get("self", 0)
    if shift == 0 or first >= length or not any(stack.takes_positions for stack in stacks(model)):
        return [None] * len(prefix.sites)
    places = torch.linspace(first, length - 1, _PLACES).round().long().unique()
    here, there = _seen_at(model, prefix, places), _seen_at(model, prefix, places + shift)
    eps = torch.finfo(model.dtype).eps
    if any((b.value - a.value).norm() > eps**0.5 * a.value.norm() for a, b in zip(here, there, strict=True)):
        return [None] * len(prefix.sites)  # positions are part of the hidden states, not of the keys alone
    rotations = []
    most = max(1e-3, 8 * eps)  # models compute angles in float32, whatever their own precision is
    for site, before, after in zip(prefix.sites, here, there, strict=True):
        rotation, left = _fit(before.key.flatten(0, 2), after.key.flatten(0, 2))
        if not left <= most:
            raise UnsupportedModelError(
                f"{type(model).__name__} changes its keys at {site.name} from positions {_listed(places.tolist())} to "
                f"{_listed((places + shift).tolist())} by something else than one rotation of pairs of dimensions: "
                f"{left:.2g} of a dimension is left unexplained, expected at most {most:.2g}. So a prefix cannot move "
                "there. Use how='average'; or fewer virtual tokens, if this model rotates long contexts differently."
            )
        rotations.append(rotation)
    return rotations


class _Seen(NamedTuple):
    """What one site saw; in each of R passes all tokens stood at one position."""

    key: Float[Tensor, "R G T D"]
    value: Float[Tensor, "R G T E"]


def _seen_at(model: PreTrainedModel, prefix: Prefix, positions: Int[Tensor, " R"]) -> list[_Seen]:
    """For each site what it saw at all the positions, one after the other."""
    entries = zip(*(_observe(model, prefix, position) for position in positions.tolist()), strict=True)
    return [_Seen(torch.cat([s.key for s in site]), torch.cat([s.value for s in site])) for site in entries]


@torch.no_grad()
def _observe(model: PreTrainedModel, prefix: Prefix, position: int) -> list[_Seen]:
    """Keys and values of random tokens at a position, when attention answers zero: only the position differs."""
    seen: dict[str, _Seen] = {}
    names = {model.get_submodule(site.name): site.name for site in attention_sites(model)}

    def handle(call: AttentionCall) -> tuple[Tensor, None]:
        seen[names[call.module]] = _Seen(call.key, call.value)
        rows, heads, length, _ = call.query.shape
        return call.query.new_zeros(rows, length, heads, call.value.shape[3]), None

    def at(first: int) -> Callable[[int], Tensor]:
        return lambda length: torch.full((length,), first + position)

    inputs = sample_inputs(model, _TOKENS, torch.Generator().manual_seed(0))
    training = {module: module.training for module in model.modules()}
    hooks = [place(model.get_submodule(s.name), at(s.first_position)) for s in stacks(model) if s.takes_positions]
    model.eval()
    try:
        with intercept(model, handle, list(names.values())):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return [seen[site.name] for site in prefix.sites]


def _fit(before: Float[Tensor, "N D"], after: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "D D"], float]:
    """The rotation of pairs of dimensions that turns `before` into `after`, and what it leaves of the worst dimension.

    For dimensions i and j the best angle has cosine and sine in proportion to the sums over a_i b_i + a_j b_j and
    a_i b_j - a_j b_i. Two dimensions are a pair if each is the partner that explains most of the other's change.
    """
    a, b = before.double(), after.double()
    both = a.mT @ b
    cosine, sine = both.diagonal()[:, None] + both.diagonal(), both - both.mT
    size, change = a.square().sum(0) + b.square().sum(0), (b - a).square().sum(0)
    left = size[:, None] + size - 2 * torch.hypot(cosine, sine)
    unexplained = left / (change[:, None] + change).clamp_min(1e-300)
    unexplained.fill_diagonal_(torch.inf)
    share, partner = unexplained.min(1)
    own = torch.arange(len(partner), device=partner.device)
    paired = (partner[partner] == own) & (share < _EXPLAINED)
    rotation = torch.eye(len(partner), dtype=a.dtype, device=a.device)
    i, j = own[paired], partner[paired]
    angle = torch.atan2(sine[i, j], cosine[i, j])
    rotation[i, i], rotation[i, j] = angle.cos(), -angle.sin()
    size = torch.where(paired, (size + size[partner]) / 2, size)
    errors = (a @ rotation.mT - b).square().sum(0) / (size / 2).clamp_min(1e-300)
    return rotation.cpu(), float(errors.max().sqrt())
