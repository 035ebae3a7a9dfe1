"""Several processes: they give what one gives, tell each other little, and agree on everything."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

import foreword
from foreword import PrefixConfig, TrainConfig, load_base, train
from foreword.errors import ConfigError
from foreword.processes import join, own_device
from foreword.training import Job, train_many

SMALL = PrefixConfig(4)
CONFIGS = {
    "plain": TrainConfig(steps=5, batch_size=5, evaluate_every=2, learning_rate=0.1),
    "split": TrainConfig(steps=4, batch_size=3, micro_batches=2, learning_rate=0.1),  # three parts for two processes
    "early": TrainConfig(steps=200, batch_size=4, learning_rate=3.0, evaluate_every=1, patience=3, averaging=0.0),
    "again": TrainConfig(steps=5, batch_size=5, evaluate_every=2, learning_rate=0.1, gradient_checkpointing=True),
    "other": TrainConfig(steps=3, batch_size=5, seed=1, learning_rate=0.1),
}

_TOGETHER = """
import json, os, signal, sys, torch.distributed as dist
from pathlib import Path
from foreword import ForewordError, PrefixConfig, TrainConfig, load_base, train
from foreword.processes import leave
from foreword.training import Job, train_many

folder, rows, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
configs = {name: TrainConfig(**config) for name, config in json.loads(sys.argv[4]).items()}
rank, summed, told, reduce, small = int(os.environ["RANK"]), [], {}, dist.all_reduce, PrefixConfig(4)

def counting(tensor, *args, **options):
    summed.append(tensor.numel() * tensor.element_size())
    return reduce(tensor, *args, **options)

def tell(name, *prefixes):
    told[name] = {
        "tensors": [[tensor.tolist() for tensor in prefix.parameters()] for prefix in prefixes],
        "steps": [prefix.metadata["training"]["steps"] for prefix in prefixes],
        "weights": [prefix.base["fingerprint"]["weights"] for prefix in prefixes],
        "summed": list(summed),
    }
    summed.clear()

def interrupt(progress):
    if rank == 1 and progress.step == 1:
        os.kill(os.getpid(), signal.SIGINT)

dist.all_reduce = counting
for way in ("whole", "sharded"):
    model, tokenizer, _ = load_base(folder, precision="float32", device="cpu", shard=way == "sharded")
    for name in ("plain", "split", "early", "again"):
        tell(f"{way} {name}", train(model, tokenizer, rows, small, configs[name]))
    tell(f"{way} two", *train_many(model, tokenizer, [Job(rows, small, configs[name]) for name in ("plain", "other")]))
    run, reasons = out / f"{way}.run", []
    for options in ({"on_step": interrupt}, {}):
        try:
            train(model, tokenizer, rows, small, configs["plain"], run=run, **options)
        except (KeyboardInterrupt, ForewordError) as error:
            reasons.append(repr(error)[:30])
    told[f"{way} reasons"] = reasons, [file.name for file in (run / "checkpoints").iterdir()]
    dist.barrier()
    tell(f"{way} resumed", train(model, tokenizer, rows, small, configs["plain"], run=run, resume=True))
(out / f"{rank}.json").write_text(json.dumps(told))
leave()
"""


def launch(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script or module under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*torchrun, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def one(model_folder) -> Any:
    return load_base(str(model_folder), precision="float32", device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of many lengths, so that processes have different numbers of labels."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["owl", "fox", "elk", "bee", "ant", "cat"] * 4
    made = [{"prompt": f"say {word}", "completion": f"{word} " * (1 + i % 5)} for i, word in enumerate(words)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return file


@pytest.fixture(scope="module")
def together(model_folder, rows, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes has to tell."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "together.py"
    script.write_text(_TOGETHER, "utf-8")
    done = launch(script, model_folder, rows, folder, json.dumps({n: asdict(c) for n, c in CONFIGS.items()}))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_two_processes_give_the_prefix_of_one(way, one, rows, together):
    first, second = together
    alone = {
        name: [train(one.model, one.tokenizer, str(rows), SMALL, CONFIGS[name])] for name in ("plain", "split", "early")
    }
    jobs = [Job(str(rows), SMALL, CONFIGS[name]) for name in ("plain", "other")]
    alone |= {"two": train_many(one.model, one.tokenizer, jobs)} | dict.fromkeys(("resumed", "again"), alone["plain"])
    assert alone["early"][0].metadata["training"]["steps"] < 200
    for name, prefixes in alone.items():
        told = first[f"{way} {name}"]
        assert told["tensors"] == second[f"{way} {name}"]["tensors"]  # to the last bit
        for prefix, tensors, steps, weights in zip(
            prefixes, told["tensors"], told["steps"], told["weights"], strict=True
        ):
            assert steps == prefix.metadata["training"]["steps"]
            assert weights == prefix.base["fingerprint"]["weights"]
            if name == "early":  # at such a learning rate rounding grows
                continue
            for own, other in zip(prefix.parameters(), tensors, strict=True):
                torch.testing.assert_close(own.data, torch.tensor(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_a_step_exchanges_the_gradient_of_the_prefix_in_one_piece(way, one, rows, together):
    """And a number for each run's loss, and one for whoever was interrupted; an evaluation one number a run."""
    vector = 4 * train(one.model, one.tokenizer, str(rows), SMALL, CONFIGS["split"]).num_parameters
    step, evaluation = vector + 4 + 4, 4
    for rank in together:
        assert rank[f"{way} plain"]["summed"] == [step, step, evaluation, step, step, evaluation, step, evaluation]
        assert rank[f"{way} two"]["summed"][0] == 2 * vector + 2 * 4 + 4


