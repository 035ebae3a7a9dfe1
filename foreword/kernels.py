"""Attention over prefixes and the real tokens, as pure tensor functions.

The softmax over [prefix; tokens] splits exactly: each part is computed on its own, and the parts are merged with
weights from their log-sum-exps (lse). `merged_attention` does this, with a fused kernel for the token part. `concatenate`
and `extend_mask` are the reference path: they put the prefix in front of the keys and values for any attention function,
and every fast path is tested against them.

Differentiating through the lse that a fused kernel returns is silently wrong: it carries no gradient. So the merge is
one `autograd.Function` whose backward calls the backward of each part with the *merged* output and the *merged* lse;
then `exp(score - lse)` and `delta = rowsum(grad * output)` are those of the joint softmax, and the parts' query
gradients add up.

The prefix part is never repeated for the rows of a batch: the rows that see a prefix become part of its query axis.

Notation: B batch, T query tokens, S key tokens, K prefixes of P virtual tokens, R rows that see one prefix, H query heads,
G key/value heads, D and E key and value head dimensions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .token_kernels import Packing, Tokens, dense_backward, dense_forward, lse_dtype, token_kernel

__all__ = [
    "Prefixes",
    "Rows",
    "assign",
    "concatenate",
    "extend_mask",
    "merged_attention",
    "stack",
]

_SHORT = 128  # virtual tokens up to which a kernel of our own is faster than a fused one for the prefix part


class Rows(NamedTuple):
    """Which rows of a batch see which prefix."""

    owner: Int[Tensor, " B"]  # the prefix that each row sees, -1 for none
    groups: Int[Tensor, "K R"]  # the rows that see each prefix, filled up with -1
    places: Int[Tensor, " B"]  # where each row stands in `groups`, flattened; 0 for a row that sees none


class Prefixes(NamedTuple):
    """The prefixes that a batch sees at one attention site. `rows` is `None` where all rows see the only one.

    `bias` is added to the scores of each virtual token: the logarithm of its gate, -inf where there is no such token.
    """

    key: Float[Tensor, "K P G D"]
    value: Float[Tensor, "K P G E"]
    bias: Float[Tensor, "K P G"] | None = None
    rows: Rows | None = None


def assign(owners: Sequence[int], device: torch.device | str = "cpu") -> Rows:
    """`owners`: for each row the number of its prefix, or -1."""
    members = [[i for i, owner in enumerate(owners) if owner == k] for k in range(max(owners) + 1)]
    most = max(map(len, members))
    places = [0] * len(owners)
    for k, own in enumerate(members):
        for r, i in enumerate(own):
            places[i] = k * most + r
    groups = [own + [-1] * (most - len(own)) for own in members]
    return Rows(*(torch.tensor(numbers, device=device) for numbers in (owners, groups, places)))


def stack(
    entries: Sequence[tuple[Float[Tensor, "_ G D"], Float[Tensor, "_ G E"], Float[Tensor, "_ G"] | None]],
    rows: Rows | None = None,
) -> Prefixes:
    """Prefixes of one site as one, filled up to the longest."""
    if len(entries) == 1:
        key, value, bias = entries[0]
        return Prefixes(key[None], value[None], None if bias is None else bias[None], rows)
    longest = max(len(key) for key, _, _ in entries)
    biases = None
    if any(bias is not None or len(key) < longest for key, _, bias in entries):
        own = [key.new_zeros(key.shape[:2]) if bias is None else bias for key, _, bias in entries]
        biases = torch.stack([_filled(bias, longest, -torch.inf) for bias in own])
    keys = torch.stack([_filled(key, longest) for key, _, _ in entries])
    values = torch.stack([_filled(value, longest) for _, value, _ in entries])
    return Prefixes(keys, values, biases, rows)


def _filled(tensor: Tensor, longest: int, value: float = 0.0) -> Tensor:
    missing = longest - len(tensor)  # `pad` by nothing would copy
    return pad(tensor, (*[0, 0] * (tensor.dim() - 1), 0, missing), value=value) if missing else tensor


# ----------------------------------------------------------------------------------------------- the reference path


def concatenate(
    key: Float[Tensor, "B G S D"], value: Float[Tensor, "B G S E"], prefixes: Prefixes
) -> tuple[Float[Tensor, "B G N D"], Float[Tensor, "B G N E"], Float[Tensor, "B G P"] | None]:
    """Put each row's prefix in front of its keys and values.

    Returns the longer keys and values, and the score bias of the `P` new columns (the log of each gate, the lowest
    number where a row has no virtual token), or `None` where nothing is gated and every row has all of them.
    """

    def for_each_row(tensor: Tensor, fill: float) -> Tensor:
        if prefixes.rows is None:
            return tensor.expand(len(key), *tensor.shape[1:])
        return torch.cat([tensor, torch.full_like(tensor[:1], fill)])[prefixes.rows.owner]

    new_key = for_each_row(prefixes.key.to(key.dtype), 0.0).transpose(1, 2)
    new_value = for_each_row(prefixes.value.to(value.dtype), 0.0).transpose(1, 2)
    bias = None
    if prefixes.bias is not None or prefixes.rows is not None:
        lowest = torch.finfo(key.dtype).min
        gates = prefixes.key.new_zeros(prefixes.key.shape[:3]) if prefixes.bias is None else prefixes.bias
        bias = for_each_row(gates.to(key.dtype).clamp_min(lowest), lowest).transpose(1, 2)
    return torch.cat([new_key, key], 2), torch.cat([new_value, value], 2), bias


def extend_mask(
    mask: Tensor | None,
    bias: Float[Tensor, "B G P"] | None,
    query: Float[Tensor, "B H T D"],
    num_tokens: int,
    num_virtual_tokens: int,
    is_causal: bool,
) -> Float[Tensor, "#B #H T N"] | None:
    """The additive mask over [prefix; tokens]: `bias` for the virtual tokens, `mask` (boolean or additive) for the rest.

    Without a mask, causal attention is square. (A kernel's own `is_causal` is aligned to the upper left and would be wrong
    as soon as the virtual tokens make the keys outnumber the queries.)
    """
    length, lowest = query.shape[2], torch.finfo(query.dtype).min
    if mask is None:
        if bias is None and (not is_causal or length == 1):
            return None
        mask = torch.ones(1, 1, length, num_tokens, dtype=torch.bool, device=query.device)
        if is_causal and length > 1:
            assert length == num_tokens, "causal attention must be square"
            mask = mask.tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
    if bias is None:
        return pad(mask, (num_virtual_tokens, 0))
    heads = bias.repeat_interleave(query.shape[1] // bias.shape[1], dim=1)[:, :, None].expand(-1, -1, length, -1)
    return torch.cat([heads.to(mask.dtype), mask.expand(*heads.shape[:3], -1)], -1)


# -------------------------------------------------------------------------------------------------- the merged path


def merged_attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S E"],
    prefixes: Prefixes | None,
    *,
    scale: float,
    mask: Bool[Tensor, "#B #H T S"] | Float[Tensor, "#B #H T S"] | None = None,
    is_causal: bool = False,
    packing: Packing | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H T E"]:
    """softmax([query @ prefix_key + bias; query @ key + mask]) @ [prefix_value; value], exactly, without concatenating.

    Prefixes are dense and unmasked; with `None` tokens see each other alone. `is_causal` needs as many queries as keys and no
    `mask`. With `packing` attention is causal inside each document, at most `window` tokens back. Needs
    `has_token_kernel(query, value, mask)`.
    """
    assert not is_causal or (mask is None and query.shape[2] == key.shape[2]), "causal attention must be square"
    assert packing is None or mask is None, "packed documents have no mask"
    assert window is None or packing is not None, "only packed documents have a window"
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)
    how = Tokens(mask, is_causal, scale, packing, window)
    part = (None,) * 4 if prefixes is None else (prefixes.rows, prefixes.key, prefixes.value, prefixes.bias)
    return _Merged.apply(query, key, value, how, *part)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, how, rows, prefix_key, prefix_value, bias):
        prefixes = Prefixes(prefix_key, prefix_value, bias, rows)
        output, lse, context = token_kernel(query, how).forward(query, key, value, how)
        lse, part_context = lse.to(lse_dtype(query)), ()
        if prefix_key is None:
            merged, total = output, lse
        elif _has_kernel_of_our_own(query, prefixes):
            from . import triton_kernels

            owner = None if rows is None else rows.owner
            merged, total = triton_kernels.merge_prefix(
                query, prefix_key, prefix_value, bias, owner, output, lse, how.scale
            )
        else:
            part_output, part_lse, part_context = _prefix_forward(query, prefixes, how.scale)
            total = torch.logaddexp(lse, part_lse)
            # A query that sees nothing at all (padding in a row without a prefix) gets output 0 and gradient 0.
            total = total.masked_fill(total == -torch.inf, 0.0)
            merged = output * (lse - total).exp()[..., None].to(output.dtype)
            merged = merged + part_output * (part_lse - total).exp()[..., None].to(output.dtype)
        ctx.save_for_backward(query, key, value, merged, total, prefix_key, prefix_value, bias)
        ctx.how, ctx.rows, ctx.context, ctx.part_context = how, rows, context, part_context
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        query, key, value, output, lse, prefix_key, prefix_value, bias = ctx.saved_tensors
        prefixes, scale = Prefixes(prefix_key, prefix_value, bias, ctx.rows), ctx.how.scale
        if any(ctx.needs_input_grad[:3]):
            saved = grad, query, key, value, output, lse
            grad_query, grad_key, grad_value = token_kernel(query, ctx.how).backward(*saved, ctx.how, ctx.context)
        else:  # the first layer: nothing before it is trained
            grad_query, grad_key, grad_value = torch.zeros_like(query), None, None
        if prefix_key is None:
            return grad_query, grad_key, grad_value, *(None,) * 5
        if _has_kernel_of_our_own(query, prefixes):
            from . import triton_kernels

            owner, groups = (None, None) if ctx.rows is None else ctx.rows[:2]
            part_grads = triton_kernels.merge_prefix_backward(
                grad, query, prefix_key, prefix_value, bias, owner, groups, output, lse, grad_query, scale
            )
        else:
            part_query, *part_grads = _prefix_backward(grad, query, output, lse, prefixes, scale, ctx.part_context)
            grad_query = grad_query + part_query
        return grad_query, grad_key, grad_value, None, None, *part_grads


# ------------------------------------------------------------------------------------------------- the prefix part


def _has_kernel_of_our_own(query: Tensor, prefixes: Prefixes) -> bool:
    return query.device.type == "cuda" and not _is_long(prefixes)


def _is_long(prefixes: Prefixes) -> bool:
    """Whether the prefix part is large enough for a fused kernel, and plain enough: one prefix, without a bias."""
    return prefixes.key.shape[1] > _SHORT and prefixes.rows is None and prefixes.bias is None


def _prefix_forward(query: Tensor, prefixes: Prefixes, scale: float) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output `[B, H, T, E]` and lse `[B, H, T]` of attention to the prefixes alone, and what the backward needs besides."""
    if _is_long(prefixes):
        how = Tokens(None, False, scale)
        output, lse, context = token_kernel(query, how).forward(_one_row(query), *_as_tokens(prefixes), how)
        return _all_rows(output, query), _all_rows(lse, query), context
    output, lse = dense_forward(_take(query, prefixes.rows), prefixes.key, prefixes.value, prefixes.bias, scale)
    return _put(output, prefixes.rows, 0.0), _put(lse, prefixes.rows, -torch.inf), ()


