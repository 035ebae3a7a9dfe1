"""Run by test_models in a fresh interpreter: the shape checks of the tests cannot be compiled, the package can."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tiny import gradients_of
from transformers import CompileConfig
from zoo import FAMILIES, inputs_of, make_model, named, said, tokens

import foreword
from foreword.initialization import random_prefix
from foreword.passes import checkpointed

warnings.simplefilter("ignore")


def layers(family: str, implementation: str | None = None) -> None:
    """Each layer with attention as one graph, forward and backward."""
    model = make_model(family).requires_grad_(False)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if "experts" in str(model.config):  # of the ways to run experts this one can be compiled, in float32
        model.float().set_experts_implementation("batched_mm")
    inputs, prefix = inputs_of(model, 2), random_prefix(model, 3).to(model.dtype)
    with foreword.attach(model, prefix):
        expected = pass_through(model, inputs, prefix)
    compile_layers(model)
    bare_or_not_at_all(lambda: said(model, inputs))
    with foreword.attach(model, prefix):
        torch.testing.assert_close(pass_through(model, inputs, prefix), expected, rtol=1e-4, atol=1e-4)
    if implementation is None and family in FAMILIES:
        torch.compiler.reset()
        layers(family, "eager")


def pass_through(model: Any, inputs: dict[str, torch.Tensor], prefix: foreword.Prefix) -> list[torch.Tensor]:
    """What the model says, and the prefix's gradients."""
    prefix.zero_grad()
    output = said(model, inputs)
    output.pow(2).mean().backward()
    return [output, *gradients_of(prefix)]


def one_graph(family: str) -> None:
    """A prefix, then another, then one for each row: each time all layers share what the first two were compiled to."""
    model = make_model(family, num_hidden_layers=10).requires_grad_(False)
    inputs: Any = inputs_of(model, 2) | {"use_cache": False}
    three, five = random_prefix(model, 3).double(), random_prefix(model, 5, seed=1).double()
    compile_layers(model)
    with foreword.attach(model, three) as attachment:
        for number, seen in enumerate((three, five, [three, five]), 1):
            attachment.use(seen)
            said(model, inputs).sum().backward()
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs <= 2 * number, f"{graphs} graphs"  # the first layer's input needs no gradient, the others' do


def checkpointed_layers(family: str) -> None:
    """As the training loop has them: checkpointed around what was compiled."""
    model = make_model(family).requires_grad_(False)
    inputs, prefix = inputs_of(model, 2), random_prefix(model, 3).double()
    with foreword.attach(model, prefix):
        expected = pass_through(model, inputs, prefix)
        compile_layers(model)
        with checkpointed(model):
            torch.testing.assert_close(pass_through(model, inputs, prefix), expected, rtol=1e-4, atol=1e-4)


def compile_layers(model: Any) -> None:
    names = {site.name for site in foreword.attention_sites(model)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            for number, layer in module.named_children():
                if any(site.startswith(f"{name}.{number}.") for site in names):
                    layer.compile(backend="aot_eager", fullgraph=True)


class BareModelFails(Exception):
    """Transformers itself cannot do it."""


def bare_or_not_at_all(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        raise BareModelFails(" ".join(str(error).split())[:160]) from error


def static_cache(family: str) -> None:
    """`generate` with the compiled decoding that GPUs get by default."""
    model = make_model(family)
    config: Any = CompileConfig(backend="aot_eager", fullgraph=False)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 259}
    fast = options | {"cache_implementation": "static", "compile_config": config}
    bare_or_not_at_all(lambda: model.generate(tokens(2, 6), **fast))
    with foreword.attach(model, random_prefix(model, 3).double()):
        expected = model.generate(tokens(2, 6), **options)
        assert torch.equal(model.generate(tokens(2, 6), **fast), expected)


if __name__ == "__main__":
    checks: Any = ((layers, named()), (static_cache, named("decoder", "hybrid")))
    for check, families in (*checks, (one_graph, ["llama"]), (checkpointed_layers, ["llama"])):
        for family in families if len(sys.argv) == 1 else [name for name in families if name in sys.argv]:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            try:
                check(family)
                outcome = "same"
            except BareModelFails as error:
                outcome = f"without a prefix too: {error}"
            except Exception as error:  # noqa: BLE001  # it is printed, and the test compares it
                outcome = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
            print(f"{family} {check.__name__.replace('_', ' ')}: {outcome}", flush=True)
