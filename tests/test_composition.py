"""Several prefixes made into one: where their keys go, what stays and what is dropped, what is refused."""

import json
from typing import Any

import pytest
import torch
from tiny import HEAD_ROWS, make_pair_tokenizer
from torch import Tensor
from zoo import KEPT_OUT, ZOO, inputs_of, make_model, named, said, tokens

import foreword
from foreword import Prefix, PrefixConfig, TrainConfig, attach, compose, text_prefix, train
from foreword.attention import AttentionCall, intercept
from foreword.errors import ConfigError, ModelMismatchError, PositionError
from foreword.initialization import noop_prefix, random_prefix

FIRST, SECOND = tokens(5, seed=1).tolist(), tokens(7, seed=2).tolist()
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
}  # fmt: skip


def random(model: Any, length: int, seed: int = 0) -> Prefix:
    return random_prefix(model, length, seed).double()


def keys_at(model: Any, ids: list[int], first: int) -> list[Tensor]:
    """The keys `[T, G, D]` of every site when the text stands at position `first`."""
    seen: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        seen[names[call.module]] = call.key[0].transpose(0, 1)
        return call.run()

    with torch.no_grad(), intercept(model, record):
        model(torch.tensor([ids]), position_ids=torch.arange(len(ids))[None] + first, use_cache=False)
    return [seen[site.name] for site in foreword.attention_sites(model)]


def check_moved(model: Any) -> None:
    """Behind another, a text's prefix is that of the text at its later position: to where it was first it is relative."""
    first, second = text_prefix(model, FIRST).double(), text_prefix(model, SECOND).double()
    both = compose(model, [first, second])
    assert both.position_offset == both.num_virtual_tokens == 11  # the second sink is dropped
    for before, after, key in zip(first.keys, keys_at(model, SECOND, 4), both.keys, strict=True):
        torch.testing.assert_close(key, torch.cat([before, after[1:]]), rtol=1e-4, atol=1e-4)
    for one, other, value in zip(first.values, second.values, both.values, strict=True):
        assert torch.equal(value, torch.cat([one, other[1:]]))


@pytest.mark.feature("composition")
@pytest.mark.parametrize("family", named("decoder"))
def test_keys_move_to_their_new_positions(family):
    model = make_model(family)
    if (ZOO | KEPT_OUT)[family].stem not in ("GPT2", "OPT", "Roberta"):
        check_moved(model)
        return
    first, second = text_prefix(model, FIRST).double(), text_prefix(model, SECOND).double()
    both = compose(model, [first, second])  # their positions are in the embeddings, not in the keys
    for one, other, key in zip(first.keys, second.keys, both.keys, strict=True):
        assert torch.equal(key, torch.cat([one, other[1:]]))


@pytest.mark.parametrize("scaling", SCALED)
def test_keys_move_under_rotary_scaling(scaling):
    check_moved(make_model("llama", rope_parameters=SCALED[scaling], max_position_embeddings=256))


@pytest.mark.parametrize("scaling", SCALED)
def test_prefix_of_a_text_is_exact_under_rotary_scaling(scaling):
    model, ids = make_model("llama", rope_parameters=SCALED[scaling], max_position_embeddings=256), tokens(2, 9)
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([FIRST, FIRST]), ids], 1)).logits[:, 5:]
        with attach(model, text_prefix(model, FIRST).double()):
            torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.feature("composition")
@pytest.mark.parametrize("family", named())
def test_all_parts_are_seen_by_one_row(family):
    model, parts = make_model(family), [random(make_model(family), length, seed=length) for length in (3, 4)]
    both, mean = compose(model, parts), compose(model, [parts[0], random(model, 3, seed=9)], "average", [3.0, 1.0])
    assert both.lengths == dict.fromkeys(both.lengths, 7)
    assert all(torch.equal(value[:3], own) for value, own in zip(both.values, parts[0].values, strict=True))
    for value, one, other in zip(mean.values, parts[0].values, random(model, 3, seed=9).values, strict=True):
        torch.testing.assert_close(value, 0.75 * one + 0.25 * other)
    inputs, found = inputs_of(model, 2), []
    with torch.no_grad(), attach(model, both) as attachment:
        for prefix in (both, mean, *parts):
            attachment.use(prefix)
            found.append(said(model, inputs))
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(found) for b in found[:i])


