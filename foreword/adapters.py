"""Bottleneck adapters (Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP*), to compare prefixes with.

Two small networks a layer: one behind the projection that ends its attention, one behind the projection that ends its
feed-forward network, each before the residual is added. Both projections are found by a probe, as attention sites are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from .anatomy import attention_sites, sample_inputs
from .attention import AttentionCall, intercept
from .errors import UnsupportedModelError

__all__ = ["BottleneckAdapter", "adapted", "adapter_places", "make_adapters"]

_SPREAD = 0.01  # of the first projection's start, as in the paper


class BottleneckAdapter(nn.Module):
    """`x + up(gelu(down(x)))`, d -> m -> d, with biases. `up` starts at zero, so that nothing changes at the start.

    Example:
        >>> sum(p.numel() for p in BottleneckAdapter(features=8, width=2).parameters())   # 2 d m + d + m
        42
    """

    def __init__(self, features: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        with torch.no_grad():
            self.down.weight.normal_(0, _SPREAD, generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """In the precision of `x`; the parameters may be kept in a higher one."""
        down, up = self.down, self.up
        hidden = gelu(nn.functional.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype)))
        return x + nn.functional.linear(hidden, up.weight.to(x.dtype), up.bias.to(x.dtype))


def adapter_places(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The projections behind which adapters stand, with their output features: two a layer, in the model's order.

    Raises:
        UnsupportedModelError: a layer has not these two projections, for example a mixture of experts.
    """
    names = {module: name for name, module in model.named_modules()}
    sites = [site.name for site in attention_sites(model)]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    events: list[
        tuple[str, nn.Module | None, int]
    ] = []  # in the order of the forward pass; no module: attention itself

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        events.append((names[call.module], None, 0))
        return call.run()

    def project(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            events.append((names[module], module, output.shape[-1]))

    def projects(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)

    hooks = [module.register_forward_hook(project) for module in model.modules() if projects(module)]
    try:
        with torch.no_grad(), intercept(model, attend, sites):
            model(**sample_inputs(model, 4, torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    places = []
    for site in sites:
        around = max((name for name in lists if site.startswith(f"{name}.")), key=len, default=None)
        if around is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {site} is in no list of layers, so adapters have no place."
            )
        layer = f"{around}.{site[len(around) + 1 :].partition('.')[0]}."
        own = [event for event in events if event[0].startswith(layer)]
        after = [event for event in own[own.index((site, None, 0)) + 1 :] if event[1] is not None]
        if len(after) < 2 or after[0][2] != after[-1][2]:
            raise UnsupportedModelError(
                f"{type(model).__name__}: layer {layer[:-1]} has no projection behind its attention and another one, of as "
                "many features, behind a feed-forward network. Compare without adapters."
            )
        places += [(module, features) for _, module, features in (after[0], after[-1]) if module is not None]
    return list(dict(places).items())


def make_adapters(model: PreTrainedModel, width: int, seed: int = 0) -> nn.ModuleList:
    """An adapter for each place, in float32 or better, on the device of its place."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(torch.float32, model.dtype)
    return nn.ModuleList(
        BottleneckAdapter(features, width, generator).to(next(module.parameters()).device, dtype)
        for module, features in adapter_places(model)
    )


@contextmanager
def adapted(model: PreTrainedModel, adapters: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Inside, each place's output goes through its adapter. The model's own parameters stay as they are."""
    pairs = zip(adapter_places(model), adapters, strict=True)
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, adapter=adapter: adapter(output))
        for (module, _), adapter in pairs
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
