"""Quantized bases: the gradients of what they compute, what is kept for them, and prefixes that move between precisions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llamacpp import write_gguf
from tiny import ROWS, gradients_of, make_tokenizer
from torch import Tensor, nn
from zoo import make_model, tokens

import foreword
from foreword import Prefix, PrefixConfig, TrainConfig, attach, attention_sites, load_base, models, quantized, train
from foreword.errors import ConfigError
from foreword.initialization import random_prefix
from foreword.quantized import differentiable, is_quantized

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that quantize
PRECISIONS = ("int8", "int4", "fp8")
KEPT_AS = {"int8": "Int8Tensor", "int4": "Params4bit", "fp8": "Float8Tensor"}
SMALL = PrefixConfig(num_virtual_tokens=3, initialization="random")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """What is not quantized, on every machine."""
    monkeypatch.setattr(models, "machine_precision", lambda device: torch.float32)


def needs(precision: str) -> None:
    pytest.importorskip("bitsandbytes" if precision == "int4" else "torchao")


def make_whole(**changes: int) -> Any:
    """Its layers hold whole blocks of weights, of every library's size."""
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "max_position_embeddings": 512,
    } | changes
    return make_model("llama", **shape).float().requires_grad_(False)


@pytest.fixture(scope="module")
def whole() -> Any:
    return make_whole()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    whole.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def weight_of(layer: Any) -> Tensor:
    """The weight that a quantized layer stands for, as its library tells it."""
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.dequantize()


def passed(model: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss of a few rows, half of which see a prefix, and the prefix's gradients."""
    torch.manual_seed(0)
    sites, ids = attention_sites(model), tokens(4, 9)
    prefix = Prefix(sites, [(torch.randn(3, 2, 32), torch.randn(3, 2, 32)) for _ in sites], position_offset=3)
    with attach(model, [prefix, None, prefix, None]), differentiable(model):
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    return loss.detach(), gradients_of(prefix)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_those_of_the_dequantized_base(precision, evaluated, folder, whole):
    needs(precision)
    model: Any = load_base(str(folder), precision=precision, device="cpu").model
    same = make_whole()
    same.load_state_dict(whole.state_dict())
    layers = [name for name, module in model.named_modules() if is_quantized(module)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    for name in layers:
        same.get_submodule(name).weight = nn.Parameter(weight_of(model.get_submodule(name)), requires_grad=False)
    if evaluated:  # after which bitsandbytes lays weights out for CPUs, without gradients
        with torch.no_grad():
            model(tokens(1, 3))
    (loss, found), (right, expected) = passed(model), passed(same)
    assert abs(loss - passed(whole)[0]) > 1e-4  # what is compared is quantized
    torch.testing.assert_close(loss, right, rtol=1e-3, atol=1e-4)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_no_dequantized_weight_is_kept_for_the_backward_pass(precision, folder):
    needs(precision)
    model: Any = load_base(str(folder), precision=precision, device="cpu").model
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() == 128 * 256:
            kept.append(tuple(tensor.shape))
        return tensor

    prefix = random_prefix(model, 3)
    with attach(model, prefix), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens(1, 4))
        assert kept  # by autograd alone
        kept.clear()
        with differentiable(model):
            model(tokens(1, 4))
    assert not kept


class ForInference(nn.Module):
    """A layer as libraries of quantized kernels have them: no gradient, and no weight that could be dequantized."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", layer.weight.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.get_buffer("packed").to(x.dtype).T) + 0.5


def test_gradients_pass_through_kernels_that_have_none(whole, monkeypatch):
    monkeypatch.setattr(quantized, "_AT_ONCE", 100)
    model = make_whole()
    model.load_state_dict(whole.state_dict())
    for layer in model.model.layers:
        layer.mlp.down_proj = ForInference(layer.mlp.down_proj)
    same = make_whole()
    same.load_state_dict(whole.state_dict())
    for layer in same.model.layers:
        own = layer.mlp.down_proj
        own.weight.copy_(own.weight.half().float())
        own.bias = nn.Parameter(torch.full((128,), 0.5), requires_grad=False)
    (loss, found), (right, expected) = passed(model), passed(same)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert "forward" not in model.model.layers[0].mlp.down_proj.__dict__


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prefix_moves_between_precisions(precision, folder, run):
    needs(precision)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "{r["prompt"]}", "completion": "{r["completion"]}"}}\n' for r in ROWS), "utf-8"
    )
    for own in (precision, "float32"):
        done = run(
            "train", "--model", folder, "--data", rows, "--out", f"{own}.safetensors", "--precision", own, "--steps", 12,
            "--learning-rate", 0.3, "--initialization", "random", "--gradient-checkpointing", "--device", "cpu",
        )  # fmt: skip
        assert done.code == 0, done.err
    trained = foreword.load(f"{precision}.safetensors")
    curve = trained.metadata["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert trained.metadata["training"]["precision"] == "float32 + " + KEPT_AS[precision]
    plain, small = (load_base(str(folder), precision=p, device="cpu").model for p in ("float32", precision))
    with attach(plain, trained), attach(small, foreword.load("float32.safetensors")):
        assert small(tokens(1, 3)).logits.isfinite().all()
    asked = "--prefix", "float32.safetensors", "--precision", precision, "--device", "cpu", "--max-new-tokens", 2
    assert run("generate", "say owl twice", *asked).code == 0
    other = make_whole(head_dim=16)
    with pytest.raises(foreword.ForewordError, match="made for|trained for"):
        attach(other, trained)


@pytest.mark.parametrize("library", ["bitsandbytes", "quanto", "gguf"])
def test_base_that_the_user_loaded_quantized(library, whole, folder, tmp_path):
    configs: dict[str, Any] = {
        "bitsandbytes": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
        "quanto": lambda: transformers.QuantoConfig(weights="int4"),
    }
    pytest.importorskip("optimum.quanto" if library == "quanto" else library)
    if library == "gguf":
        rounded = make_whole()
        for parameter in rounded.parameters():  # as a file in 8 bits holds them: vectors exactly, matrices not
            if parameter.dim() == 2:
                scale = parameter.abs().amax() / 127
                parameter.copy_((parameter / scale).round() * scale)
        file = write_gguf(rounded, make_tokenizer(), tmp_path / "model.gguf")
        model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=configs[library]())
    assert model.config.quantization_config is not None
    losses: list[float] = []
    config = TrainConfig(steps=12, learning_rate=0.3, held_out_fraction=0.2, evaluate_every=4)
    prefix = train(model, make_tokenizer(), ROWS, SMALL, config, on_step=lambda p: losses.append(p.loss))
    assert sum(losses[-3:]) < sum(losses[:3])
    with attach(whole, foreword.load(foreword.save(prefix, tmp_path / "p.safetensors"))):
        pass


def test_what_cannot_be_quantized_is_an_error(tmp_path, monkeypatch, folder):
    needs("int8")
    make_model("gpt2").float().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no linear layers that can be quantized.*int8.*bfloat16"):
        load_base(str(tmp_path), precision="int8", device="cpu")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fp8 needs torchao.*pip install 'foreword\[quantized\]'"):
        load_base(str(folder), precision="fp8", device="cpu")
