"""Attention over a prefix and the real tokens, as pure tensor functions.

The softmax over [prefix; tokens] splits exactly: each part is computed on its own, and the parts are merged with
weights from their log-sum-exps (lse). `merged_attention` does this, with a fused kernel for the token part and dense
products for the short prefix part. `concatenate` and `extend_mask` are the reference path: they put the prefix in
front of the keys and values for any attention function, and every fast path is tested against them.

Differentiating through the lse that a fused kernel returns is silently wrong: it carries no gradient. So the merge is
one `autograd.Function` whose backward calls the backward of each part with the *merged* output and the *merged* lse;
then `exp(score - lse)` and `delta = rowsum(grad * output)` are those of the joint softmax, and the parts' query
gradients add up.

Notation: B batch, T query tokens, S key tokens, P virtual tokens, H query heads, G key/value heads, D and E key and
value head dimensions, R the batch rows that see one prefix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

__all__ = ["PrefixPart", "concatenate", "extend_mask", "has_token_kernel", "merged_attention"]


class PrefixPart(NamedTuple):
    """One prefix at one attention site, and the batch rows that see it (`None`: every row).

    `bias` is added to the scores of each virtual token: the logarithm of its gate.
    """

    key: Float[Tensor, "P G D"]
    value: Float[Tensor, "P G E"]
    bias: Float[Tensor, "P G"] | None = None
    rows: Int[Tensor, " R"] | None = None


# ----------------------------------------------------------------------------------------------- the reference path


def concatenate(
    key: Float[Tensor, "B G S D"], value: Float[Tensor, "B G S E"], parts: Sequence[PrefixPart]
) -> tuple[Float[Tensor, "B G N D"], Float[Tensor, "B G N E"], Float[Tensor, "B G P"] | None]:
    """Put each row's prefix in front of its keys and values, filled up on the left to the longest prefix.

    Returns the longer keys and values, and the score bias of the `P` new columns (the log of each gate, the lowest
    number where a row has no virtual token), or `None` where nothing is gated and nothing is filled.
    """
    longest = max(part.key.shape[0] for part in parts)
    owner = torch.full((len(key),), len(parts), device=key.device)
    for i, part in enumerate(parts):
        owner[slice(None) if part.rows is None else part.rows] = i

    def stack(blocks: list[Tensor], like: Tensor, fill: float) -> Tensor:
        filled = [pad(b.transpose(0, 1).to(like.dtype), (0, 0, longest - len(b), 0), value=fill) for b in blocks]
        return torch.stack([*filled, torch.full_like(filled[0], fill)])[owner]

    new_key = stack([part.key for part in parts], key, 0.0)
    new_value = stack([part.value for part in parts], value, 0.0)
    bias = None
    if any(part.bias is not None or part.rows is not None for part in parts):
        gates = [part.key.new_zeros(part.key.shape[:2]) if part.bias is None else part.bias for part in parts]
        lowest = torch.finfo(key.dtype).min
        bias = stack([gate[..., None] for gate in gates], key, lowest).squeeze(-1)
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


def has_token_kernel(query: Float[Tensor, "B H T D"], value: Float[Tensor, "B G S E"], mask: Tensor | None) -> bool:
    """Whether a fused kernel that returns its lse can compute the token part."""
    if query.shape[-1] != value.shape[-1] or (mask is not None and mask.requires_grad):
        return False
    if query.device.type == "cpu":
        return query.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if query.device.type == "cuda":
        half = query.dtype in (torch.bfloat16, torch.float16)
        return half and mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return False


def merged_attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S E"],
    parts: Sequence[PrefixPart],
    *,
    scale: float,
    mask: Bool[Tensor, "#B #H T S"] | Float[Tensor, "#B #H T S"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H T E"]:
    """softmax([query @ prefix_key + bias; query @ key + mask]) @ [prefix_value; value], exactly, without concatenating.

    The prefixes are dense and unmasked. `is_causal` needs as many queries as keys and no `mask`. Needs
    `has_token_kernel(query, value, mask)`.
    """
    assert not is_causal or (mask is None and query.shape[2] == key.shape[2]), "causal attention must be square"
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)
    tensors = [tensor for part in parts for tensor in part[:3]]
    rows = tuple(part.rows for part in parts)
    return _Merged.apply(query, key, value, mask, is_causal, scale, rows, *tensors)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal, scale, rows, *tensors):
        output, lse, context = _tokens_forward(query, key, value, mask, is_causal, scale)
        lse = lse.to(_lse_dtype(query))
        parts = _parts(tensors, rows)
        partial = []
        for part in parts:
            part_output, part_lse = _prefix_forward(_take(query, part.rows), part, scale)
            if part.rows is not None:  # rows that do not see this prefix give it weight exp(-inf)
                part_output = torch.zeros_like(output).index_copy(0, part.rows, part_output)
                part_lse = torch.full_like(lse, -torch.inf).index_copy(0, part.rows, part_lse)
            partial.append((part_output, part_lse))
        total = lse
        for _, part_lse in partial:
            total = torch.logaddexp(total, part_lse)
        # A query that sees nothing at all (padding in a row without a prefix) gets output 0 and gradient 0.
        total = total.masked_fill(total == -torch.inf, 0.0)
        merged = output * (lse - total).exp()[..., None].to(output.dtype)
        for part_output, part_lse in partial:
            merged = merged + part_output * (part_lse - total).exp()[..., None].to(output.dtype)
        ctx.save_for_backward(query, key, value, mask, merged, total, *tensors)
        ctx.is_causal, ctx.scale, ctx.rows, ctx.context = is_causal, scale, rows, context
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # how autograd calls it
        query, key, value, mask, output, lse, *tensors = ctx.saved_tensors
        grad_query, grad_key, grad_value = _tokens_backward(
            grad, query, key, value, output, lse, mask, ctx.is_causal, ctx.scale, ctx.context
        )
        delta = (grad.to(lse.dtype) * output).sum(-1)
        grads = []
        for part in _parts(tensors, ctx.rows):
            own_grad, own_query, own_lse, own_delta = (_take(t, part.rows) for t in (grad, query, lse, delta))
            part_query, *part_grads = _prefix_backward(own_grad, own_query, own_lse, own_delta, part, ctx.scale)
            grad_query = (
                grad_query + part_query if part.rows is None else grad_query.index_add(0, part.rows, part_query)
            )
            grads.extend(part_grads)
        return grad_query, grad_key, grad_value, None, None, None, None, *grads


def _parts(tensors: Sequence[Tensor | None], rows: Sequence[Tensor | None]) -> list[PrefixPart]:
    return [PrefixPart(*tensors[3 * i : 3 * i + 3], rows=r) for i, r in enumerate(rows)]  # pyright: ignore[reportArgumentType]


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


# ------------------------------------------------------------------------------- the token part: PyTorch's own kernels


def _tokens_forward(query, key, value, mask, is_causal, scale):
    """The output, the lse (-inf where a query sees no key), and what the backward needs besides."""
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        if mask is not None:  # for a query without keys this kernel returns an lse of 0
            lse = lse.masked_fill((mask == -torch.inf).all(-1).expand_as(lse), -torch.inf)
        return output, lse, ()
    output, lse, *context = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, False, scale=scale
    )
    return output, lse, tuple(context[:6])


def _tokens_backward(grad, query, key, value, output, lse, mask, is_causal, scale, context):
    if query.device.type == "cpu":  # in bfloat16 this kernel takes 2.4 times as long as in float32
        dtype = _lse_dtype(query)
        grad, *saved = (tensor.to(dtype) for tensor in (grad, query, key, value, output, lse))
        mask = mask if mask is None else mask.to(dtype)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *saved, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return tuple(gradient.to(query.dtype) for gradient in grads)
    cum_q, cum_k, max_q, max_k, seed, offset = context
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse, cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=scale
    )


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, query.dtype)


# ------------------------------------------------------------------------- the prefix part: dense, batch folded away


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """[R, H, T, D] -> [G, R*(H/G)*T, D]: the batch becomes part of the query axis, so the prefix is never repeated."""
    rows, heads, length = tensor.shape[:3]
    grouped = tensor.reshape(rows, groups, heads // groups, length, *tensor.shape[3:]).transpose(0, 1)
    return grouped.reshape(groups, rows * (heads // groups) * length, *tensor.shape[3:])


def _unfold(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold`, for a tensor with the rows, heads and length of `like`."""
    rows, heads, length = like.shape[:3]
    grouped = tensor.reshape(len(tensor), rows, heads // len(tensor), length, *tensor.shape[2:])
    return grouped.transpose(0, 1).reshape(rows, heads, length, *tensor.shape[2:])


def _scores(query: Tensor, part: PrefixPart, scale: float) -> tuple[Tensor, Tensor]:
    folded = _fold(query, part.key.shape[1])
    scores = torch.bmm(folded, part.key.permute(1, 2, 0)).to(_lse_dtype(query)) * scale
    if part.bias is not None:
        scores = scores + part.bias.t()[:, None]
    return folded, scores


def _prefix_forward(query: Tensor, part: PrefixPart, scale: float) -> tuple[Tensor, Tensor]:
    _, scores = _scores(query, part, scale)
    lse = scores.logsumexp(-1)
    output = torch.bmm((scores - lse[..., None]).exp().to(query.dtype), part.value.transpose(0, 1))
    return _unfold(output, query), _unfold(lse, query)


def _prefix_backward(grad, query, lse, delta, part: PrefixPart, scale: float):
    """Gradients of query, key, value, bias, given the lse and delta of the joint softmax."""
    groups = part.key.shape[1]
    folded, scores = _scores(query, part, scale)
    folded_grad = _fold(grad, groups)
    weights = (scores - _fold(lse, groups)[..., None]).exp()
    grad_value = torch.bmm(weights.to(grad.dtype).mT, folded_grad)
    grad_weights = torch.bmm(folded_grad, part.value.permute(1, 2, 0))
    grad_scores = weights * (grad_weights - _fold(delta, groups)[..., None])
    scaled = (grad_scores * scale).to(query.dtype)
    grad_query = torch.bmm(scaled, part.key.transpose(0, 1))
    grad_key = torch.bmm(scaled.mT, folded)
    grad_bias = None if part.bias is None else grad_scores.sum(1).t().to(part.bias.dtype)
    return _unfold(grad_query, query), grad_key.transpose(0, 1), grad_value.transpose(0, 1), grad_bias
