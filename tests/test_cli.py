"""The command as a user types it: output, errors and exit codes."""

import json
import re
from pathlib import Path

import pytest
from tiny import ROWS
from zoo import make_model

import foreword
from foreword.initialization import random_prefix


@pytest.fixture
def quick(model_folder, rows_file) -> list[object]:
    return ["--model", model_folder, "--data", rows_file, "--steps", 4, "--virtual-tokens", 4, "--precision", "float32"]


@pytest.fixture
def trained(run, quick) -> Path:
    assert run("train", *quick, "--out", "owl.safetensors").code == 0
    return Path("owl.safetensors")


def test_train_writes_prefix_and_run_folder(run, quick):
    result = run("train", *quick, "--out", "owl.safetensors", "--learning-rate", 0.01, "--no-freeze-first")
    assert result.code == 0
    assert "owl.safetensors: 4 virtual tokens, 384 parameters" in result.out
    assert {p.name for p in Path("owl.run").iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "start.safetensors",
    }
    training = foreword.load("owl.safetensors").metadata["training"]
    assert training["train"]["learning_rate"] == 0.01
    assert training["prefix"]["freeze_first"] is False


def test_config_file_has_the_same_fields_and_flags_win(run, quick, model_folder, rows_file):
    Path("job.yaml").write_text(
        f"model: {model_folder}\ndata: {rows_file}\nvirtual_tokens: 3\nsteps: 2\nlearning_rate: 1e-2\nskip_bad_rows: true\n"
    )
    assert run("train", "--config", "job.yaml", "--virtual-tokens", 5, "--out", "a.safetensors").code == 0
    prefix = foreword.load("a.safetensors")
    assert prefix.num_virtual_tokens == 5
    assert prefix.metadata["training"]["train"]["learning_rate"] == 0.01
    for content, told in (
        ("virtual_token: 3", "no such option: virtual_token. Known: model, data"),
        ("steps: many", "job.yaml: steps: got 'many', expected a valid integer"),
        ("initialization: zeros", "expected 'demonstrations', 'text', 'random' or 'noop'"),
        ("- steps", "expected `option: value` lines"),
        ("a: b: c", "not YAML"),
    ):
        Path("job.yaml").write_text(content)
        result = run(
            "train", "--config", "job.yaml", "--model", model_folder, "--data", rows_file, "--out", "b.safetensors"
        )
        assert result.code == 2
        assert told in result.err


def test_every_option_is_a_flag_and_explained(run):
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("train", "--help").out).split())
    for flag in (
        "--virtual-tokens",
        "--init-text",
        "--reparameterization",
        "--patience",
        "--tracker",
        "--held-out",
        "--seed",
    ):
        assert flag in text
    assert "[default: (16)]" in text
    assert "evaluations without improvement" in text.replace("Evaluations", "evaluations")


def test_evaluate_prints_figures_beside_base_and_demonstrations(run, trained, rows_file):
    result = run("evaluate", trained, "--data", rows_file, "--max-new-tokens", 4, "--answers", "answers.jsonl")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["prefix", "base", "demonstrations"]
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(ROWS)
    assert answers[0].keys() == {"prompt", "references", "prefix", "base", "demonstrations"}
    result = run(
        "evaluate", trained, "--data", rows_file, "--compare", "none", "--json", "--record", "--max-new-tokens", 2
    )
    assert json.loads(result.out)["metrics"].keys() == {"prefix"}
    assert foreword.load(trained).metadata["evaluation"]["rows"] == len(ROWS)
    nowhere = run("evaluate", trained, "--data", rows_file, "--answers", "nowhere/answers.jsonl")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "nowhere does not exist" in nowhere.err
    assert (
        "goes with no other"
        in run("evaluate", trained, "--data", rows_file, "--compare", "none", "--compare", "base").err
    )


def test_run_that_had_ended_is_not_written_again(run, quick, trained, rows_file):
    run("evaluate", trained, "--data", rows_file, "--compare", "none", "--record", "--max-new-tokens", 2)
    before = trained.read_bytes()
    again = run("train", *quick, "--out", trained, "--resume")
    assert again.code == 0
    assert "This run had ended" in again.err
    assert trained.read_bytes() == before
    assert "train.steps: then 4, now 6" in run("train", *quick, "--out", trained, "--resume", "--steps", 6).err


