"""The cross-entropy of a large vocabulary, without ever holding all logits in float32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["summed_cross_entropy"]

_NUMBERS = {"cpu": 2**20, "cuda": 2**26}  # that are in float32 at a time: what a cache holds; what keeps a GPU busy


def summed_cross_entropy(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], ignored: int) -> Float[Tensor, ""]:
    """The sum over the rows whose label is not `ignored`, in nats, in float32 or better.

    The gradient is computed with the loss, row block by row block, and **replaces the logits**, in their own precision:
    they must not be used again. `cross_entropy` makes several passes over float32 copies of all logits instead.

    Raises:
        RuntimeError: in the backward pass, if another operation needs the logits that were replaced.

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> loss = summed_cross_entropy(logits * 1, torch.tensor([0, 2, -100]), -100)
        >>> round(loss.item() / 2, 4)   # log 4
        1.3863
    """
    return _SummedCrossEntropy.apply(logits, labels, ignored)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignored):
        precision = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=logits.device)
        rows = max(1, min(len(logits), _NUMBERS.get(logits.device.type, 2**24) // logits.shape[-1]))
        # One buffer for all blocks: on a CPU fresh memory costs more than the arithmetic.
        room = logits.new_empty((rows, logits.shape[-1]), dtype=precision)
        for own, label in zip(logits.split(rows), labels.split(rows), strict=True):
            counted = (label != ignored)[:, None]
            label = label.clamp_min(0)[:, None]
            block = room[: len(own)].copy_(own)
            block.sub_(block.amax(-1, keepdim=True))
            right = block.gather(-1, label)
            mass = block.exp_().sum(-1, keepdim=True)
            total += torch.where(counted, mass.log() - right, 0.0).sum()
            if ctx.needs_input_grad[0]:
                block.div_(mass).scatter_add_(-1, label, torch.full_like(mass, -1.0))  # softmax minus one-hot
                own.copy_(block.masked_fill_(~counted, 0.0))
        ctx.gradient = logits if ctx.needs_input_grad[0] else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the gradient of this loss was taken before"
        if grad.device.type != "cpu" or grad != 1:
            gradient = gradient * grad.to(gradient.dtype)
        return gradient, None, None
