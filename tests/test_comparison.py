"""`foreword compare`: every method on the same rows, with as many tries, and a report of it all."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import ROWS
from zoo import make_model

import foreword
from foreword import PrefixConfig, TrainConfig, attach, train
from foreword.baselines import BASELINES, fit
from foreword.comparison import entries, search
from foreword.data import encode, read_rows
from foreword.errors import ConfigError

QUICK = ["--steps", 4, "--evaluate-every", 2, "--tries", 2, "--seeds", 2, "--test-rows", 2, "--max-new-tokens", 4]


@pytest.fixture
def command(run, model_folder, rows_file):
    def call(*options):
        given = ["--model", model_folder, "--data", rows_file, "--precision", "float32", "--virtual-tokens", 4]
        return run("compare", *given, *QUICK, *options)

    return call


def test_every_method_is_run_alike_and_reported(command):
    methods = "full,prefix,prefix-mlp:3,prompt:3,adapter:1,lora:2,peft-prefix:3,few-shot:1,base"
    result = command("--methods", methods, "--rows", "6", "--json", "--metrics", "bleu,nist")
    assert result.code == 0
    report = json.loads(result.out)
    labels = list(dict.fromkeys(run["label"] for run in report["runs"]))
    assert labels == [entry.label for entry in entries(methods, PrefixConfig(4))]
    for found in report["runs"]:
        trains = found["method"] not in ("few-shot", "base")
        assert found["metrics"].keys() == {"bleu", "nist"}
        assert len(found["answers"]) == 2
        assert [step for step, _ in found["curve"]] == ([2, 4] if trains else [])
        assert (found["trained"] > 0) == trains
        if found["seed"] == 0:
            assert len(found["tries"]) == (2 if trains else 0)
        if trains:
            assert found["peak_bytes"] > 4 * 39_904
    page, text = Path("comparison/report.html").read_text(), Path("comparison/report.md").read_text()
    assert all(label in page and label in text for label in labels)
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="?(https?:|//)', page)  # it needs nothing else
    assert json.loads(Path("comparison/report.json").read_text()) == report


def test_low_data_curves(command):
    report = json.loads(command("--methods", "full,base", "--rows", "6,12", "--json").out)
    runs = [(run["rows"], run["seed"]) for run in report["runs"] if run["method"] == "full"]
    assert runs == [(6, 0), (6, 1), (12, 0), (12, 1)]
    page = Path("comparison/report.html").read_text()
    assert "training rows" in page
    assert "The band is one standard deviation" in page


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("layers", ["embeddings only (prompt tuning, 4 tokens)", "first 1 of 3 layers", "first 2 of 3 layers", "first 3 of 3 layers"]),
        ("initialization", ["random", "words", "demonstrations, all", "demonstrations, compacted"]),
        ("sink", ["first token frozen", "first token trained"]),
        ("mlp", ["no MLP", "MLP"]),
    ],
)  # fmt: skip
def test_ablations_change_one_thing(command, name, labels):
    result = command("--ablation", name, "--seeds", 1, "--tries", 1, "--steps", 2)
    assert result.code == 0
    lines = result.out.splitlines()[1:]
    assert len(lines) == len(labels)
    assert all(line.startswith(label) for line, label in zip(lines, labels, strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "full,prefixes"], "No such method: 'prefixes'. Known: prefix, prefix-mlp, full"),
        (["--methods", "full:3"], "'full:3': expected full alone, it has no size"),
        (["--methods", "lora:x"], "'lora:x': expected a whole number behind the colon (rank N)"),
        (["--methods", "lora,lora"], "names a method twice"),
        (["--rows", "5,many"], "--rows: expected whole numbers parted by commas"),
        (["--rows", "500"], "500 training rows were asked for, but there are"),
        (["--metrics", "blue"], "No such metric: blue"),
        (["--methods", "lora", "--ablation", "mlp"], "leave out --methods"),
    ],
)
def test_mistakes_are_told(command, options, told):
    result = command(*options)
    assert result.code == 2
    assert told in result.err


def test_without_peft_the_other_methods_still_run(command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert command("--methods", "full,base", "--seeds", 1).code == 0
    result = command("--methods", "lora", "--overwrite")
    assert result.code == 2
    assert "PEFT is not installed" in result.err


def test_report_is_replaced_only_if_asked(command):
    base = ["--methods", "base", "--seeds", 1]
    assert command(*base).code == 0
    refused = command(*base)
    assert refused.code == 2
    assert "comparison holds a report already" in refused.err
    assert command(*base, "--overwrite").code == 0


def test_baselines_are_averaged_as_a_prefix_is(llama, tokenizer):
    rows, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)
    found: list[list[torch.Tensor]] = []
    for averaging in (0.0, 0.9):
        config = TrainConfig(steps=1, evaluate_every=1, learning_rate=0.01, averaging=averaging)
        with BASELINES["full"].open(llama, None, 0) as subject:
            before = [parameter.detach().clone() for parameter in subject.parameters]
            found.append(fit(subject, rows, rows[:3], config).state)
    for start, step, average in zip(before, *found, strict=True):
        torch.testing.assert_close(average, start.lerp(step, 5 / 6))


def test_search_goes_where_it_is_better_then_closer():
    tried: list[float] = []

    def loss_of(rate: float) -> float:
        tried.append(rate)
        return abs(rate - 0.003)

    assert search(1e-2, 5, loss_of) == 0.0033
    assert tried == [0.01, 0.03, 0.0033, 0.0011, 0.0058]


def test_a_prefix_may_cover_the_first_layers_only(llama, tokenizer):
    prefix = train(llama, tokenizer, ROWS, PrefixConfig(4, num_layers=1), TrainConfig(steps=2))
    sites = foreword.attention_sites(llama)
    assert prefix.sites == sites[:1]
    assert prefix.position_offset == 4
    with attach(llama, prefix):
        pass
    with pytest.raises(ConfigError, match=f"num_layers is 9, but the model has {len(sites)} layers"):
        train(llama, tokenizer, ROWS, PrefixConfig(4, num_layers=9), TrainConfig(steps=2))


def test_metrics_of_evaluate_are_chosen(run, model_folder, rows_file):
    given = ["--model", model_folder, "--data", rows_file, "--steps", 2, "--virtual-tokens", 4]
    assert run("train", *given, "--out", "owl.safetensors").code == 0
    options = ["--compare", "none", "--max-new-tokens", 4]
    result = run("evaluate", "owl.safetensors", "--data", rows_file, *options, "--metrics", "rouge_1,nist")
    assert result.out.splitlines()[0].split() == ["24", "rows", "ROUGE-1", "NIST"]
    result = run("evaluate", "owl.safetensors", "--data", rows_file, *options, "--metrics", "blue")
    assert (result.code, "No such metric: blue" in result.err) == (2, True)


def test_a_head_is_not_measured_as_text(tokenizer):
    model = make_model("llama")
    prefix = train(model, tokenizer, ROWS, PrefixConfig(4), TrainConfig(steps=1))
    prefix.metadata["task"] = "classification"
    with pytest.raises(ConfigError, match="metrics are for generated answers"):
        foreword.evaluate(model, tokenizer, ROWS, prefix, metrics=["bleu"])
