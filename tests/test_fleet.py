"""A sweep on a Ray cluster: a lost worker's runs go on from their checkpoints, and a bad run harms no other."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from foreword import Prefix, PrefixConfig, TrainConfig, load, load_base, train
from foreword.errors import ConfigError
from foreword.fleet import train_fleet
from foreword.loop import Progress
from foreword.training import Job

ray = pytest.importorskip("ray", reason="pip install 'foreword[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore:.*:FutureWarning")
SMALL = PrefixConfig(4)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Any:
    """Two workers fit."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def watch(log: Path, name: str, dies_at: int | None) -> Callable[[Progress], None]:
    """Notes each step and its process; ends that process, the first time."""

    def step(progress: Progress) -> None:
        earlier = log.exists() and f'"{name}", {dies_at},' in log.read_text("utf-8")
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, progress.step, os.getpid()]) + "\n")
        if progress.step == dies_at and not earlier:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def test_all_runs_finish_though_a_worker_is_killed(model_folder, rows_file, tmp_path):
    configs = [TrainConfig(steps=8, batch_size=4, seed=seed, checkpoint_every=2, evaluate_every=4) for seed in range(4)]
    log, steps = tmp_path / "log", []
    jobs = [
        Job(str(rows_file), SMALL, config, run=tmp_path / f"{i}.run", on_step=watch(log, f"run {i}", 5 if i == 1 else None))
        for i, config in enumerate(configs)
    ]  # fmt: skip
    base = partial(load_base, str(model_folder), precision="float32", device="cpu")
    found = dict(train_fleet(base, jobs, workers=2, at_once=2, on_steps=steps.append))
    assert sorted(found) == [0, 1, 2, 3]
    assert sum(steps) == 4 * 8
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    own = [(step, process) for name, step, process in entries if name == "run 1"]
    [first, second] = list(dict.fromkeys(process for _, process in own))
    assert [step for step, process in own if process == first] == [1, 2, 3, 4, 5]
    assert [step for step, process in own if process == second] == [5, 6, 7, 8]  # from the checkpoint after step 4
    model, tokenizer, _ = base()
    for i, config in enumerate(configs):
        prefix, alone = found[i], train(model, tokenizer, str(rows_file), SMALL, config)
        assert isinstance(prefix, Prefix)
        for a, b in zip(prefix.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        list(train_fleet(base, jobs, workers=2))


def test_a_bad_run_is_told_and_the_others_are_written(run, model_folder, rows_file):
    Path("bad.jsonl").write_text('{"prompt": "no answer"}\n')
    Path("sweep.yaml").write_text(
        f"runs: [{{data: bad.jsonl}}, {{data: {rows_file}}}, {{data: {rows_file}, seed: 1, out: c.safetensors}}]"
    )
    asked = ["train", "--model", model_folder, "--data", rows_file, "--out", "a.safetensors", "--sweep", "sweep.yaml"]
    asked += ["--steps", 2, "--virtual-tokens", 4, "--precision", "float32", "--device", "cpu", "--on", "ray"]
    done = run(*asked, "--workers", 1)
    assert done.code == 1
    assert "a.bad.safetensors: bad.jsonl:1: " in done.err
    assert "1 of 3 runs failed" in done.err
    assert {line.split()[0] for line in done.out.splitlines()[1:]} == {"a.rows.safetensors", "c.safetensors"}
    assert load("c.safetensors").metadata["training"]["train"]["seed"] == 1
    Path("bad.jsonl").write_text('{"prompt": "an answer", "completion": "yes"}\n' * 3)
    assert run(*asked, "--resume").code == 0
    assert load("a.bad.safetensors").metadata["training"]["rows"] == 3


def test_what_does_not_go_with_a_cluster_says_why(run, model_folder, rows_file, tmp_path):
    Path("sweep.yaml").write_text("grid: {seed: [0, 1]}")
    asked = ["train", "--model", model_folder, "--data", rows_file, "--out", "a.safetensors"]
    sweep = ["--sweep", "sweep.yaml", "--on", "ray"]
    for more, told in (
        (["--on", "ray"], "give --sweep FILE as well"),
        (["--workers", 2], "give --on ray as well"),
        ([*sweep, "--shard"], "a base of its own: leave out --shard"),
        ([*sweep, "--device", "cuda:1"], "leave out --device cuda:1"),
    ):
        done = run(*asked, *more)
        assert (done.code, told in done.err) == (2, True), done.err
    done = run("train", "--model", tmp_path / "none", "--data", rows_file, "--out", "a.safetensors", *sweep)
    assert done.code == 2
    assert "Cannot load the model" in done.err
