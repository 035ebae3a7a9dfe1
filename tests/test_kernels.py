"""The merged path against concatenation, forward and all gradients, over many shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Largest
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foreword import kernels
from foreword.kernels import Prefixes, assign, concatenate, extend_mask, merged_attention, stack
from foreword.token_kernels import has_token_kernel


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def reference(query, key, value, prefixes, *, scale, mask, is_causal):
    long_key, long_value, bias = concatenate(key, value, prefixes)
    new = long_key.shape[2] - key.shape[2]
    mask = extend_mask(mask, bias, query, key.shape[2], new, is_causal)
    return scaled_dot_product_attention(query, long_key, long_value, mask, scale=scale, enable_gqa=True)


@st.composite
def cases(draw_from):
    """Batch, query tokens, key tokens, groups, heads a group, head dim; how rows are prefixed, masked and gated."""
    number = lambda low, high: draw_from(st.integers(low, high))  # noqa: E731
    batch, tokens = number(1, 3), number(1, 6)
    mask = draw_from(st.sampled_from(["none", "causal", "boolean", "additive"]))
    return {
        "shape": (batch, tokens, tokens + (0 if mask == "causal" else number(0, 4)), number(1, 2), number(1, 3)),
        "dim": draw_from(st.sampled_from([2, 8])),
        "mask": mask,
        "lengths": draw_from(st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        "shared": draw_from(st.booleans()),
        "gated": draw_from(st.booleans()),
        "long": draw_from(st.booleans()),
        "seed": number(0, 1000),
    }


def build(case):
    g = torch.Generator().manual_seed(case["seed"])
    (batch, tokens, keys, groups, each), dim = case["shape"], case["dim"]
    query, key = draw(g, batch, groups * each, tokens, dim), draw(g, batch, groups, keys, dim)
    value = draw(g, batch, groups, keys, dim)
    entries = []
    for length in case["lengths"][:1] if case["shared"] else case["lengths"]:
        bias = draw(g, length, groups) if case["gated"] else None
        entries.append((draw(g, length, groups, dim), draw(g, length, groups, dim), bias))
    owner = torch.randint(-1, len(entries), (batch,), generator=g).tolist()
    owner[0] = len(entries) - 1  # so that every prefix stands in the groups
    prefixes = stack(entries, None if case["shared"] else assign(owner))
    mask = None
    if case["mask"] in ("boolean", "additive"):
        mask = torch.rand(batch, 1, tokens, keys, generator=g) < 0.6
        mask[..., 0] |= ~mask.any(-1)  # every query sees a token, as in the models; see below for those that do not
        if case["mask"] == "additive":
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    return (
        (query, key, value, prefixes),
        entries,
        {"scale": dim**-0.5, "mask": mask, "is_causal": case["mask"] == "causal"},
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_merged_equals_concatenated_with_all_gradients(case):
    arguments, entries, options = build(case)
    tensors = [*arguments[:3], *(tensor for entry in entries for tensor in entry if tensor is not None)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "_SHORT", 2 if case["long"] else 128
        )  # virtual tokens beyond which a fused kernel is taken
        merged, expected = merged_attention(*arguments, **options), reference(*arguments, **options)
        torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)
        upstream = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ours, theirs = (
            torch.autograd.grad(output, tensors, upstream, allow_unused=True, materialize_grads=True)
            for output in (merged, expected)
        )
    for name, own, other in zip(["query", "key", "value", *["prefix"] * 9], ours, theirs, strict=False):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_query_that_sees_no_token_sees_only_the_prefix_or_nothing():
    g = torch.Generator().manual_seed(0)
    query, key, value = draw(g, 2, 2, 3, 8), draw(g, 2, 1, 3, 8), draw(g, 2, 1, 3, 8)
    prefix = Prefixes(draw(g, 1, 4, 1, 8), draw(g, 1, 4, 1, 8), rows=assign([0, -1]))
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[:, :, 0] = False
    output = merged_attention(query, key, value, prefix, scale=1.0, mask=mask)
    alone = (query[0, :, 0] @ prefix.key[0, :, 0].T).softmax(-1) @ prefix.value[0, :, 0]
    torch.testing.assert_close(output[0, :, 0], alone)
    assert output[1, :, 0].abs().max() == 0
    output.sum().backward()
    for tensor in (query, key, value, prefix.key, prefix.value):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_bfloat16_is_as_exact_as_bfloat16_allows():
    g = torch.Generator().manual_seed(0)
    tensors = [
        draw(g, 2, 6, 40, 16),
        draw(g, 2, 2, 40, 16),
        draw(g, 2, 2, 40, 16),
        draw(g, 1, 5, 2, 16),
        draw(g, 1, 5, 2, 16),
    ]

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v, pk, pv = (t.detach().to(dtype).requires_grad_() for t in tensors)
        output = merged_attention(q, k, v, Prefixes(pk, pv), scale=0.25, is_causal=True)
        return [output, *torch.autograd.grad(output.float().pow(2).sum(), [q, k, v, pk, pv])]

    for low, exact in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (low.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(
    ("value_dim", "mask"), [(4, None), (8, torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True))]
)
def test_what_no_fused_kernel_computes_is_left_to_the_reference_path(value_dim, mask):
    query, value = torch.zeros(1, 2, 2, 8, dtype=torch.float64), torch.zeros(1, 1, 2, value_dim, dtype=torch.float64)
    assert not has_token_kernel(query, value, mask)


@pytest.mark.parametrize("owners", [None, [0] * 8 + [1] * 8, [0, -1] * 8])
def test_prefix_is_never_repeated_for_the_rows(owners):
    batch, length, width = 16, 32, 8
    rows = None if owners is None else assign(owners)
    query, key, value = (torch.randn(batch, 2, 1, width, requires_grad=True) for _ in range(3))
    count = 1 if owners is None else max(owners) + 1
    key_, value_ = (torch.randn(count, length, 2, width, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        merged_attention(query, key, value, Prefixes(key_, value_, None, rows), scale=1.0).sum().backward()
    seeing = batch if owners is None else sum(owner >= 0 for owner in owners)
    assert seeing * 2 * length <= largest.numbers < seeing * 2 * length * width  # its scores, but not its keys