def test_sinks_gates_and_positionless_prefixes(llama):
    text, closed, free = text_prefix(llama, FIRST).double(), noop_prefix(llama, 3).double(), random(llama, 4)
    both = compose(llama, [free, text])
    assert both.num_virtual_tokens == 9  # the only sink stays
    assert not both.metadata["attention_sink"]
    three = compose(llama, [text, closed, text])
    assert three.num_virtual_tokens == 5 + 3 + 4
    assert three.position_offset == 5 + 4  # the no-op start holds no positions
    assert three.metadata["attention_sink"]
    assert three.gates is not None
    assert torch.equal(three.gates[0][:, 0], torch.cat([torch.ones(5), closed.gates[0][:, 0], torch.ones(4)]).double())  # type: ignore[index]
    ids, both = tokens(2, 6), compose(llama, [text, text])
    with torch.no_grad(), attach(llama, three) as attachment:
        found = llama(ids).logits
        attachment.use(both)
        torch.testing.assert_close(llama(ids).logits, found)  # behind its closed gates it adds nothing
    alone = compose(llama, [text])
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), text.parameters(), strict=True))


def test_heads_are_averaged_and_never_concatenated():
    config = TrainConfig(task="classification", steps=2, held_out_fraction=0.0, dropout=False)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model, tokenizer = make_model("bert", head="ForSequenceClassification", **labels), make_pair_tokenizer()
    rows, small = HEAD_ROWS["classification"], PrefixConfig(num_virtual_tokens=3)
    one, other = (train(model, tokenizer, part, small, config) for part in (rows[:8], rows[8:]))
    mean = compose(model, [one, other], "average")
    assert mean.metadata["labels"] == ["bad", "good"]
    assert mean.metadata["task"] == "classification"
    for name, tensor in (mean.head or {}).items():
        torch.testing.assert_close(tensor, ((one.head or {})[name] + (other.head or {})[name]) / 2)
    with pytest.raises(ConfigError, match="Prefix 1 of 2 has a trained head"):
        compose(model, [one, other])
    with pytest.raises(ConfigError, match="or some have none"):
        compose(model, [one, other.with_head(None)], "average")
    other.metadata["labels"] = ["good", "bad"]
    with pytest.raises(ConfigError, match="different labels"):
        compose(model, [one, other], "average")


def test_what_does_not_fit_says_why(llama):
    three, four = random(llama, 3), random(llama, 4)
    with pytest.raises(ConfigError, match="No prefixes"):
        compose(llama, [])
    with pytest.raises(ConfigError, match="'concatenate' or 'average'"):
        compose(llama, [three, four], "sum")
    with pytest.raises(ConfigError, match="are not weighted"):
        compose(llama, [three, four], weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="3, 4 virtual tokens"):
        compose(llama, [three, four], "average")
    with pytest.raises(ConfigError, match="1 weights for 2 prefixes"):
        compose(llama, [three, three], "average", [1.0])
    with pytest.raises(ConfigError, match="not all of them 0"):
        compose(llama, [three, three], "average", [0.0, 0.0])
    with pytest.raises(ModelMismatchError, match="Prefix 2 of 2: The prefix was trained for"):
        compose(llama, [three, random(make_model("llama", seed=1), 3)])
    with pytest.raises(ModelMismatchError, match="Prefix 2 of 2 was made for"):
        compose(llama, [three, random(make_model("gpt2"), 3)])
    one, other = random(llama, 3), random(llama, 3)
    one.metadata["template"], other.metadata["template"] = "a", "b"
    with pytest.raises(ConfigError, match="different chat templates"):
        compose(llama, [one, other])
    short = make_model("gpt2", n_positions=16)
    with pytest.raises(PositionError, match="hold 16 positions"):
        compose(short, [random(short, 8), random(short, 8)])


def test_the_command_composes_files(run, model_folder, tmp_path):
    base: Any = foreword.load_base(str(model_folder))
    first, second = (text_prefix(base.model, ids) for ids in (FIRST, SECOND))
    for name, prefix in (("a", first), ("b", second)):
        foreword.save(prefix, tmp_path / f"{name}.safetensors")
    result = run("compose", "a.safetensors", "b.safetensors", "--out", "both.safetensors")
    assert result.code == 0, result.err
    assert "11 virtual tokens" in result.out
    assert "of 2 prefixes, concatenate: 5 + 6 virtual tokens" in run("show", "both.safetensors").out
    assert json.loads(run("show", "both.safetensors", "--json").out)["composition"]["how"] == "concatenate"
    expected = compose(base.model.float(), [first, second])
    for one, other in zip(foreword.load("both.safetensors").keys, expected.keys, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "both.safetensors exists already" in run("compose", "a.safetensors", "--out", "both.safetensors").err
    refused = run("compose", "a.safetensors", "b.safetensors", "--out", "m.safetensors", "--how", "average")
    assert refused.code == 2
    assert "5, 7 virtual tokens" in refused.err
    twice = run(
        "compose",
        "a.safetensors",
        "a.safetensors",
        "--out",
        "m.safetensors",
        "--how",
        "average",
        "--weight",
        3,
        "--weight",
        1,
    )
    assert twice.code == 0, twice.err
