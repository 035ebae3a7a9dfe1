"""Run by test_attention in a fresh interpreter: the shape checks of the tests cannot be compiled, the package can."""

import torch
from tiny import FAMILIES, make_model

import foreword
from foreword.initialization import random_prefix

for family in FAMILIES:
    for implementation, tolerance in (("sdpa", 1e-9), ("eager", 1e-5)):
        model = make_model(family)
        model.set_attn_implementation(implementation)
        ids = torch.arange(14).reshape(2, 7)
        torch.compiler.reset()
        with torch.no_grad(), foreword.attach(model, random_prefix(model, 3).double()):
            expected = model(ids).logits
            found = torch.compile(model, backend="aot_eager")(ids).logits
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        print(family, implementation)
