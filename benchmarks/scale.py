"""One GPU against several: speed, memory, what is exchanged, and whether the result is the same.

    python -m benchmarks.scale --processes 2 --out benchmarks/results/scale-gpu.json

It starts itself under torchrun: one process, several that share each batch, and several that share the base as well. The
model is Llama-shaped (1.24 B) with random weights, made on the GPU from a seed. Speed is told twice: the same batch for all
processes together (strong), and as many rows for each (weak). Equality: 20 steps over rows of many lengths, in bfloat16 and
in float32; beside it what rounding alone does: one process that takes each batch in two parts. `--tiny` tries it on a CPU.
"""

import argparse
import copy
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from foreword import PrefixConfig, TrainConfig
from foreword.data import Example
from foreword.initialization import random_prefix
from foreword.loop import Run, Trainer
from foreword.processes import add_up, from_first, join, leave, own_device, shard, world_size
from foreword.reparameterization import Reparameterization
from foreword.tasks import TASKS

from .__main__ import LLAMA

TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
CURVE, WARM, TIMED = 20, 4, 8  # steps
RATE = 0.01


class Bench:
    """What one of the processes does."""

    def __init__(self, tiny: bool, sharded: bool) -> None:
        self.tiny, self.sharded = tiny, sharded
        self.device = own_device("cpu" if tiny else None)
        self.gpu = self.device.type == "cuda"
        self.accelerator = join(self.device)
        self.world, self.first = world_size(), self.accelerator.is_main_process
        self.rows, self.length, self.virtual_tokens = (4, 32, 4) if tiny else (16, 1024, 64)  # of the largest batch

    def model(self, precision: str) -> Any:
        """The same weights in each process."""
        torch.manual_seed(0)
        with self.device:
            config = copy.deepcopy(TINY if self.tiny else LLAMA)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision))
        model.eval().requires_grad_(False)
        if self.sharded:
            shard(model, self.device)
        return model

    def run(self, model: Any, rows: list[Example], batch: int, parts: int = 1) -> Run:
        config = TrainConfig(steps=CURVE, batch_size=batch, micro_batches=parts, learning_rate=RATE, compile=False)
        drawn = random_prefix(model, self.virtual_tokens)
        own = PrefixConfig(self.virtual_tokens, initialization="random")
        return Run(Reparameterization(from_first(lambda: drawn), own).to(self.device), config, rows)

    def curve(self, model: Any, batch: int, longest: int, parts: int = 1) -> tuple[list[float], torch.Tensor]:
        """The losses of 20 steps over ragged rows, and how far each number of the prefix moved."""
        losses: list[float] = []
        run = self.run(model, make_rows(2 * batch, longest // 4, longest), batch, parts)
        run.on_step = lambda progress: losses.append(progress.loss)
        Trainer(model, TASKS["completion"], [run], self.accelerator).run()
        return losses, (run.prefix.vector() - run.prefix.start).detach().cpu()

    def speed(self, model: Any, batch: int) -> dict[str, Any]:
        """A step over equal rows, half of each labelled."""
        run = self.run(model, make_rows(2 * batch, self.length, self.length), batch)
        trainer = Trainer(model, TASKS["completion"], [run], self.accelerator)
        seconds = []
        with trainer:
            for number in range(WARM + TIMED):
                if number == WARM and self.gpu:
                    torch.cuda.reset_peak_memory_stats()
                self.wait()
                began = time.perf_counter()
                trainer.step([run])
                self.wait()
                seconds.append(time.perf_counter() - began)
        middle = statistics.median(seconds[WARM:])
        tokens = batch * self.length
        figures = {"rows": batch, "ms": round(1000 * middle, 2), "tokens_per_s": round(tokens / middle)}
        if self.gpu:
            figures["peak_gib"] = self.of_all(round(torch.cuda.max_memory_allocated() / 2**30, 2))
        return figures

    def exchange(self, count: int) -> dict[str, Any]:
        """How long summing a vector of `count` numbers takes alone."""
        vector, times = torch.ones(count, device=self.device), 50
        for _ in range(10):
            add_up([vector])
        self.wait()
        began = time.perf_counter()
        for _ in range(times):
            add_up([vector])
        self.wait()
        return {"bytes": 4 * count, "ms": round(1000 * (time.perf_counter() - began) / times, 3)}

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def of_all(self, value: Any) -> list[Any]:
        """The value of each process."""
        values: list[Any] = [None] * self.world
        if self.world == 1:
            return [value]
        dist.all_gather_object(values, value)
        return values

    def measure(self) -> dict[str, Any]:
        counted: list[int] = []
        reduce = dist.all_reduce

        def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counted.append(tensor.numel() * tensor.element_size())
            return reduce(tensor, *args, **kwargs)

        report: dict[str, Any] = {"processes": self.world, "sharded": self.sharded}
        model = self.model("bfloat16" if self.gpu else "float32")
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()
            report["weights_gib"] = self.of_all(round(torch.cuda.memory_allocated() / 2**30, 2))
        report["strong"] = self.speed(model, self.rows)
        if self.world > 1:
            report["weak"] = self.speed(model, self.rows * self.world)
        curves = {}
        curves["bfloat16"] = self.curve(model, self.rows, self.length // 2)
        if self.world == 1:
            curves["bfloat16, in two parts"] = self.curve(model, self.rows, self.length // 2, 2)
        del model
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
        model = self.model("float32")
        dist.all_reduce = count
        curves["float32"] = self.curve(model, self.rows // 2, self.length // 4)
        dist.all_reduce = reduce
        if self.world == 1:
            curves["float32, in two parts"] = self.curve(model, self.rows // 2, self.length // 4, 2)
        numbers = len(curves["float32"][1])
        report["prefix_bytes"], report["exchanged_bytes_a_step"] = 4 * numbers, sorted(set(counted))
        if self.world > 1:
            report["exchange"] = self.exchange(numbers)
        torch.save(curves, os.environ["CURVES"]) if self.first else None
        return report


def make_rows(count: int, shortest: int, longest: int) -> list[Example]:
    """Rows of few distinct tokens, so that there is something to learn; half of each is labelled."""
    draw = random.Random(0)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [Example(tuple(draw.choices(range(50), k=length)), length // 2) for length in lengths]


def differ(one: tuple[list[float], torch.Tensor], other: tuple[list[float], torch.Tensor]) -> dict[str, float]:
    """How far two runs are apart: losses at most, and the prefix's way, each as a share of the first one's."""
    losses = max(abs(a - b) / a for a, b in zip(one[0], other[0], strict=True))
    return {"losses": float(f"{losses:.2e}"), "prefix": float(f"{(one[1] - other[1]).norm() / one[1].norm():.2e}")}


def start(processes: int, sharded: bool, tiny: bool, curves: Path) -> dict[str, Any]:
    """Run the benchmark under torchrun; its report, or why there is none."""
    name = f"{processes} process{'es' if processes > 1 else ''}{', sharded' if sharded else ''}"
    print(f"{name} ...", file=sys.stderr, flush=True)
    result = curves.with_suffix(".json")
    flags = ["--worker", *(["--sharded"] if sharded else []), *(["--tiny"] if tiny else [])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"CURVES": str(curves), "RESULT": str(result), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    command = [*launch, "-m", "benchmarks.scale", *flags]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        told, _ = running.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        running.terminate()  # torchrun ends its processes
        told = "not done after 120 s\n" + running.communicate()[0]
    if running.returncode or not result.exists():
        own = [line for line in told.splitlines() if line.startswith("[rank0]")] or told.splitlines()
        return {"name": name, "failed": "\n".join(own[-40:])}
    return {"name": name, "seconds": round(time.perf_counter() - began, 1), **json.loads(result.read_text("utf-8"))}


def show(report: dict[str, Any]) -> None:
    print("\n| | rows | ms a step | tokens/s | peak GiB a process | weights GiB | bytes summed a step |")
    print("|---|---|---|---|---|---|---|")
    for case in report["cases"]:
        if "failed" in case:
            print(f"\n{case['name']} FAILED:\n{case['failed']}\n")
            continue
        for kind in ("strong", "weak"):
            if f := case.get(kind):
                cells = [f["rows"], f["ms"], f["tokens_per_s"], f.get("peak_gib", "-"), case.get("weights_gib", "-")]
                exchanged = " ".join(map(str, case["exchanged_bytes_a_step"])) or "-"
                print(f"| {case['name']}, {kind} | " + " | ".join(map(str, [*cells, exchanged])) + " |")
        if "exchange" in case:
            print(f"{case['name']}: summing {case['exchange']['bytes']} bytes alone takes {case['exchange']['ms']} ms")
    for name, apart in report["equality"].items():
        print(f"{name}: losses differ by at most {apart['losses']:.1e}, the prefix by {apart['prefix']:.1e} of its way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        bench = Bench(options.tiny, options.sharded)
        report = bench.measure()
        if bench.first:
            Path(os.environ["RESULT"]).write_text(json.dumps(report), "utf-8")
        leave()
        return
    cases, curves = [], []
    with tempfile.TemporaryDirectory() as folder:
        for processes, sharded in ((1, False), (options.processes, False), (options.processes, True)):
            file = Path(folder) / f"{processes}{sharded}.pt"
            cases.append(start(processes, sharded, options.tiny, file))
            curves.append(torch.load(file) if file.exists() else {})
    alone = curves[0]
    equality = {}
    for precision in ("bfloat16", "float32"):
        others = {f"{precision}, rounding alone": alone.get(f"{precision}, in two parts")}
        others |= {f"{precision}, {case['name']}": own.get(precision) for case, own in zip(cases, curves, strict=True)}
        for name, other in others.items():
            if precision in alone and other is not None and other is not alone[precision]:
                equality[name] = differ(alone[precision], other)
    curve = {precision: [round(loss, 5) for loss in own[0]] for precision, own in alone.items()}
    report = {
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            "count": torch.cuda.device_count(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "cases": cases, "equality": equality, "losses": curve,
    }  # fmt: skip
    show(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if failed := [case["name"] for case in cases if "failed" in case]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
