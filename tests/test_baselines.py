"""The other methods: they start as the base, train what they say, answer with what they trained, and leave the base alone."""

import math

import pytest
import torch
from tiny import ROWS
from torch import nn
from zoo import make_model

from foreword import TrainConfig, attach
from foreword.adapters import BottleneckAdapter, adapted, adapter_places, make_adapters
from foreword.baselines import BASELINES, fit, held_out_loss, restore
from foreword.data import encode, read_rows
from foreword.errors import UnsupportedModelError
from foreword.fingerprint import digest

QUICK = TrainConfig(steps=8, batch_size=4, evaluate_every=4)


@pytest.fixture
def examples(tokenizer):
    return encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_adapters_stand_behind_attention_and_feed_forward_and_start_as_nothing(family):
    model = make_model(family).requires_grad_(False)
    ids = torch.randint(5, 90, (2, 7))
    before = model(ids).logits
    adapters = make_adapters(model, width=3)
    layers, features = model.config.num_hidden_layers, model.config.hidden_size
    assert len(adapters) == 2 * layers
    assert sum(p.numel() for p in adapters.parameters()) == 2 * layers * (2 * 3 * features + features + 3)
    names = {module: name for name, module in model.named_modules()}
    ends = {names[module].rpartition(".")[2] for module, _ in adapter_places(model)}
    assert ends == ({"c_proj"} if family == "gpt2" else {"o_proj", "down_proj"})
    with adapted(model, adapters):
        torch.testing.assert_close(model(ids).logits, before)
        model(ids).logits.square().sum().backward()
        learning = [p for name, p in adapters.named_parameters() if "up" in name]
        assert all(gradient is not None and bool(gradient.any()) for gradient in (p.grad for p in learning))
        with torch.no_grad():
            for parameter in learning:
                parameter.normal_()
        assert not torch.allclose(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before)


def test_an_adapter_is_what_houlsby_et_al_draw():
    adapter = BottleneckAdapter(4, 2).double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    by_hand = (
        x + nn.functional.gelu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    )
    torch.testing.assert_close(adapter(x), by_hand)


def test_adapters_need_a_feed_forward_network():
    with pytest.raises(UnsupportedModelError, match="no projection behind its attention and another"):
        adapter_places(make_model("mixtral"))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASELINES)
def test_each_method_learns_and_leaves_the_base_as_it_was(name, precision, examples):
    model, method = make_model("llama").to(precision).requires_grad_(False), BASELINES[name]
    before, parts = digest(model), [*model.state_dict()]
    with method.open(model, method.size and 4, 0) as subject:
        start = held_out_loss(subject.model, examples[:4], 2, subject.skipped)
        config = TrainConfig(steps=12, batch_size=4, learning_rate=30 * method.rate if name != "full" else 3e-3)
        found = fit(subject, examples, examples[:4], config)
        assert found.loss < start
        assert found.curve[-1] == (12, found.loss)
        assert found.trained == sum(p.numel() for p in subject.parameters)
        assert (found.peak_bytes or 0) > sum(p.numel() * p.element_size() for p in model.parameters())
    assert (digest(model), [*model.state_dict()]) == (before, parts)
    with method.open(model, method.size and 4, 0) as subject:
        restore(subject, found.state)
        rate = 1e-5 if precision == torch.float32 else 1e-2
        if subject.fold is None:
            loss = held_out_loss(subject.model, examples[:4], 4, subject.skipped)
        else:  # the base answers with the prefix that equals what was trained
            with attach(model, subject.fold()):
                loss = held_out_loss(model, examples[:4], 4)
        assert loss == pytest.approx(found.loss, rel=rate)


def test_steps_too_small_for_bfloat16_are_not_lost(examples):
    model = make_model("llama").to(torch.bfloat16)
    with BASELINES["full"].open(model, None, 0) as subject:
        found = fit(subject, examples, examples[:4], TrainConfig(steps=2, batch_size=4, learning_rate=1e-6))
    kept = zip(found.state, model.parameters(), strict=True)
    assert all(not torch.equal(state, parameter.float()) for state, parameter in kept)


def test_a_run_that_diverges_ends(examples):
    with BASELINES["full"].open(make_model("llama").float(), None, 0) as subject:
        found = fit(subject, examples, examples[:4], TrainConfig(steps=40, evaluate_every=2, learning_rate=1e30))
    assert found.steps < 40
    assert math.isinf(found.loss)