def test_generate_answers_with_each_prefix(run, quick, trained):
    assert run("train", *quick, "--out", "elk.safetensors", "--seed", 1).code == 0
    one = run("generate", "say owl twice", "--prefix", trained, "--max-new-tokens", 5)
    both = run("generate", "say owl twice", "--prefix", trained, "--prefix", "elk.safetensors", "--max-new-tokens", 5)
    assert both.out.startswith(f"owl: {one.out.strip()}")
    assert "elk: " in both.out
    Path("ask.jsonl").write_text('{"prompt": "say owl twice", "prefix": "elk"}\n{"prompt": "say owl twice"}\n')
    result = run(
        "generate", "--rows", "ask.jsonl", "--prefix", trained, "--prefix", "elk.safetensors", "--max-new-tokens", 5
    )
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [a["prefix"] for a in answers] == ["elk", "owl", "elk"]
    assert answers[0] == answers[2]
    sampled = [
        run("generate", "hi", "--prefix", trained, "--temperature", 2, "--seed", seed, "--max-new-tokens", 9).out
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_list_and_show(run, trained):
    run("evaluate", trained, "--data", "rows.jsonl", "--compare", "none", "--record")
    Path("broken.safetensors").write_bytes(b"x" * 20)
    result = run("list")
    assert "owl" in result.out
    assert "passed over: broken.safetensors: not a whole safetensors file" in result.err
    [entry] = json.loads(run("list", "--json").out)
    assert (entry["name"], entry["virtual_tokens"]) == ("owl", 4)
    shown = run("show", trained)
    for told in (
        "384 parameters",
        "real tokens start at position 4",
        "model.layers.2.self_attn",
        "[4, 2, 8]",
        "steps=4",
    ):
        assert told in shown.out
    about = json.loads(run("show", trained, "--json").out)
    assert about["parameters"] == 384
    assert about["training"]["rows"] == 22


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["train"], 2, "Missing: --model, --data, --out"),
        (["train", "--steps", "many"], 2, "Invalid value for '--steps'"),
        (["train", "--nosuch"], 2, "No such option"),
        (["train", "--model", "m", "--data", "d.jsonl", "--out", "x.pt"], 2, "a prefix file is named *.safetensors"),
        (
            ["train", "--model", "nosuch/model", "--data", "d", "--out", "x.safetensors"],
            2,
            "Cannot load the model 'nosuch/model'",
        ),
        (["show", "none.safetensors"], 1, "none.safetensors: no such file"),
        (["list", "none"], 1, "none: no such folder"),
        (["generate"], 2, "Give either a prompt, or rows"),
        (["generate", "hi"], 2, "Give a prefix with --prefix FILE"),
        (["evaluate", "none.safetensors", "--data", "x"], 1, "no such file"),
        (["nosuch"], 2, "No such command"),
    ],
)
def test_mistakes_end_in_one_message(run, arguments, code, told):
    result = run(*arguments)
    assert result.code == code
    assert told in result.err
    assert result.out == ""


def test_data_mistakes_leave_nothing_behind(run, quick):
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    arguments = ["train", *quick, "--data", "bad.jsonl", "--out", "a.safetensors"]
    result = run(*arguments)
    assert (result.code, Path("a.run").exists()) == (1, False)
    assert 'bad.jsonl:2: no "completion"' in result.err
    assert run(*arguments, "--skip-bad-rows", "--num-demonstrations", 1).code == 2
    result = run(*arguments, "--skip-bad-rows", "--initialization", "random")
    assert result.code == 0
    assert "Left out 1 bad rows" in result.err


def test_prefix_of_another_base_is_refused(run, trained, tmp_path):
    from tiny import make_tokenizer

    make_model("llama", seed=3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    result = run("generate", "hi", "--prefix", trained, "--model", tmp_path / "other")
    assert result.code == 1
    assert "other weights" in result.err


def test_prefixes_of_two_bases_are_not_mixed(run, trained):
    gpt2 = random_prefix(make_model("gpt2"), 3)
    foreword.save(gpt2, "gpt2.safetensors")
    result = run("generate", "hi", "--prefix", trained, "--prefix", "gpt2.safetensors")
    assert result.code == 2
    assert "different bases" in result.err


def test_sweep_trains_every_run_into_a_file_of_its_own(run, model_folder, rows_file, tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid: {seed: [0, 1], virtual_tokens: [3, 4]}", "utf-8")
    asked = [
        "train",
        "--model",
        model_folder,
        "--data",
        rows_file,
        "--out",
        "a.safetensors",
        "--steps",
        2,
        "--sweep",
        sweep,
    ]
    done = run(*asked, "--at-once", 3)
    assert done.code == 0, done.err
    names = {f"a.seed={seed}.virtual_tokens={length}.safetensors" for seed in (0, 1) for length in (3, 4)}
    assert {path.name for path in tmp_path.glob("a*.safetensors")} == names
    assert all(name in done.out for name in names)
    assert foreword.load(tmp_path / "a.seed=1.virtual_tokens=4.safetensors").num_virtual_tokens == 4
    assert "holds an earlier run" in run(*asked).err
    sweep.write_text("runs: [{initialization: text, init_text: Answer yes/no., virtual_tokens: 4}]", "utf-8")
    done = run(*asked)
    assert done.code == 0, done.err
    assert (tmp_path / "a.initialization=text.init_text=Answer yes-no..virtual_tokens=4.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [0, 1]", "expected `grid`, `runs` or both, got seed"),
        ("grid: {sead: [0]}", "no such option: sead"),
        ("grid: {seed: 0}", "must map options to lists"),
        ("runs: [{model: other}]", "all runs share model"),
        ("runs: [{seed: 0}, {seed: 0}]", "two runs would write"),
        ("[1", "cannot be read as YAML"),
    ],
)
def test_sweep_that_cannot_be_read_says_why(text, message, run, tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(text, "utf-8")
    done = run("train", "--model", "m", "--data", "d.jsonl", "--out", "a.safetensors", "--sweep", sweep)
    assert done.code == 2
    assert message in done.err
