"""Run by test_attention in a fresh interpreter: the shape checks of the tests cannot be compiled, the package can."""

import torch
from tiny import FAMILIES, make_model

import foreword
from foreword.initialization import random_prefix


def check(family: str, implementation: str, tolerance: float) -> None:
    model = make_model(family)
    model.set_attn_implementation(implementation)
    ids = torch.arange(14).reshape(2, 7)
    torch.compiler.reset()
    with torch.no_grad(), foreword.attach(model, random_prefix(model, 3).double()):
        expected = model(ids).logits
        found = torch.compile(model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    print(family, implementation)


if __name__ == "__main__":
    for family in FAMILIES:
        check(family, "sdpa", 1e-9)
        check(family, "eager", 1e-5)
