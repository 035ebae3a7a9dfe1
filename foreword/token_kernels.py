"""Attention of tokens among themselves by PyTorch's fused kernels: forward and backward as pairs, and their lse between.

`kernels` merges what they compute with attention to prefixes. Their backward takes the output and the log-sum-exp (lse)
of the merged whole; `scaled_dot_product_attention` would hide both.

Notation: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D and E key and value head dimensions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Packing", "Tokens", "dense_backward", "dense_forward", "has_token_kernel", "lse_dtype", "token_kernel"]


class Packing(NamedTuple):
    """Documents end to end: flattened over the rows of a batch, document i holds tokens `starts[i]` to `starts[i + 1] - 1`."""

    starts: Int[Tensor, " N"]  # int32, on the device of the tokens
    longest: int  # no document has more tokens


class Tokens(NamedTuple):
    """How tokens see each other. Packed ones causally inside their document, at most `window` tokens back."""

    mask: Tensor | None  # [#B, #H, T, S], additive
    is_causal: bool
    scale: float
    packing: Packing | None = None
    window: int | None = None


class Kernel(NamedTuple):
    """`forward(query, key, value, how)` gives the output `[B, H, T, E]`, the lse `[B, H, T]` (-inf where a query sees no key)
    and what the backward needs besides. `backward(grad, query, key, value, output, lse, how, context)` gives the gradients of query,
    key and value, where output and lse may be those of a softmax over more than these tokens."""

    forward: Callable[..., tuple[Tensor, Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, ...]]


def has_token_kernel(
    query: Float[Tensor, "B H T D"], value: Float[Tensor, "B G S E"], mask: Tensor | None, packed: bool = False
) -> bool:
    """Whether there is a kernel for these."""
    if query.shape[-1] != value.shape[-1] or (mask is not None and mask.requires_grad):
        return False
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu":
        return not packed and (half or query.dtype in (torch.float32, torch.float64))
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.device.type == "cuda" and fits and (half or (query.dtype == torch.float32 and not packed))


def token_kernel(query: Tensor, how: Tokens) -> Kernel:
    """The fastest kernel of the device."""
    if query.device.type == "cpu":
        return _CPU
    if how.packing is not None:
        return _PACKED
    if query.shape[2] == 1 and (how.mask is None or how.mask.shape[1] == 1):
        return _ONE_TOKEN
    if how.mask is not None or query.dtype == torch.float32:
        return _EFFICIENT
    return _CUDNN if _prefers_cudnn(query.device.index or 0) else _FLASH


@torch.compiler.assume_constant_result
def _prefers_cudnn(device: int) -> bool:
    """On an H100 cuDNN takes two thirds of flash's time, forward and backward."""
    return torch.cuda.get_device_capability(device)[0] >= 9 and torch.backends.cudnn.is_available()


def lse_dtype(query: Tensor) -> torch.dtype:
    """The precision of scores and their sums."""
    return torch.promote_types(torch.float32, query.dtype)


# -------------------------------------------------------------------------------------------------------------- CPU


def _cpu_forward(query, key, value, how: Tokens):
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, how.is_causal, attn_mask=how.mask, scale=how.scale
    )
    if how.mask is not None:  # for a query without keys this kernel returns an lse of 0
        lse = lse.masked_fill((how.mask == -torch.inf).all(-1).expand_as(lse), -torch.inf)
    return output, lse, ()


def _cpu_backward(grad, query, key, value, output, lse, how: Tokens, context):
    dtype = lse_dtype(query)  # in bfloat16 this kernel takes 2.4 times as long as in float32
    grad, *saved = (tensor.to(dtype) for tensor in (grad, query, key, value, output, lse))
    mask = how.mask if how.mask is None else how.mask.to(dtype)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *saved, 0.0, how.is_causal, attn_mask=mask, scale=how.scale
    )
    return tuple(gradient.to(query.dtype) for gradient in grads)


_CPU = Kernel(_cpu_forward, _cpu_backward)

# ------------------------------------------------------------------------------------------------------- whole rows


def _cudnn_forward(query, key, value, how: Tokens):
    output, lse, *context = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, how.is_causal, False, scale=how.scale
    )
    return output, lse.squeeze(-1), tuple(context[:6])


