"""Triton kernels for GPUs: attention to prefixes merged with a token part, and the cross-entropy of a large vocabulary.

Each is bound by memory: it reads its inputs once and writes its outputs once, where products of whole matrices would write
and read the scores several times. Imported only where they are used, as Triton is not installed everywhere.

Notation as in `kernels`: B rows, T query tokens, H query heads, G key/value heads, D and E key and value head dimensions,
K prefixes of P virtual tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_", "merge_prefix", "merge_prefix_backward"]

_PROGRAMS = 264  # that keep a large GPU busy: two for each of 132 multiprocessors


# -------------------------------------------------------------------------------------------------------- attention


@triton.jit
def _scores(q, K, BIAS, where_k, where_bias, cols, dims, P, D, scale, skp, sbp, HAS_BIAS: tl.constexpr):
    """Scores [tokens, virtual tokens] of one head, and the keys [D, virtual tokens] that they were made of."""
    k = tl.load(
        K + where_k + cols[None, :] * skp + dims[:, None], mask=(cols < P)[None, :] & (dims < D)[:, None], other=0.0
    )
    s = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_BIAS:
        s += tl.load(BIAS + where_bias + cols * sbp, mask=cols < P, other=0.0)[None, :]
    return tl.where((cols < P)[None, :], s, float("-inf")), k


@triton.jit
def _forward(
    Q, K, V, BIAS, OWNER, OWN, LSE, OUT, TOTAL, scale,
    H, G, T, P, D, E,
    sqb, sqh, sqt, skk, skp, skg, svk, svp, svg, sbk, sbp, sbg, sob, soh, sot, slb, slh, slt, sub, suh, sut,
    HAS_BIAS: tl.constexpr, HAS_OWNER: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // G)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    dims, outs, real = tl.arange(0, BD), tl.arange(0, BE), rows < T
    owner = tl.zeros((), tl.int64)
    if HAS_OWNER:
        owner = tl.load(OWNER + b)
    at = rows.to(tl.int64)[:, None]
    q = tl.load(Q + b * sqb + h * sqh + at * sqt + dims[None, :], mask=real[:, None] & (dims < D)[None, :], other=0.0)
    top, mass, acc = (
        tl.full((BT,), float("-inf"), tl.float32),
        tl.zeros((BT,), tl.float32),
        tl.zeros((BT, BE), tl.float32),
    )
    for start in range(0, tl.where(owner < 0, 0, P), BP):
        cols = start + tl.arange(0, BP)
        s, _ = _scores(
            q, K, BIAS, owner * skk + g * skg, owner * sbk + g * sbg, cols, dims, P, D, scale, skp, sbp, HAS_BIAS
        )
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p, decay = tl.exp(s - safe[:, None]), tl.exp(top - safe)
        v = tl.load(
            V + owner * svk + g * svg + cols[:, None] * svp + outs[None, :],
            mask=(cols < P)[:, None] & (outs < E)[None, :],
            other=0.0,
        )
        mass = mass * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    own = tl.load(LSE + b * slb + h * slh + rows * slt, mask=real, other=0.0).to(tl.float32)
    highest = tl.maximum(own, top)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = safe + tl.log(tl.exp(own - safe) + mass * tl.exp(top - safe))
    total = tl.where(highest == float("-inf"), 0.0, total)  # a query that sees nothing at all gets output 0
    keep = real[:, None] & (outs < E)[None, :]
    o = tl.load(OWN + b * sob + h * soh + at * sot + outs[None, :], mask=keep, other=0.0).to(tl.float32)
    o = tl.where((own == float("-inf"))[:, None], 0.0, o * tl.exp(own - total)[:, None])
    o += acc * tl.exp(top - total)[:, None]
    tl.store(OUT + b * sub + h * suh + at * sut + outs[None, :], o.to(OUT.dtype.element_ty), mask=keep)
    tl.store(TOTAL + b * slb + h * slh + rows * slt, total, mask=real)


@triton.jit
def _query_backward(
    Q, K, V, BIAS, OWNER, OUT, LSE, GRAD, DELTA, DQ, scale,
    H, G, T, P, D, E,
    sqb, sqh, sqt, skk, skp, skg, svk, svp, svg, sbk, sbp, sbg, sob, soh, sot, slb, slh, slt, sgb, sgh, sgt, sdb, sdh, sdt,
    HAS_BIAS: tl.constexpr, HAS_OWNER: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Add the prefix's part to the gradient of the queries, which holds the tokens' part; store delta = rowsum(dO * O)."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // G)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    dims, outs, real = tl.arange(0, BD), tl.arange(0, BE), rows < T
    owner = tl.zeros((), tl.int64)
    if HAS_OWNER:
        owner = tl.load(OWNER + b)
    at = rows.to(tl.int64)[:, None]
    keep = real[:, None] & (outs < E)[None, :]
    grad = tl.load(GRAD + b * sgb + h * sgh + at * sgt + outs[None, :], mask=keep, other=0.0)
    o = tl.load(OUT + b * sob + h * soh + at * sot + outs[None, :], mask=keep, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + (b * H + h) * T + rows, delta, mask=real)
    inside = real[:, None] & (dims < D)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + at * sqt + dims[None, :], mask=inside, other=0.0)
    lse = tl.load(LSE + b * slb + h * slh + rows * slt, mask=real, other=0.0).to(tl.float32)
    where = DQ + b * sdb + h * sdh + at * sdt + dims[None, :]
    dq = tl.zeros((BT, BD), tl.float32)
    for start in range(0, tl.where(owner < 0, 0, P), BP):
        cols = start + tl.arange(0, BP)
        s, k = _scores(
            q, K, BIAS, owner * skk + g * skg, owner * sbk + g * sbg, cols, dims, P, D, scale, skp, sbp, HAS_BIAS
        )
        v = tl.load(
            V + owner * svk + g * svg + cols[None, :] * svp + outs[:, None],
            mask=(cols < P)[None, :] & (outs < E)[:, None],
            other=0.0,
        )
        ds = tl.exp(s - lse[:, None]) * (tl.dot(grad, v, input_precision="ieee") - delta[:, None]) * scale
        dq += tl.dot(ds.to(k.dtype), tl.trans(k), input_precision="ieee")
    dq += tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, dq.to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def _prefix_backward(
    Q, K, V, BIAS, GROUPS, LSE, GRAD, DELTA, DK, DV, DB, scale,
    H, G, T, P, D, E, R, PREFIXES, ITEMS,
    sqb, sqh, sqt, skk, skp, skg, svk, svp, svg, sbk, sbp, sbg, slb, slh, slt, sgb, sgh, sgt,
    HAS_BIAS: tl.constexpr, HAS_GROUPS: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of keys, values and bias: each program takes `ITEMS` of the blocks of queries that see
    its virtual tokens, which are those of R rows, H / G heads and T / BT blocks."""
    number, g = tl.program_id(1) // G, tl.program_id(1) % G
    cols = tl.program_id(0) * BP + tl.arange(0, BP)
    dims, outs = tl.arange(0, BD), tl.arange(0, BE)
    dk, dv, db = tl.zeros((BP, BD), tl.float32), tl.zeros((BP, BE), tl.float32), tl.zeros((BP,), tl.float32)
    blocks = tl.cdiv(T, BT)
    each = H // G
    v = tl.load(
        V + number.to(tl.int64) * svk + g * svg + cols[None, :] * svp + outs[:, None],
        mask=(cols < P)[None, :] & (outs < E)[:, None],
        other=0.0,
    )
    first = tl.program_id(2) * ITEMS
    for item in range(first, tl.minimum(first + ITEMS, R * each * blocks)):
        b = (item // (each * blocks)).to(tl.int64)
        if HAS_GROUPS:
            b = tl.load(GROUPS + number * R + b)
        h = g * each + item // blocks % each
        rows = item % blocks * BT + tl.arange(0, BT)
        real = rows < tl.where(b < 0, 0, T)
        at = rows.to(tl.int64)[:, None]
        q = tl.load(
            Q + b * sqb + h * sqh + at * sqt + dims[None, :], mask=real[:, None] & (dims < D)[None, :], other=0.0
        )
        grad = tl.load(
            GRAD + b * sgb + h * sgh + at * sgt + outs[None, :], mask=real[:, None] & (outs < E)[None, :], other=0.0
        )
        lse = tl.load(LSE + b * slb + h * slh + rows * slt, mask=real, other=0.0).to(tl.float32)
        delta = tl.load(DELTA + (b * H + h) * T + rows, mask=real, other=0.0)
        s, _ = _scores(
            q, K, BIAS, number.to(tl.int64) * skk + g * skg, number * sbk + g * sbg, cols, dims, P, D, scale, skp, sbp, HAS_BIAS
        )  # fmt: skip
        p = tl.where(real[:, None], tl.exp(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, v, input_precision="ieee") - delta[:, None])
        dv += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
        dk += tl.dot(tl.trans((ds * scale).to(q.dtype)), q, input_precision="ieee")
        if HAS_BIAS:
            db += tl.sum(ds, 0)
    part = (tl.program_id(2) * PREFIXES + number).to(tl.int64) * P * G
    place = part + cols * G + g
    tl.store(DK + place[:, None] * D + dims[None, :], dk, mask=(cols < P)[:, None] & (dims < D)[None, :])
    tl.store(DV + place[:, None] * E + outs[None, :], dv, mask=(cols < P)[:, None] & (outs < E)[None, :])
    if HAS_BIAS:
        tl.store(DB + place, db, mask=cols < P)


def _blocks(tokens: int, length: int, dim: int, value_dim: int) -> dict[str, int]:
    wide = max(dim, value_dim)
    return {
        "BT": min(max(16, triton.next_power_of_2(tokens)), 128 if wide <= 64 else 64 if wide <= 128 else 32),
        "BP": min(max(16, triton.next_power_of_2(length)), 64 if wide <= 128 else 32),
        "BD": max(16, triton.next_power_of_2(dim)),
        "BE": max(16, triton.next_power_of_2(value_dim)),
    }


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


@torch.library.custom_op("foreword::merge_prefix", mutates_args=())
def merge_prefix(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, owner: Tensor | None, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The token part's `output` `[B, H, T, E]` and `lse` `[B, H, T]` merged with attention to prefixes.

    Args:
        query: `[B, H, T, D]`.
        key: `[K, P, G, D]`.
        value: `[K, P, G, E]`.
        bias: `[K, P, G]`, added to the scores.
        owner: `[B]`, which prefix each row sees; -1 for none. `None`: all see the only one.

    Returns:
        The merged output, laid out in memory as `[B, T, H, E]`, and the merged lse with the strides of `lse`.
    """
    b, h, t, d = query.shape
    _, p, g, e = value.shape
    merged = output.new_empty(b, t, h, e).transpose(1, 2)
    total = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)
    blocks = _blocks(t, p, d, e)
    _forward[(triton.cdiv(t, blocks["BT"]), b * h)](
        query, key, value, bias, owner, output, lse, merged, total, scale, h, g, t, p, d, e,
        *_strides(query, 3), *_strides(key, 3), *_strides(value, 3), *_strides(bias, 3), *_strides(output, 3),
        *_strides(lse, 3), *_strides(merged, 3), HAS_BIAS=bias is not None, HAS_OWNER=owner is not None, **blocks,
    )  # fmt: skip
    return merged, total


@merge_prefix.register_fake
def _(query, key, value, bias, owner, output, lse, scale):
    b, h, t, _ = query.shape
    return output.new_empty(b, t, h, value.shape[-1]).transpose(1, 2), torch.empty_strided(
        lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device
    )


@torch.library.custom_op("foreword::merge_prefix_backward", mutates_args={"grad_query"})
def _merge_prefix_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, owner: Tensor | None,
    groups: Tensor | None, output: Tensor, lse: Tensor, grad_query: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, h, t, d = query.shape
    k, p, g, e = value.shape
    blocks = _blocks(t, p, d, e)
    delta = torch.empty(b, h, t, dtype=torch.float32, device=query.device)
    shared = scale, h, g, t, p, d, e
    prefix_strides = *_strides(key, 3), *_strides(value, 3), *_strides(bias, 3)
    _query_backward[(triton.cdiv(t, blocks["BT"]), b * h)](
        query, key, value, bias, owner, output, lse, grad, delta, grad_query, *shared,
        *_strides(query, 3), *prefix_strides, *_strides(output, 3), *_strides(lse, 3), *_strides(grad, 3),
        *_strides(grad_query, 3), HAS_BIAS=bias is not None, HAS_OWNER=owner is not None, **blocks,
    )  # fmt: skip
    rows = b if groups is None else groups.shape[1]
    blocks["BT"] = min(blocks["BT"], 64)
    items, columns = rows * (h // g) * triton.cdiv(t, blocks["BT"]), triton.cdiv(p, blocks["BP"]) * k * g
    each = triton.cdiv(items, max(1, min(items, _PROGRAMS // columns)))
    parts = triton.cdiv(items, each)
    new = {"dtype": torch.float32, "device": query.device}
    grad_key, grad_value = torch.empty(parts, k, p, g, d, **new), torch.empty(parts, k, p, g, e, **new)
    grad_bias = None if bias is None else torch.empty(parts, k, p, g, **new)
    _prefix_backward[(triton.cdiv(p, blocks["BP"]), k * g, parts)](
        query, key, value, bias, groups, lse, grad, delta, grad_key, grad_value, grad_bias, *shared, rows, k, each,
        *_strides(query, 3), *prefix_strides, *_strides(lse, 3), *_strides(grad, 3),
        HAS_BIAS=bias is not None, HAS_GROUPS=groups is not None, **blocks,
    )  # fmt: skip
    summed_bias = key.new_empty(0) if grad_bias is None or bias is None else grad_bias.sum(0).to(bias.dtype)
    return grad_key.sum(0).to(key.dtype), grad_value.sum(0).to(value.dtype), summed_bias


@_merge_prefix_backward.register_fake
def _(grad, query, key, value, bias, owner, groups, output, lse, grad_query, scale):
    shapes = key.shape, value.shape, (0,) if bias is None else bias.shape
    return tuple(key.new_empty(shape) for shape in shapes)


def merge_prefix_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, owner: Tensor | None,
    groups: Tensor | None, output: Tensor, lse: Tensor, grad_query: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of keys, values and bias; the prefix's part is added to `grad_query` in place.

    Args:
        groups: `[K, R]`, the rows that see each prefix, filled up with -1; `None`: all see the only one.
        output, lse: merged.
    """
    grad_key, grad_value, grad_bias = _merge_prefix_backward(
        grad, query, key, value, bias, owner, groups, output, lse, grad_query, scale
    )
    return grad_key, grad_value, None if bias is None else grad_bias


# ------------------------------------------------------------------------------------------------------------- loss


@triton.jit
def _cross_entropy(LOGITS, LABELS, LOSS, stride, V, IGNORED, DIFFERENTIATES: tl.constexpr, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    counted = label != IGNORED
    own, width = LOGITS + row * stride, tl.where(counted, V, 0)
    top, mass = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        x = tl.load(own + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - safe) + tl.sum(tl.exp(x - safe), 0)
        top = higher
    right = tl.load(own + tl.where(counted, label, 0)).to(tl.float32)
    tl.store(LOSS + row, tl.where(counted, top + tl.log(mass) - right, 0.0))
    if DIFFERENTIATES:
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            x = tl.load(own + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
            p = tl.where(counted, tl.exp(x - top) / mass - (cols == label), 0.0)
            tl.store(own + cols, p.to(LOGITS.dtype.element_ty), mask=cols < V)


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, differentiates: bool) -> Tensor:
    """The loss `[N]` of each row of `logits` `[N, V]`, in float32; if it `differentiates`, the gradient replaces the logits."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _cross_entropy[(len(logits),)](
            logits, labels, losses, logits.stride(0), logits.shape[1], ignored,
            DIFFERENTIATES=differentiates, BV=min(8192, triton.next_power_of_2(logits.shape[1])), num_warps=8,
        )  # fmt: skip
    return losses
