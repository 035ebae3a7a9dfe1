"""Bases whose weights are quantized: how they are loaded, and how gradients pass through them.

The gradient of a frozen linear layer is a product with its weight. Autograd would keep the weight that was dequantized
for the forward pass, so in the backward pass all layers' would stand in memory, and nothing be saved; and kernels made for
inference have no gradient at all. `differentiable` lets each layer compute its output by its library's own kernel, and
dequantizes its weight again for the gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import ConfigError

__all__ = ["differentiable", "is_quantized", "precision_name", "quantization_config"]

_LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes", "fp8": "torchao"}
_AT_ONCE = 1024  # input features whose weights are read off a layer at a time


def quantization_config(precision: str, dtype: torch.dtype) -> Any:
    """Transformers' options to load a base in this precision, `dtype` for what is not quantized; `None` for a plain one.

    Only weights are quantized, those of linear layers but the head: `int8` one scale for each output, `int4` NF4 in blocks of 64,
    `fp8` one scale for each output.

    Raises:
        ConfigError: the library that does it is not installed.
    """
    if precision not in _LIBRARIES:
        return None
    library = _LIBRARIES[precision]
    if find_spec(library) is None:
        raise ConfigError(
            f"Precision {precision} needs {library}, which is not installed. Install it: pip install 'foreword[quantized]'"
        )
    import transformers

    if precision == "int4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    from torchao import quantization  # pyright: ignore[reportMissingImports]  # an extra

    chosen = quantization.Int8WeightOnlyConfig() if precision == "int8" else quantization.Float8WeightOnlyConfig()
    return transformers.TorchAoConfig(chosen)


def is_quantized(layer: nn.Module) -> bool:
    """Whether this is a linear layer that keeps its weight quantized, whichever library made it."""
    if not (hasattr(layer, "in_features") and hasattr(layer, "out_features")) or any(True for _ in layer.children()):
        return False
    weight = getattr(layer, "weight", None)
    return not isinstance(weight, Tensor) or _dequantizes(weight) or not weight.is_floating_point()


def precision_name(model: nn.Module) -> str:
    """What the model computes in, and how quantized layers keep their weights: `bfloat16 + Int8Tensor`."""
    layers = [module for module in model.modules() if is_quantized(module)]
    kinds = {type(getattr(layer, "weight", layer)).__name__ for layer in layers}
    return " + ".join([str(getattr(model, "dtype", "")).removeprefix("torch."), *sorted(kinds)])


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through the model's frozen quantized layers, without a dequantized weight being kept for them."""
    changed = []
    for layer in [module for module in model.modules() if is_quantized(module)]:
        if _keeps_or_loses(layer, getattr(model, "dtype", torch.float32)):
            changed.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = partial(_forward, layer, layer.forward)
    try:
        yield
    finally:
        for layer, before in changed:
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before


def _keeps_or_loses(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether its own gradient would keep the dequantized weight, or there is none; the latter is found by trying."""
    if _dequantizes(getattr(layer, "weight", None)):
        return True
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), None)
    one = torch.zeros(1, layer.in_features, dtype=dtype, device=device)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer(one)  # after which some lay their weights out for inference
    return not layer(one.requires_grad_()).requires_grad


def _dequantizes(weight: Any) -> bool:
    """Whether it is of a class of tensors that are quantized, such as torchao's and quanto's."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


def _forward(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    if _dequantizes(getattr(layer, "weight", None)):
        return _Dequantizing.apply(x, layer.weight, layer.bias)
    return _ReadingOff.apply(x, forward)


class _Dequantizing(torch.autograd.Function):
    """A linear layer whose weight can tell what it stands for."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None


class _ReadingOff(torch.autograd.Function):
    """A linear layer of whose weight nothing is known: what it makes of the identity is its weight, and its bias."""

    @staticmethod
    def forward(ctx, x, forward):
        ctx.layer, ctx.width = forward, x.shape[-1]
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        bias = ctx.layer(grad.new_zeros(1, ctx.width))
        parts = []
        for first in range(0, ctx.width, _AT_ONCE):
            identity = grad.new_zeros(min(_AT_ONCE, ctx.width - first), ctx.width)
            identity.diagonal(first).fill_(1)
            parts.append(grad @ (ctx.layer(identity) - bias).mT)
        return torch.cat(parts, -1), None
