"""One GPU against several: speed, memory, what is exchanged, and whether the result is the same.

    python -m benchmarks.scale --out benchmarks/results/scale-gpu.json
    torchrun --nproc-per-node 2 -m benchmarks.scale --out benchmarks/results/scale-gpu.json
    torchrun --nproc-per-node 2 -m benchmarks.scale --shard --out benchmarks/results/scale-gpu.json

Each command adds its figures to the file, and tells them as they come; the first leaves its loss curves beside it, which the others
compare theirs with. The model is Llama-shaped (1.24 B) with random weights, made on the GPU from a seed. Speed is told
twice: the same batch for all processes together (strong), and as many rows for each (weak). Equality: a few steps over rows of many lengths,
in bfloat16 and in float32; beside it what rounding alone does: one process that takes each batch in two parts. `--tiny`
tries it on a CPU.
"""

import argparse
import copy
import gc
import json
import platform
import random
import statistics
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
WARM, TIMED = 3, 6  # steps
CURVES = {"bfloat16": 20, "float32": 8}  # steps
RATE = 0.01
Curve = tuple[list[float], torch.Tensor]  # the losses, and how far each number of the prefix moved


class Bench:
    """What one of the processes does; the first one tells and keeps it."""

    def __init__(self, tiny: bool, sharded: bool, out: Path | None) -> None:
        self.tiny, self.sharded, self.out = tiny, sharded, out
        self.device = own_device("cpu" if tiny else None)
        self.gpu = self.device.type == "cuda"
        self.accelerator = join(self.device)
        self.world, self.first = world_size(), self.accelerator.is_main_process
        self.rows, self.length, self.virtual_tokens = (4, 32, 4) if tiny else (16, 1024, 64)  # of the largest batch
        self.name = f"{self.world} process{'es' if self.world > 1 else ''}{', base spread' if sharded else ''}"
        self.began = time.perf_counter()

    def measure(self) -> None:
        model = self.model("bfloat16")
        if self.gpu:
            self.tell("weights, GiB", self.of_all(round(torch.cuda.memory_allocated() / 2**30, 2)))
        self.tell("strong", self.speed(model, self.rows))
        if self.world > 1:
            self.tell("weak", self.speed(model, self.rows * self.world))
        self.compare(model, "bfloat16", self.rows, self.length // 2)
        del model
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
        self.compare(self.model("float32"), "float32", self.rows // 2, self.length // 8)
        self.exchange()

    def tell(self, what: str, figures: Any) -> None:
        """Print it, and put it into the file."""
        if not self.first:
            return
        print(f"{self.name}, {what}: {json.dumps(figures)}  [{time.perf_counter() - self.began:.0f} s]", flush=True)
        if self.out is not None:
            report = json.loads(self.out.read_text("utf-8")) if self.out.exists() else {"cases": {}}
            report["machine"] = {
                "device": torch.cuda.get_device_name() if self.gpu else platform.processor() or "CPU",
                "torch": torch.__version__, "transformers": transformers.__version__,
            }  # fmt: skip
            report["cases"].setdefault(self.name, {})[what] = figures
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")

    def model(self, precision: str) -> Any:
        """The same weights in each process."""
        torch.manual_seed(0)
        with self.device:
            config = copy.deepcopy(TINY if self.tiny else LLAMA)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision))
        model.eval().requires_grad_(False)
        if self.sharded:
            shard(model, self.device)
            gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()
        return model

    def run(self, model: Any, rows: list[Example], batch: int, steps: int, parts: int = 1) -> Run:
        config = TrainConfig(steps=steps, batch_size=batch, micro_batches=parts, learning_rate=RATE, compile=False)
        drawn = random_prefix(model, self.virtual_tokens)
        own = PrefixConfig(self.virtual_tokens, initialization="random")
        return Run(Reparameterization(from_first(lambda: drawn), own).to(self.device), config, rows)

    def speed(self, model: Any, batch: int) -> dict[str, Any]:
        """A step over equal rows, half of each labelled."""
        run = self.run(model, make_rows(2 * batch, self.length, self.length), batch, WARM + TIMED)
        trainer = Trainer(model, TASKS["completion"], [run], self.accelerator)
        seconds = []
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()  # not later: a graph takes its memory when it is captured
        with trainer:
            for _ in range(WARM + TIMED):
                self.wait()
                began = time.perf_counter()
                trainer.step([run])
                self.wait()
                seconds.append(time.perf_counter() - began)
        middle = statistics.median(seconds[WARM:])
        figures = {"rows": batch, "ms": round(1000 * middle, 2), "tokens_per_s": round(batch * self.length / middle)}
        if self.gpu:
            figures["peak_gib"] = self.of_all(round(torch.cuda.max_memory_allocated() / 2**30, 2))
        return figures

    def compare(self, model: Any, precision: str, batch: int, longest: int) -> None:
        """The loss curve beside that of one process, or of one process beside itself with each batch in two parts."""
        own, summed = self.curve(model, precision, batch, longest)
        self.tell(f"losses in {precision}", [round(loss, 5) for loss in own[0]])
        file = None if self.out is None else self.out.with_name(f"{self.out.stem}.{precision}.pt")
        if self.world == 1:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(own, file)
            self.tell(f"rounding in {precision}", differ(own, self.curve(model, precision, batch, longest, 2)[0]))
            return
        self.tell("bytes summed a step", {"prefix": 4 * own[1].numel(), "found": sorted(set(summed))})
        if file is not None and file.exists():
            self.tell(f"apart from one process in {precision}", differ(torch.load(file), own))

    def curve(self, model: Any, precision: str, batch: int, longest: int, parts: int = 1) -> tuple[Curve, list[int]]:
        """What some steps over ragged rows do, and the bytes of every sum over the processes."""
        losses, summed, reduce = list[float](), list[int](), dist.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            summed.append(tensor.numel() * tensor.element_size())
            return reduce(tensor, *args, **options)

        run = self.run(model, make_rows(2 * batch, longest // 4, longest), batch, CURVES[precision], parts)
        run.on_step = lambda progress: losses.append(progress.loss)
        dist.all_reduce = counting
        try:
            Trainer(model, TASKS["completion"], [run], self.accelerator).run()
        finally:
            dist.all_reduce = reduce
        return (losses, (run.prefix.vector() - run.prefix.start).detach().cpu()), summed

    def exchange(self) -> None:
        """How long summing the prefix's gradient takes alone."""
        config: Any = TINY if self.tiny else LLAMA
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * self.virtual_tokens * config.num_hidden_layers * config.num_key_value_heads * head
        if self.world == 1:
            return
        vector, times = torch.ones(numbers, device=self.device), 50
        for _ in range(10):
            add_up([vector])
        self.wait()
        began = time.perf_counter()
        for _ in range(times):
            add_up([vector])
        self.wait()
        self.tell("sum alone", {"bytes": 4 * numbers, "ms": round(1000 * (time.perf_counter() - began) / times, 3)})

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


def make_rows(count: int, shortest: int, longest: int) -> list[Example]:
    """Rows of few distinct tokens, so that there is something to learn; half of each is labelled."""
    draw = random.Random(0)
    lengths = [draw.randint(max(2, shortest), longest) for _ in range(count)]
    return [Example(tuple(draw.choices(range(50), k=length)), length // 2) for length in lengths]


def differ(one: Curve, other: Curve) -> dict[str, float]:
    """How far two runs are apart: losses at most, and the prefix's way, each as a share of the first one's."""
    losses = max(abs(a - b) / a for a, b in zip(one[0], other[0], strict=True))
    return {"losses": float(f"{losses:.2e}"), "prefix": float(f"{(one[1] - other[1]).norm() / one[1].norm():.2e}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="spread the base over the processes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    options = parser.parse_args()
    Bench(options.tiny, options.shard, options.out).measure()
    leave()


if __name__ == "__main__":
    main()
