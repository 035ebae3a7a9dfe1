"""A model's task head: the parameters that its base does not have, under their names in the model's state dict."""

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["LENT", "head_names", "head_tensors", "note_missing", "own_parameters"]

LENT = "foreword_prefix"  # the submodule that an attached prefix is, for as long as it is attached

_missing: "WeakKeyDictionary[nn.Module, frozenset[str]]" = WeakKeyDictionary()


def head_names(model: nn.Module) -> list[str]:
    """The parameters outside `model.base_model` (`classifier.*`, `score.*`, `qa_outputs.*`, ...), and those inside that
    were noted as missing from its checkpoint, such as the pooler of a BERT that was saved without one."""
    base = getattr(model, "base_model", model)
    inside = next((f"{name}." if name else "" for name, module in model.named_modules() if module is base), "")
    missing = _missing.get(model, frozenset())
    return [name for name, _ in own_parameters(model) if not name.startswith(inside) or name in missing]


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters by name, without those of an attached prefix."""
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(f"{LENT}."))


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the head, on the CPU and at least in float32."""
    own = dict(model.named_parameters())
    return {
        name: own[name].detach().to("cpu", torch.promote_types(torch.float32, own[name].dtype), copy=True)
        for name in head_names(model)
    }


def note_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Remember which parameters a checkpoint did not hold: they are random, so they belong to the head."""
    _missing[model] = frozenset(names)
