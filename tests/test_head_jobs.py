"""Tasks with a head as users run them: loading a base for the task, the command, and runs that are killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HEAD_ROWS, make_pair_tokenizer, make_tokenizer
from zoo import make_model

import foreword
from foreword import TrainConfig, load_base, train
from foreword.errors import ConfigError
from foreword.heads import head_tensors
from foreword.models import Base

LABELS = ["bad", "good"]


def save_bert(folder: Path, head: str, **changes: Any) -> Path:
    make_model("bert", head=head, **changes).float().save_pretrained(folder)
    make_pair_tokenizer().save_pretrained(folder)
    return folder


def write_rows(folder: Path, task: str) -> Path:
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HEAD_ROWS[task]), "utf-8")
    return file


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A saved tiny BERT without a head, but with a pooler."""
    return save_bert(tmp_path_factory.mktemp("tiny-bert"), "Model")


def load(folder: Path, **options: Any) -> Base:
    return load_base(str(folder), precision="float32", device="cpu", **options)


@pytest.mark.feature("classification head")
def test_head_of_a_loaded_base_comes_from_the_seed(encoder_folder):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (load(encoder_folder, task="classification", labels=LABELS, seed=n).model for n in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [head_tensors(model)["classifier.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (2, 32)
    assert one.config.id2label == dict(enumerate(LABELS))
    assert not any(parameter.requires_grad for parameter in one.parameters())
    tokens = load(encoder_folder, task="token_classification", labels=["A", "B", "C"]).model
    assert head_tensors(tokens)["classifier.weight"].shape == (3, 32)
    answers = load(encoder_folder, task="question_answering").model
    assert head_tensors(answers)["qa_outputs.weight"].shape == (2, 32)


@pytest.mark.feature("classification head")
def test_decoder_gets_a_head_and_a_padding_token(model_folder, tmp_path):
    model = load(model_folder, task="classification", labels=LABELS).model
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    foreword.load_base(str(model_folder)).tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path, task="classification", labels=LABELS).model
    assert again.config.pad_token_id == make_tokenizer().pad_token_id
    for name, weight in head_tensors(model).items():  # a head in the checkpoint is where training starts
        assert torch.equal(head_tensors(again)[name], weight)
    three = load(tmp_path, task="classification", labels=["a", "b", "c"]).model
    assert head_tensors(three)["score.weight"].shape == (3, 32)


@pytest.mark.feature("classification head")
def test_pooler_that_the_checkpoint_lacks_is_trained_and_kept(tmp_path):
    folder = save_bert(tmp_path / "b", "ForMaskedLM")  # a BERT saved without a pooler
    base = load(folder, task="classification", labels=LABELS)
    config = TrainConfig(task="classification", steps=3)
    prefix = train(base.model, base.tokenizer, HEAD_ROWS["classification"], foreword.PrefixConfig(3), config)
    assert prefix.head is not None
    assert prefix.head.keys() == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    ids = torch.tensor([base.tokenizer("oh no")["input_ids"]])
    logits = []
    for seed in (0, 5):
        other = load(folder, task="classification", labels=LABELS, seed=seed).model
        with foreword.attach(other, prefix), torch.no_grad():
            logits.append(other(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.feature("classification head")
def test_base_that_does_not_fit_the_task_is_refused(encoder_folder, tmp_path):
    for options, told in (
        ({"task": "classification"}, "needs two labels or more, none of them twice, got None"),
        ({"task": "classification", "labels": ["a"]}, "needs two labels or more"),
        ({"task": "classification", "labels": ["a", "a"]}, "none of them twice"),
        ({"task": "question_answering", "labels": ["a", "b"]}, "has no labels, got a, b"),
        ({}, "has no language-model head to complete prompts with"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(encoder_folder, **options)
    wide = save_bert(tmp_path / "wide", "Model", intermediate_size=64)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ConfigError, match="shapes of its config and its weights differ: bert.encoder.layer.0"):
        load(wide, task="classification", labels=LABELS)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def job(encoder_folder, tmp_path):
    """The arguments that train a task's prefix in few steps."""

    def arguments(task: str, out: str, *more: object) -> list[object]:
        rows = write_rows(tmp_path, task)
        what = ["--model", encoder_folder, "--task", task, "--data", rows, "--out", out]
        return ["train", *what, "--steps", 6, "--virtual-tokens", 4, "--precision", "float32", *more]

    return arguments


@pytest.mark.feature("classification head")
def test_train_evaluate_and_answer_with_labels(run, job):
    result = run(*job("classification", "mood.safetensors", "--head-learning-rate", 0.01))
    assert result.code == 0
    assert "4 virtual tokens, 578 parameters, 66 of them the head's" in result.out
    prefix = foreword.load("mood.safetensors")
    assert (prefix.metadata["task"], prefix.metadata["labels"]) == ("classification", LABELS)
    assert prefix.metadata["training"]["train"]["head_learning_rate"] == 0.01
    assert prefix.metadata["training"]["prefix"]["initialization"] == "random"

    result = run("evaluate", "mood.safetensors", "--data", "classification.jsonl", "--answers", "a.jsonl", "--record")
    assert result.out.splitlines()[0].split() == ["16", "rows", "accuracy", "%", "macro", "F1"]
    assert Path("mood.confusion.png").read_bytes().startswith(b"\x89PNG")
    answers = [json.loads(line)["prefix"] for line in Path("a.jsonl").read_text().splitlines()]
    right = sum(answer == row["label"] for answer, row in zip(answers, HEAD_ROWS["classification"], strict=True))
    picture = ["--json", "--confusion", "c.png"]
    told = json.loads(run("evaluate", "mood.safetensors", "--data", "classification.jsonl", *picture).out)
    assert told["metrics"]["prefix"]["accuracy"] == 100 * right / 16
    assert told["details"]["labels"]["good"].keys() == {"precision", "recall", "f1", "rows"}
    assert sum(map(sum, told["details"]["confusion"]["counts"])) == 16
    assert Path("c.png").exists()
    assert foreword.load("mood.safetensors").metadata["evaluation"]["metrics"] == told["metrics"]

    Path("ask.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in HEAD_ROWS["classification"]))
    lines = run("generate", "--rows", "ask.jsonl", "--prefix", "mood.safetensors").out.splitlines()
    assert [json.loads(line)["label"] for line in lines] == answers
    assert json.loads(lines[0]).keys() == {"text", "prefix", "label"}
    one = HEAD_ROWS["classification"][0]["text"]
    assert run("generate", one, "--prefix", "mood.safetensors").out.strip() == answers[0]
    assert "task=classification" in run("show", "mood.safetensors").out


@pytest.mark.feature("token classification head")
def test_train_and_answer_with_a_label_for_each_word(run, job):
    assert run(*job("token_classification", "pets.safetensors")).code == 0
    result = run("generate", "see owl owl", "--prefix", "pets.safetensors")
    assert len(result.out.split()) == 3
    assert set(result.out.split()) <= {"O", "B-PET", "I-PET"}
    result = run("evaluate", "pets.safetensors", "--data", "token_classification.jsonl")
    assert result.out.splitlines()[0].split() == ["8", "rows", "accuracy", "%", "F1"]
    assert Path("pets.confusion.png").exists()


@pytest.mark.feature("question answering head")
def test_train_and_answer_from_a_context(run, job):
    assert run(*job("question_answering", "who.safetensors")).code == 0
    lines = run("generate", "--rows", "question_answering.jsonl", "--prefix", "who.safetensors").out.splitlines()
    for line in map(json.loads, lines):
        assert line["answer"] in line["context"]
    result = run("evaluate", "who.safetensors", "--data", "question_answering.jsonl")
    assert result.out.splitlines()[0].split() == ["8", "rows", "exact", "match", "%", "F1"]
    for arguments, told in (
        (["generate", "who?", "--prefix", "who.safetensors"], "A question needs a context: give rows with --rows FILE"),
        (["generate", "--rows", "question_answering.jsonl", "--prefix", "who.safetensors", "--temperature", 1],
         "A head generates no text: leave out do_sample, temperature"),
        (["evaluate", "who.safetensors", "--data", "x.jsonl", "--confusion", "c.png"], "so there is no confusion matrix"),
        (["evaluate", "who.safetensors", "--data", "x.jsonl", "--compare", "base"], "is compared with nothing, got base"),
    ):  # fmt: skip
        result = run(*arguments)
        assert result.code == 2
        assert told in result.err


@pytest.mark.feature("classification head")
def test_prefixes_of_different_tasks_are_not_mixed(run, job, encoder_folder):
    assert run(*job("classification", "a.safetensors")).code == 0
    assert run(*job("token_classification", "b.safetensors")).code == 0
    result = run("generate", "see owl", "--prefix", "a.safetensors", "--prefix", "b.safetensors")
    assert result.code == 2
    assert "different tasks" in result.err
    assert run(*job("classification", "c.safetensors", "--seed", 3)).code == 0
    both = run("generate", "oh no", "--prefix", "a.safetensors", "--prefix", "c.safetensors").out.splitlines()
    for line, name in zip(both, "ac", strict=True):
        assert line == f"{name}: {run('generate', 'oh no', '--prefix', f'{name}.safetensors').out.strip()}"


@pytest.mark.feature("classification head")
def test_killed_run_resumes_to_the_same_prefix_and_head(encoder_folder, tmp_path):
    rows = write_rows(tmp_path, "classification")
    flags = "--task classification --virtual-tokens 4 --steps 12 --evaluate-every 4 --checkpoint-every 2 --precision float32"

    def command(out: str, *more: str) -> list[str]:
        where = ["--model", str(encoder_folder), "--data", str(rows), "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "foreword.cli", "train", *where, *flags.split(), *more]

    subprocess.run(command("whole.safetensors"), check=True, capture_output=True)
    running = subprocess.Popen(command("cut.safetensors"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert any("step 4/12" in line for line in running.stderr)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    running.stderr.close()
    assert not (tmp_path / "cut.safetensors").exists()
    subprocess.run(command("cut.safetensors", "--resume"), check=True, capture_output=True)
    whole, resumed = (foreword.load(tmp_path / name) for name in ("whole.safetensors", "cut.safetensors"))
    assert whole.head is not None
    assert dict(whole.named_parameters()).keys() == dict(resumed.named_parameters()).keys()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.feature("classification head")
def test_two_processes_give_the_head_of_one(encoder_folder, tmp_path):
    rows = write_rows(tmp_path, "classification")
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, accelerate, foreword\n"
        "from foreword import PrefixConfig, TrainConfig\n"
        "base = foreword.load_base(sys.argv[1], task='classification', labels=['bad', 'good'], precision='float32', device='cpu')\n"
        "config = TrainConfig(task='classification', steps=4, evaluate_every=2, dropout=False)\n"
        "prefix = foreword.train(base.model, base.tokenizer, sys.argv[2], PrefixConfig(4), config, run=sys.argv[3] + '.run')\n"
        "if accelerate.PartialState().is_main_process: foreword.save(prefix, sys.argv[3] + '.safetensors')\n"
    )
    arguments = [str(script), str(encoder_folder), str(rows)]
    subprocess.run([sys.executable, *arguments, str(tmp_path / "one")], check=True, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, *arguments, str(tmp_path / "two")], check=True, capture_output=True)
    one, two = (foreword.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