def _cudnn_backward(grad, query, key, value, output, lse, how: Tokens, context):
    cum_q, cum_k, max_q, max_k, seed, offset = context
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, lse.unsqueeze(-1), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0,
        how.is_causal, scale=how.scale,
    )  # fmt: skip


_CUDNN = Kernel(_cudnn_forward, _cudnn_backward)


def _flash_forward(query, key, value, how: Tokens):
    output, lse, *context = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, how.is_causal, False, scale=how.scale
    )
    return output, lse, tuple(context[:6])


def _flash_backward(grad, query, key, value, output, lse, how: Tokens, context):
    cum_q, cum_k, max_q, max_k, seed, offset = context
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        lse,
        cum_q,
        cum_k,
        max_q,
        max_k,
        0.0,
        how.is_causal,
        seed,
        offset,
        scale=how.scale,
    )


_FLASH = Kernel(_flash_forward, _flash_backward)


def _efficient_forward(query, key, value, how: Tokens):
    output, lse, *context = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        *_for_each_head(query, key, value),
        _aligned(how.mask, query, key),
        True,
        0.0,
        how.is_causal,
        scale=how.scale,
    )
    return output, lse[..., : query.shape[2]], tuple(context)


def _efficient_backward(grad, query, key, value, output, lse, how: Tokens, context):
    padded = pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    wanted = [True, True, True, False]
    grad_query, *grads, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, *_for_each_head(query, key, value), _aligned(how.mask, query, key), output, padded, *context, 0.0,
        wanted, how.is_causal, scale=how.scale,
    )  # fmt: skip
    grad_key, grad_value = (gradient.unflatten(1, (key.shape[1], -1)).sum(2) for gradient in grads)
    return grad_query, grad_key, grad_value


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """This kernel knows no grouped heads."""
    each = query.shape[1] // key.shape[1]
    return (key, value) if each == 1 else (key.repeat_interleave(each, 1), value.repeat_interleave(each, 1))