def _prefix_backward(grad, query, output, lse, prefixes: Prefixes, scale: float, context: tuple[Tensor, ...]):
    """Gradients of queries, keys, values and bias, given the merged output and lse."""
    rows = prefixes.rows
    if _is_long(prefixes):
        how = Tokens(None, False, scale)
        saved = (_one_row(tensor) for tensor in (grad, query))
        part_query, part_key, part_value = token_kernel(query, how).backward(
            *saved, *_as_tokens(prefixes), _one_row(output), _one_row(lse), how, context
        )
        return _all_rows(part_query, query), part_key.transpose(1, 2), part_value.transpose(1, 2), None
    delta = (grad.to(lse.dtype) * output).sum(-1)
    own_lse = _take(lse, rows)
    if rows is not None:  # where a group is filled up, nothing is seen
        own_lse = own_lse.masked_fill((rows.groups < 0).flatten()[:, None, None], torch.inf)
    taken = _take(grad, rows), _take(query, rows), own_lse, _take(delta, rows)
    part_query, *part_grads = dense_backward(*taken, prefixes.key, prefixes.value, prefixes.bias, scale)
    return _put(part_query, rows, 0.0), *part_grads


def _take(tensor: Tensor, rows: Rows | None) -> Tensor:
    """[B, ...] -> [K * R, ...]: the rows of the first prefix, of the second, and so on."""
    return tensor if rows is None else tensor.index_select(0, rows.groups.clamp_min(0).flatten())


def _put(tensor: Tensor, rows: Rows | None, none: float) -> Tensor:
    """[K * R, ...] -> [B, ...], `none` where a row sees no prefix."""
    if rows is None:
        return tensor
    unseeing = (rows.owner < 0).view(-1, *[1] * (tensor.dim() - 1))
    return tensor.index_select(0, rows.places).masked_fill(unseeing, none)


def _one_row(tensor: Tensor) -> Tensor:
    """[B, H, T, ...] -> [1, H, B * T, ...]: all queries as one row, so that the prefix is never repeated."""
    return tensor.transpose(1, 2).reshape(1, -1, tensor.shape[1], *tensor.shape[3:]).transpose(1, 2)


def _all_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_one_row`."""
    batch, heads, length = like.shape[:3]
    return tensor.transpose(1, 2).reshape(batch, length, heads, *tensor.shape[3:]).transpose(1, 2)


def _as_tokens(prefixes: Prefixes) -> tuple[Tensor, Tensor]:
    return prefixes.key.transpose(1, 2), prefixes.value.transpose(1, 2)
