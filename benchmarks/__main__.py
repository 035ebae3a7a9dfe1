"""Training speed beside other methods, on the same batches: python -m benchmarks ROWS.jsonl [--model smollm2] [--out DIR].

In one process, round after round: each round takes one batch, and every method makes one optimizer step on it, in another
order each time. A figure is the median over the rounds; a ratio to the first method the median, and the range of the middle
half, of the rounds' ratios. Peak memory is told on GPUs. Rows are padded to the longest of their batch; methods of one precision see the same tensors.

The floor is arithmetic: 4 floating-point operations for each parameter that tokens are multiplied with and each token (the
forward pass and the gradients of activations), at the speed of a large matrix product measured in the same run.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import Accelerator

from foreword import PrefixConfig, TrainConfig, attach, load_base
from foreword.completion import loss as completion_loss
from foreword.data import Example, collate, encode, read_rows, schedule
from foreword.initialization import random_prefix
from foreword.loop import Trainer
from foreword.reparameterization import Reparameterization

LENGTH = 16  # virtual tokens


class Method(NamedTuple):
    name: str
    trained: int  # parameters
    step: Callable[[list[Example]], object]


def foreword(model: Any, precision: str, config: TrainConfig) -> Method:
    prefix = Reparameterization(random_prefix(model, LENGTH), PrefixConfig(num_virtual_tokens=LENGTH), config.seed)
    trainer = Trainer(model, completion_loss, prefix, config, Accelerator(cpu=model.device.type == "cpu"), None)
    attach(model, prefix)
    return Method(f"foreword, {precision}", sum(p.numel() for p in prefix.parameters()), trainer.step)


def peft(kind: str, model: Any, precision: str) -> Method:
    """As PEFT's documentation configures them for causal language models."""
    import peft

    configs: dict[str, Any] = {
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
        "LoRA": peft.LoraConfig(task_type="CAUSAL_LM"),
    }
    return ordinary(f"PEFT {kind}, {precision}", peft.get_peft_model(model, configs[kind]))


def full(model: Any, precision: str) -> Method:
    return ordinary(f"full fine-tuning, {precision}", model.requires_grad_(True))


def ordinary(name: str, model: Any) -> Method:
    """A step as most training loops make it: the model's own loss over a padded batch, AdamW over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    model.train()

    def step(examples: list[Example]) -> None:
        batch = collate(examples, next(iter(trained)).device)
        mask = torch.tensor([[i < len(e.input_ids) for i in range(batch.input_ids.shape[1])] for e in examples])
        mask = mask.long().to(batch.input_ids.device)
        model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Method(name, sum(parameter.numel() for parameter in trained), step)


def methods(options: argparse.Namespace, config: TrainConfig) -> Iterator[Method]:
    for precision in options.precisions:

        def base(precision: Any = precision) -> Any:
            return load_base(options.model, precision=precision, device=options.device).model  # each its own copy

        yield foreword(base(), precision, config)
        yield peft("prefix", base(), precision)
        yield peft("LoRA", base(), precision)
        if not options.without_full:
            yield full(base(), precision)


def _template(tokenizer: Any) -> str | None:
    return tokenizer.chat_template


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(20):
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def measure(chosen: list[Method], batches: list[list[Example]], rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {method.name: [] for method in chosen}
    peaks: dict[str, int] = {}  # how far GPU memory rose above where it stood
    order = random.Random(0)
    for number in range(rounds + 1):  # the first warms up
        for method in order.sample(chosen, len(chosen)):
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            synchronize()
            began = time.perf_counter()
            method.step(batches[number % len(batches)])
            synchronize()
            if number:
                seconds[method.name].append(time.perf_counter() - began)
            if torch.cuda.is_available():
                peaks[method.name] = max(peaks.get(method.name, 0), torch.cuda.max_memory_allocated() - before)
                torch.cuda.reset_peak_memory_stats()
        print(f"round {number} of {rounds}", end="\r", flush=True)
    tokens = [sum(len(e.input_ids) for e in batches[(i + 1) % len(batches)]) for i in range(rounds)]
    rows = [len(batches[(i + 1) % len(batches)]) for i in range(rounds)]
    first = seconds[chosen[0].name]
    figures = []
    for method in chosen:
        own = seconds[method.name]
        low, middle, high = statistics.quantiles([b / a for a, b in zip(first, own, strict=True)], n=4)
        figures.append({
            "method": method.name,
            "trained": method.trained,
            "ms": round(1000 * statistics.median(own), 1),
            "tokens_per_s": round(statistics.median(t / s for t, s in zip(tokens, own, strict=True)), 1),
            "rows_per_s": round(statistics.median(r / s for r, s in zip(rows, own, strict=True)), 2),
            "times_first": [round(middle, 2), round(low, 2), round(high, 2)],
            "peak_mib": round(peaks[method.name] / 2**20) if method.name in peaks else None,
        })  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="rows of prompt and completion")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default=None)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without-full", action="store_true", help="leave full fine-tuning out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = load_base(options.model, device=options.device)
    examples, _ = encode(read_rows(options.rows)[0], base.tokenizer, _template(base.tokenizer), 1024)
    lengths = [len(example.input_ids) for example in examples]
    batches = [[examples[i] for i in batch] for batch in schedule(lengths, options.batch_size, 0, 0)]
    config = TrainConfig(steps=10_000, batch_size=options.batch_size)
    figures = measure(list(methods(options, config)), batches, options.rounds)
    multiplied = base.model.num_parameters()  # tied embeddings: the head multiplies as many as are looked up
    tokens = statistics.median(sum(len(e.input_ids) for e in batch) for batch in batches)
    floors = {}
    for precision in options.precisions:
        speed = product_speed(getattr(torch, precision), base.model.device)
        floors[precision] = {"gflops": round(speed / 1e9), "ms": round(1000 * 4 * multiplied * tokens / speed, 1)}
    report = {
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "median_tokens": tokens,
        "floor": floors,
        "methods": figures,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"\n{options.batch_size} rows a step, {tokens:.0f} tokens in the middle; floor {floors}\n")
    print(
        "| method | trained | ms a step | tokens/s | rows/s | time, first = 1 | peak MiB |\n|---|---|---|---|---|---|---|"
    )
    for f in figures:
        ratio, low, high = f["times_first"]
        cells = [
            f"{f['trained']:,}",
            f["ms"],
            f["tokens_per_s"],
            f["rows_per_s"],
            f"{ratio} ({low}-{high})",
            "-" if f["peak_mib"] is None else f["peak_mib"],
        ]
        print(f"| {f['method']} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
