"""The loss over blocks of rows against PyTorch's, and its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from foreword import losses


@given(rows=st.integers(1, 9), width=st.integers(2, 6), block=st.integers(1, 30), seed=st.integers(0, 100))
def test_loss_and_gradient_equal_those_of_all_rows_at_once(rows, width, block, seed):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(rows, width, generator=generator, dtype=torch.float64).mul(9).requires_grad_()
    labels = torch.randint(0, width, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    expected = cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_IN_CACHE", block)
        found = losses.cross_entropy(leaf * 1, labels, -100)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, upstream)[0])


@given(rows=st.integers(1, 9), labelled=st.integers(0, 9), block=st.integers(1, 30), seed=st.integers(0, 100))
def test_loss_through_a_frozen_head_equals_that_of_its_logits(rows, labelled, block, seed):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_()
    head = nn.Linear(5, 7, bias=seed % 2 == 0, dtype=torch.float64).requires_grad_(False)
    places = torch.randint(0, rows, (labelled,), generator=generator)
    labels = torch.randint(0, 7, (labelled,), generator=generator)
    labels[torch.rand(labelled, generator=generator) < 0.3] = -100
    expected = cross_entropy(head(leaf[places]), labels, ignore_index=-100, reduction="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses._AT_ONCE, "cpu", block)
        found = losses.head_cross_entropy(leaf, head, places, labels, -100)
    torch.testing.assert_close(found.double(), expected)
    upstream = torch.randn(labelled, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found, leaf, upstream.to(found.dtype))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, upstream)[0])


def test_bfloat16_logits_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(50, 300, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (50,), generator=generator)
    expected = cross_entropy(leaf.float(), labels, reduction="none")
    found = losses.cross_entropy(leaf * 1, labels, -100)
    torch.testing.assert_close(found, expected)
    (gradient,), (right,) = (torch.autograd.grad(loss.sum(), leaf) for loss in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        kept = leaf * 1
        torch.testing.assert_close(losses.cross_entropy(kept, labels, -100), expected)
        assert torch.equal(kept, leaf)  # only a gradient takes their place


def test_logits_that_something_else_needs_are_an_error():
    leaf = torch.randn(3, 4, requires_grad=True)
    logits = leaf.exp()  # whose gradient needs its own output
    loss = losses.cross_entropy(logits, torch.tensor([0, 1, 2]), -100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
