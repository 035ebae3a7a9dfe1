"""The cross-entropy of a large vocabulary, without ever holding all logits in float32, or all of them at all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

__all__ = ["cross_entropy", "head_cross_entropy", "is_plain_head"]

_IN_CACHE = 2**20  # logits that are in float32 at a time on a CPU
_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}  # logits that a head makes at a time


def cross_entropy(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], ignored: int) -> Float[Tensor, " N"]:
    """The loss of each row in nats, 0 where its label is `ignored`, in float32 or better.

    The gradient is computed with the loss, and **replaces the logits**, in their own precision: they must not be used
    again. PyTorch's `cross_entropy` makes several passes over float32 copies of all logits instead.

    Raises:
        RuntimeError: in the backward pass, if another operation needs the logits that were replaced.

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> losses = cross_entropy(logits * 1, torch.tensor([0, 2, -100]), -100)
        >>> [round(loss, 4) for loss in losses.tolist()]   # log 4
        [1.3863, 1.3863, 0.0]
    """
    return _CrossEntropy.apply(logits, labels, ignored)


def head_cross_entropy(
    hidden: Float[Tensor, "N D"], head: nn.Linear, places: Int[Tensor, " M"], labels: Int[Tensor, " M"], ignored: int
) -> Float[Tensor, " M"]:
    """`cross_entropy(head(hidden[places]), labels)`, for a frozen head: one without a gradient of its own.

    Logits are made block by block, and each block's gradient goes back through the head before the next is made: so
    they are never held as a whole, and neither is their gradient.
    """
    return _HeadCrossEntropy.apply(hidden, head.weight, head.bias, places, labels, ignored)


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether `head_cross_entropy` may stand in for calling the head."""
    if type(head) is not nn.Linear or "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return False
    weights = [weight for weight in (head.weight, head.bias) if weight is not None]
    return all(type(weight) is nn.Parameter and not weight.requires_grad and not weight.is_meta for weight in weights)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignored):
        losses = _replace(logits, labels, ignored, ctx.needs_input_grad[0])
        ctx.gradient = logits if ctx.needs_input_grad[0] else None
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the gradient of this loss was taken before"
        if grad.device.type != "cpu" or bool((grad != 1).any()):
            gradient = gradient * grad[:, None].to(gradient.dtype)
        return gradient, None, None


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, places, labels, ignored):
        rows, differentiates = hidden.index_select(0, places), ctx.needs_input_grad[0]
        size = max(1, _AT_ONCE.get(hidden.device.type, 2**24) // len(weight))
        losses = []
        for own, label in zip(rows.split(size), labels.split(size), strict=True):
            logits = linear(own, weight, bias)
            losses.append(_replace(logits, label, ignored, differentiates))
            if differentiates:
                torch.mm(
                    logits, weight, out=own
                )  # in the place of the hidden states, which were needed for nothing else
        if differentiates:
            ctx.save_for_backward(rows, places)
            ctx.length = len(hidden)
        return torch.cat(losses) if losses else rows.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        rows, places = ctx.saved_tensors
        gradient = rows.new_zeros(ctx.length, rows.shape[1])
        gradient.index_add_(0, places, rows * grad[:, None].to(rows.dtype))
        return gradient, None, None, None, None, None


def _replace(logits: Tensor, labels: Tensor, ignored: int, differentiates: bool) -> Tensor:
    """The losses; if it `differentiates`, the gradient stands in the place of the logits afterwards."""
    if logits.device.type == "cuda" and logits.stride(-1) == 1:
        from .triton_kernels import cross_entropy_

        losses = cross_entropy_(logits, labels, ignored, differentiates)
        if differentiates:
            torch.autograd.graph.increment_version(logits)  # autograd sees no write of a kernel of our own
        return losses
    precision = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.zeros(len(logits), dtype=precision, device=logits.device)
    rows = max(1, min(len(logits), _IN_CACHE // logits.shape[-1]))
    # One buffer for all blocks: on a CPU fresh memory costs more than the arithmetic.
    room = logits.new_empty((rows, logits.shape[-1]), dtype=precision)
    for own, label, loss in zip(logits.split(rows), labels.split(rows), losses.split(rows), strict=True):
        counted = (label != ignored)[:, None]
        label = label.clamp_min(0)[:, None]
        block = room[: len(own)].copy_(own)
        block.sub_(block.amax(-1, keepdim=True))
        right = block.gather(-1, label)
        mass = block.exp_().sum(-1, keepdim=True)
        loss.copy_(torch.where(counted, mass.log() - right, 0.0).squeeze(-1))
        if differentiates:
            block.div_(mass).scatter_add_(-1, label, torch.full_like(mass, -1.0))  # softmax minus one-hot
            own.copy_(block.masked_fill_(~counted, 0.0))
    return losses
