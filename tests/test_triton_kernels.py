"""The kernels for GPUs against the plain ones; where there is no GPU, Triton's interpreter runs them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from foreword import kernels
from foreword.kernels import assign, merged_attention, stack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RTOL, ATOL = (1e-2, 1e-2) if DEVICE.type == "cuda" else (1e-3, 1e-4)  # a GPU multiplies in tf32
triton_kernels = pytest.importorskip("foreword.triton_kernels", reason="Triton is not installed", exc_type=ImportError)

# NumPy, which the interpreter computes with, warns of what the kernels take care of: infinite scores, masses of zero.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@st.composite
def cases(draw):
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    return {
        "shape": (
            number(1, 3),
            number(1, 2),
            number(1, 3),
            draw(st.sampled_from([1, 5, 70])),
            draw(st.sampled_from([8, 24])),
        ),
        "lengths": draw(st.lists(st.sampled_from([1, 3, 40]), min_size=1, max_size=3)),
        "shared": draw(st.booleans()),
        "gated": draw(st.booleans()),
        "seed": number(0, 1000),
    }


def attend(case) -> list[Tensor]:
    """The output, and the gradients of queries, keys, values and prefixes."""
    g = torch.Generator().manual_seed(case["seed"])
    batch, groups, each, tokens, dim = case["shape"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE).requires_grad_()

    query, key, value = (draw(batch, tokens, n, dim).transpose(1, 2) for n in (groups * each, groups, groups))
    entries = [
        (draw(length, groups, dim), draw(length, groups, dim), draw(length, groups) if case["gated"] else None)
        for length in (case["lengths"][:1] if case["shared"] else case["lengths"])
    ]
    owners = torch.randint(-1, len(entries), (batch,), generator=g).tolist()
    owners[0] = len(entries) - 1
    prefixes = stack(entries, None if case["shared"] else assign(owners, DEVICE))
    output = merged_attention(query, key, value, prefixes, scale=dim**-0.5, is_causal=True)
    tensors = [query, key, value, *(tensor for entry in entries for tensor in entry if tensor is not None)]
    upstream = torch.randn(output.shape, generator=g).to(DEVICE)
    return [output, *torch.autograd.grad(output, tensors, upstream, allow_unused=True, materialize_grads=True)]


@settings(max_examples=12, deadline=None)
@given(cases())
def test_prefix_part_and_its_gradients_are_those_of_plain_products(case):
    expected = attend(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_has_kernel_of_our_own", lambda query, prefixes: True)
        found = attend(case)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=RTOL, atol=ATOL)


def test_loss_and_gradient_of_a_large_vocabulary():
    logits = torch.randn(5, 9000, device=DEVICE).mul(5).requires_grad_()
    labels = torch.tensor([1, -100, 3, 8999, 0], device=DEVICE)
    expected = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    own = logits.detach().clone()
    torch.testing.assert_close(triton_kernels.cross_entropy_(own, labels, -100, False), expected.detach())
    assert torch.equal(own, logits)
    torch.testing.assert_close(triton_kernels.cross_entropy_(own, labels, -100, True), expected.detach())
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)