def _aligned(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """With rows that begin at multiples of 16 numbers, as this kernel needs them, and finite, as it makes -inf nan."""
    if mask is None:
        return None
    length = mask.shape[-1]
    finite = mask.to(query.dtype).clamp_min(torch.finfo(query.dtype).min)
    return pad(finite, (0, -length % 16))[..., :length].expand(*query.shape[:3], key.shape[2])


_EFFICIENT = Kernel(_efficient_forward, _efficient_backward)

# ------------------------------------------------------------------------------------------------- packed documents


def _packed_forward(query, key, value, how: Tokens):
    assert how.packing is not None
    flat = [_end_to_end(tensor) for tensor in (query, key, value)]
    output, lse, *context = torch.ops.aten._flash_attention_forward(
        *flat, how.packing.starts, how.packing.starts, how.packing.longest, how.packing.longest, 0.0, True, False,
        scale=how.scale, **_window(how),
    )  # fmt: skip
    return _apart(output, query), lse.unflatten(1, (len(query), -1)).transpose(0, 1), tuple(context[:2])


def _packed_backward(grad, query, key, value, output, lse, how: Tokens, context):
    assert how.packing is not None
    flat = [_end_to_end(tensor) for tensor in (grad, query, key, value, output)]
    by_head = lse.transpose(0, 1).reshape(lse.shape[1], -1)
    starts, longest = how.packing.starts, how.packing.longest
    grads = torch.ops.aten._flash_attention_backward(
        *flat, by_head, starts, starts, longest, longest, 0.0, True, *context, scale=how.scale, **_window(how)
    )
    return tuple(_apart(gradient, like) for gradient, like in zip(grads, (query, key, value), strict=True))


def _end_to_end(tensor: Tensor) -> Tensor:
    """[B, H, T, D] -> [B * T, H, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _apart(tensor: Tensor, like: Tensor) -> Tensor:
    """[B * T, H, D] -> [B, H, T, D]."""
    return tensor.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def _window(how: Tokens) -> dict[str, int]:
    return {} if how.window is None else {"window_size_left": how.window - 1, "window_size_right": 0}


_PACKED = Kernel(_packed_forward, _packed_backward)

# ----------------------------------------------------------------------------------------------------- plain products


def dense_forward(
    query: Float[Tensor, "N H T D"],
    key: Float[Tensor, "K S G D"],
    value: Float[Tensor, "K S G E"],
    bias: Float[Tensor, "K S G"] | None,
    scale: float,
) -> tuple[Float[Tensor, "N H T E"], Float[Tensor, "N H T"]]:
    """Every query sees all of its keys: the first N / K rows the first keys, and so on. Output and lse."""
    scores = _scores(_fold(query, key), key, bias, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp().to(query.dtype)
    output = torch.bmm(weights, value.transpose(1, 2).flatten(0, 1))
    return _unfold(output, query, key), _unfold(lse, query, key)


def dense_backward(grad, query, lse, delta, key, value, bias, scale: float):
    """Gradients of query, key, value and bias, given lse and `delta = rowsum(grad * output)` of the whole softmax."""
    folded, folded_grad = _fold(query, key), _fold(grad, key)
    weights = (_scores(folded, key, bias, scale) - _fold(lse, key)[..., None]).exp()
    grad_value = torch.bmm(weights.to(grad.dtype).mT, folded_grad)
    grad_weights = torch.bmm(folded_grad, value.permute(0, 2, 3, 1).flatten(0, 1))
    grad_scores = weights * (grad_weights - _fold(delta, key)[..., None])
    scaled = (grad_scores * scale).to(query.dtype)
    grad_query = torch.bmm(scaled, key.transpose(1, 2).flatten(0, 1))
    grad_key = torch.bmm(scaled.mT, folded)
    count, _, groups, _ = key.shape

    def by_key(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (count, groups)).transpose(1, 2)

    grad_bias = None if bias is None else by_key(grad_scores.sum(1)).to(bias.dtype)
    return _unfold(grad_query, query, key), by_key(grad_key), by_key(grad_value), grad_bias


def _scores(folded: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    turned, dtype = key.permute(0, 2, 3, 1).flatten(0, 1), lse_dtype(folded)
    if folded.device.type == "cuda" and folded.dtype != dtype:
        scores = torch.bmm(folded, turned, out_dtype=dtype) * scale
    else:
        scores = torch.bmm(folded, turned).to(dtype) * scale
    return scores if bias is None else scores + bias.transpose(1, 2).flatten(0, 1)[:, None]


def _fold(tensor: Tensor, key: Tensor) -> Tensor:
    """[N, H, T, D] -> [K * G, (N / K) * (H / G) * T, D]: the rows become part of the query axis, so no key is repeated."""
    count, groups = key.shape[0], key.shape[2]
    apart = tensor.unflatten(1, (groups, -1)).unflatten(0, (count, -1))  # [K, N / K, G, H / G, T, D]
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 3)


def _unfold(tensor: Tensor, like: Tensor, key: Tensor) -> Tensor:
    """The inverse of `_fold`, for a tensor with the rows, heads and length of `like`."""
    count, groups = key.shape[0], key.shape[2]
    rows, heads, length = like.shape[:3]
    apart = tensor.unflatten(1, (rows // count, heads // groups, length)).unflatten(0, (count, groups))
    return apart.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _one_token_forward(query, key, value, how: Tokens):
    output, lse = dense_forward(query, key.transpose(1, 2), value.transpose(1, 2), _as_bias(how.mask, key), how.scale)
    return output, lse, ()


def _one_token_backward(grad, query, key, value, output, lse, how: Tokens, context):
    delta = (grad.to(lse.dtype) * output).sum(-1)
    own = key.transpose(1, 2), value.transpose(1, 2), _as_bias(how.mask, key)
    grad_query, grad_key, grad_value, _ = dense_backward(grad, query, lse, delta, *own, how.scale)
    return grad_query, grad_key.transpose(1, 2), grad_value.transpose(1, 2)


def _as_bias(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """[#B, 1, 1, S] -> [B, S, G]."""
    return None if mask is None else mask[:, 0, 0, :, None].expand(len(key), -1, key.shape[1])


_ONE_TOKEN = Kernel(_one_token_forward, _one_token_backward)  # its row's keys are what a prefix that nobody shares is
