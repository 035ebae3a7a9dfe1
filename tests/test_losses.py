"""The loss over blocks of rows against PyTorch's, and its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from foreword import losses


@given(rows=st.integers(1, 9), width=st.integers(2, 6), block=st.integers(1, 30), seed=st.integers(0, 100))
def test_loss_and_gradient_equal_those_of_all_rows_at_once(rows, width, block, seed):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(rows, width, generator=generator, dtype=torch.float64).mul(9).requires_grad_()
    labels = torch.randint(0, width, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    expected = cross_entropy(leaf, labels, ignore_index=-100, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses._NUMBERS, "cpu", block)
        found = losses.summed_cross_entropy(leaf * 1, labels, -100)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(3 * found, leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, leaf)[0])


def test_bfloat16_logits_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(50, 300, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (50,), generator=generator)
    expected = cross_entropy(leaf.float(), labels, reduction="sum")
    found = losses.summed_cross_entropy(leaf * 1, labels, -100)
    torch.testing.assert_close(found, expected)
    (gradient,), (right,) = torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(gradient, right, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        kept = leaf * 1
        torch.testing.assert_close(losses.summed_cross_entropy(kept, labels, -100), expected)
        assert torch.equal(kept, leaf)  # only a gradient takes their place


def test_logits_that_something_else_needs_are_an_error():
    leaf = torch.randn(3, 4, requires_grad=True)
    logits = leaf.exp()  # whose gradient needs its own output
    loss = losses.summed_cross_entropy(logits, torch.tensor([0, 1, 2]), -100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
