"""Memory and speed of a training step by how the base is kept: python -m benchmarks.memory [--cases int8,...] [--out FILE].

On a GPU a Llama-shaped model of 1.24 billion random parameters, on a CPU `smollm2`. Each case loads the base anew and makes
optimizer steps as `foreword train` does, over a few batches that come again and again. Peak memory is what was allocated
at most, weights included (on a CPU: the weights, and the most that a step's tensors took beside them); milliseconds are the
median of the later half of the steps, when graphs are captured; the loss is that of the first and of the last batch, the same one.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.__main__ import LLAMA
from foreword import PrefixConfig, TrainConfig
from foreword.data import Example
from foreword.initialization import random_prefix
from foreword.loop import Run, Trainer
from foreword.memory import StepMemory
from foreword.models import machine_precision, model_folder
from foreword.quantized import quantization_config
from foreword.reparameterization import Reparameterization
from foreword.tasks import TASKS

CASES = {  # precision, gradient checkpointing
    "whole": (None, False),  # bfloat16 where the machine multiplies it natively
    "whole, checkpointing": (None, True),
    "int8": ("int8", False),
    "int4": ("int4", False),
    "fp8": ("fp8", False),
    "int4, checkpointing": ("int4", True),
}


def num_bytes(tensor: Any) -> int:
    """Of a weight, and of what a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    return tensor.nbytes + (0 if state is None else state.absmax.nbytes)


def measure(
    folder: str, precision: str | None, checkpointing: bool, rows: list[Example], options: argparse.Namespace
) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    before = torch.cuda.memory_allocated() if cuda else 0
    dtype = machine_precision(device)
    quantization = quantization_config(precision or "auto", dtype)
    kept = {} if quantization is None else {"quantization_config": quantization}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **kept).eval()
    model.requires_grad_(False)
    weights = sum(num_bytes(weight) for weight in model.parameters())
    config = TrainConfig(
        steps=100_000, batch_size=options.batch, compile=options.compile, gradient_checkpointing=checkpointing
    )
    start = Reparameterization(random_prefix(model, options.virtual_tokens), PrefixConfig(options.virtual_tokens))
    run = Run(start.to(device), config, rows)
    batches = [rows[first : first + options.batch] for first in range(0, len(rows), options.batch)]
    trainer = Trainer(model, TASKS["completion"], [run], Accelerator(cpu=not cuda))
    losses, seconds = [], []
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = options.rounds * len(batches) + 1
    with trainer, StepMemory(device) as memory:
        for number in range(steps):
            batch = batches[number % len(batches)]
            run.next_rows = lambda batch=batch: batch
            began = time.perf_counter()
            step = trainer.step([run])
            losses.append(sum(step.read()[1:]) / sum(step.labels))  # waits for the device
            seconds.append(time.perf_counter() - began)
            if not cuda:
                memory()
        peak = torch.cuda.max_memory_allocated() - before if cuda else weights + (memory.peak or 0)
        graphs = len(trainer.graphs._captured) if trainer.graphs is not None else 0
    later = statistics.median(seconds[steps // 2 :])
    tokens = statistics.mean(sum(len(row.input_ids) for row in batch) for batch in batches)
    return {
        "dtype": str(dtype).removeprefix("torch."), "weights_gib": round(weights / 2**30, 3), "peak_gib": round(peak / 2**30, 3), "ms": round(1000 * later, 1),
        "tokens_per_s": round(tokens / later), "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4),
        "graphs": graphs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="only those with this in their name")
    parser.add_argument("--model", default="smollm2", help="of a CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--virtual-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2, help="how many there are")
    parser.add_argument("--rounds", type=int, default=8, help="how often they all come")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda, draw = torch.cuda.is_available(), torch.Generator().manual_seed(0)
    shape = (options.batches * options.batch, options.length)
    ids = torch.randint(100, 200, shape, generator=draw)  # of few kinds, so that there is something to learn
    rows = [Example(tuple(row), 1) for row in ids.tolist()]
    report = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if cuda else model_folder(options.model)
        if cuda:
            torch.manual_seed(0)
            with torch.device("cuda"):
                AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16).save_pretrained(folder)
        print(
            "| base | weights, GiB | peak, GiB | ms a step | tokens/s | loss | CUDA graphs |\n|---|---|---|---|---|---|---|"
        )
        for name, (precision, checkpointing) in CASES.items():
            if options.cases is not None and options.cases not in name:
                continue
            torch.manual_seed(0)
            try:
                own = measure(folder, precision, checkpointing, rows, options)
            except Exception:  # noqa: BLE001  # the other cases are worth having
                traceback.print_exc()
                continue
            finally:
                gc.collect()
                torch.compiler.reset()
                if cuda:
                    torch.cuda.empty_cache()
            report.append({"case": name} | own)
            loss = f"{own['first_loss']} -> {own['last_loss']}"
            cells = [name, own["weights_gib"], own["peak_gib"], own["ms"], own["tokens_per_s"], loss, own["graphs"]]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.out is not None:
        machine = {"device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
                   "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
        text = json.dumps({"machine": machine} | vars(options) | {"out": None, "cases": report}, indent=1)
        options.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