@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_one_that_is_interrupted_or_mistaken_stops_all(way, together):
    for rank in together:
        reasons, checkpoints = rank[f"{way} reasons"]
        assert [reason.partition("(")[0] for reason in reasons] == ["KeyboardInterrupt", "ConfigError"]
        assert checkpoints == ["step-000004"]


def test_a_failed_process_ends_the_others_and_the_run_goes_on_from_its_checkpoint(one, rows, model_folder, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "from foreword import PrefixConfig, TrainConfig, load_base, train\n"
        "config = TrainConfig(steps=5, batch_size=5, evaluate_every=2, learning_rate=0.1, checkpoint_every=2)\n"
        "model, tokenizer, _ = load_base(sys.argv[1], precision='float32', device='cpu')\n"
        "def fail(progress):\n"
        "    if os.environ['RANK'] == '1' and progress.step == 3: raise RuntimeError('out of luck')\n"
        "train(model, tokenizer, sys.argv[2], PrefixConfig(4), config, run=sys.argv[3], on_step=fail)\n",
        "utf-8",
    )
    done = launch(script, model_folder, rows, tmp_path / "a.run")
    assert done.returncode != 0
    assert "out of luck" in done.stderr
    config = replace(CONFIGS["plain"], checkpoint_every=2)
    steps: list[int] = []
    resumed = train(
        one.model, one.tokenizer, str(rows), SMALL, config,
        run=tmp_path / "a.run", resume=True, on_step=lambda progress: steps.append(progress.step),
    )  # fmt: skip
    assert steps[0] == 3
    for a, b in zip(
        resumed.parameters(), train(one.model, one.tokenizer, str(rows), SMALL, config).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_command_under_torchrun_writes_and_says_things_once(one, rows, model_folder, tmp_path):
    out, config = tmp_path / "owl.safetensors", CONFIGS["plain"]
    flags = (
        f"--virtual-tokens 4 --steps 5 --batch-size 5 --evaluate-every 2 --learning-rate {config.learning_rate}".split()
    )
    base = ["--model", model_folder, "--precision", "float32", "--device", "cpu", "--shard"]
    done = launch("-m", "foreword", "train", *base, "--data", rows, "--out", out, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("owl.safetensors: 4 virtual tokens") == 1
    metrics = [json.loads(line) for line in (tmp_path / "owl.run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4, 5]
    alone = train(one.model, one.tokenizer, str(rows), SMALL, config)
    for a, b in zip(foreword.load(out).parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_shared_says_why(run, model_folder, rows, monkeypatch):
    asked = ["train", "--model", model_folder, "--data", rows, "--out", "a.safetensors"]
    done = run(*asked, "--shard")
    assert (done.code, "but only one was started" in done.err) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    done = run("list")
    assert (done.code, "only foreword train shares its work" in done.err) == (2, True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="Process 3 of this machine has no device: there are 2"):
        own_device("cuda")
    with pytest.raises(ConfigError, match="device is cuda:1, but 4 processes were started"):
        own_device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert own_device("cuda") == torch.device("cuda", 3)
    assert own_device("cpu") == torch.device("cpu")
    configured = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("foreword.processes.Accelerator", lambda **_: configured)
    with pytest.raises(ConfigError, match="configured for FSDP, but nothing is wrapped"):
        join(torch.device("cpu"))
