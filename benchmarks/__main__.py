"""Training speed beside other methods, on the same batches: make bench, or python -m benchmarks cpu|gpu ROWS.jsonl --out DIR.

In one process, round after round: each round takes a few batches, and every method makes an optimizer step on each, the methods in
another order each time. A figure is the median over the rounds; a ratio the median, and the range of the middle half, of
the rounds' ratios. Tokens are those of the rows, without padding.

The floor is arithmetic: 4 floating-point operations for each frozen parameter and token (the forward pass and the gradients
of activations; of the head's parameters for tokens with a label only), and those of causal attention, at the speed of a large
matrix product measured in the same run.
"""

import argparse
import copy
import gc
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from foreword import PrefixConfig, TrainConfig, load_base
from foreword.data import IGNORED, Example, encode, read_rows, schedule
from foreword.initialization import random_prefix
from foreword.loop import Run, Trainer
from foreword.reparameterization import Reparameterization
from foreword.tasks import TASKS

from .profiling import profile

LLAMA = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
DISTINCT = 8  # batches that the rounds go through


@dataclass(frozen=True)
class Case:
    """Rows of one shape (`length`), or those of the file; `labelled` is the share of their tokens that carry labels."""

    name: str
    model: str
    batch: int
    virtual_tokens: int
    precision: str = "bfloat16"
    length: int | None = None
    labelled: float = 1.0
    runs: int = 1  # that share each batch
    sorted: bool = (
        True  # rows of like length share a batch, as `foreword train` has it; else as they come, as most loops
    )
    methods: tuple[str, ...] = ("foreword", "PEFT prefix")
    bars: tuple[float, float | None] | None = (
        None  # times as fast as PEFT's prefix (or as runs in turn); share of its memory
    )


ALL = ("foreword", "PEFT prefix", "PEFT LoRA", "full fine-tuning")
PROFILES = {
    "gpu": [
        Case("8 x 512, P = 32, all labels", "llama", 8, 32, length=512, bars=(1.7, 0.6), methods=ALL),
        Case("8 x 512, P = 32, half labels", "llama", 8, 32, length=512, labelled=0.5, bars=(2.0, 0.5)),
        Case("16 x 1024, P = 64, half labels", "llama", 16, 64, length=1024, labelled=0.5, bars=(1.8, 0.5)),
        Case("4 x 2048, P = 2048", "llama", 4, 2048, length=2048, bars=(1.7, 0.7)),
        Case("E2E, batch 64, 1.24 B", "llama", 64, 16, sorted=False, bars=(3.0, 0.4), methods=ALL),
        Case("E2E sorted by length, batch 64, 1.24B", "llama", 64, 16, bars=(3.0, 0.4)),
        Case("E2E, batch 64, SmolLM2-135M", "file", 64, 16, sorted=False, bars=(5.0, 0.4), methods=ALL),
        Case("E2E sorted by length, batch 64, SmolLM2", "file", 64, 16, bars=(5.0, 0.4)),
        Case(
            "E2E, 8 runs at once, batch 8 each",
            "file",
            8,
            16,
            runs=8,
            methods=("foreword", "in turn"),
            bars=(3.0, None),
        ),
    ],
    "cpu": [
        Case("E2E, batch 8, bfloat16", "file", 8, 16, bars=(1.4, None), methods=ALL),
        Case("E2E, batch 8, float32", "file", 8, 16, precision="float32", bars=(1.4, None), methods=ALL),
    ],
}


class Method(NamedTuple):
    trained: int  # parameters
    step: Callable[[list[list[Example]]], object]  # one batch for each run
    close: Callable[[], None]


def foreword(model: Any, case: Case, rows: list[Example], compiled: bool, at_once: bool = True) -> Method:
    config = TrainConfig(steps=100_000, batch_size=case.batch, compile=compiled)
    starts = [random_prefix(model, case.virtual_tokens, seed) for seed in range(case.runs)]
    prefixes = [Reparameterization(start, PrefixConfig(case.virtual_tokens)).to(model.device) for start in starts]
    runs = [Run(prefix, config, rows) for prefix in prefixes]
    trainer = Trainer(model, TASKS["completion"], runs, Accelerator(cpu=model.device.type == "cpu"), case.runs)
    trainer.__enter__()

    def step(batches: list[list[Example]]) -> None:
        for run, batch in zip(runs, batches, strict=True):
            run.next_rows = lambda batch=batch: batch
        if at_once:
            trainer.step(runs)
        else:
            for run in runs:
                trainer.step([run])

    return Method(sum(p.numel() for p in prefixes[0].parameters()), step, lambda: trainer.__exit__())


def ordinary(model: Any) -> Method:
    """A step as most training loops make it: the model's own loss over a padded batch, AdamW over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    device = trained[0].device
    model.train()

    def step(batches: list[list[Example]]) -> None:
        ids = [torch.tensor(e.input_ids) for e in batches[0]]
        labels = [row.clone() for row in ids]
        for row, example in zip(labels, batches[0], strict=True):
            row[: example.prompt_length] = IGNORED
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        model(**{name: tensor.to(device) for name, tensor in inputs.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Method(sum(parameter.numel() for parameter in trained), step, lambda: None)


def make(name: str, model: Any, case: Case, rows: list[Example], compiled: bool) -> Method:
    """PEFT's methods as its documentation configures them for causal language models."""
    if name in ("foreword", "in turn"):
        return foreword(model, case, rows, compiled, at_once=name == "foreword")
    if name == "full fine-tuning":
        return ordinary(model.requires_grad_(True))
    import peft

    if name == "PEFT LoRA":
        return ordinary(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.virtual_tokens)
    return ordinary(peft.get_peft_model(model, config))


class Source:
    """Models and rows. A folder with a config and a tokenizer but no weights gives random ones: as fast, and small to carry."""

    def __init__(self, rows: Path, model: str, device: str) -> None:
        self.model, self.device = model, torch.device(device)
        bare = Path(model).is_dir() and not list(Path(model).glob("*.safetensors"))
        self.config = AutoConfig.from_pretrained(model) if bare else None
        tokenizer: Any = AutoTokenizer.from_pretrained(model) if bare else load_base(model, device="cpu").tokenizer
        self.rows, _ = encode(read_rows(str(rows))[0], tokenizer, tokenizer.chat_template, 1024)

    def load(self, case: Case) -> Any:
        """Each call its own copy."""
        config = copy.deepcopy(LLAMA if case.model == "llama" else self.config)  # a model writes into it
        if config is None:
            precision: Any = case.precision
            return load_base(self.model, precision=precision, device=str(self.device)).model
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.precision))
        return model.eval().requires_grad_(False)

    def batches(self, case: Case) -> tuple[list[Example], list[list[list[Example]]]]:
        """The rows, and batch after batch for each run."""
        if case.length is None:
            rows = self.rows
        else:
            draw = random.Random(0)
            tokens = [tuple(draw.choices(range(1000, 40_000), k=case.length)) for _ in range(4 * case.batch)]
            rows = [Example(own, round(case.length * (1 - case.labelled)) or 1) for own in tokens]
        lengths = [len(e.input_ids) if case.sorted else 0 for e in rows]
        order = [
            [batch for batch in schedule(lengths, case.batch, seed, 0) if len(batch) == case.batch]
            for seed in range(case.runs)
        ]
        return rows, [[[rows[i] for i in batch] for batch in own] for own in zip(*order, strict=True)]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_speed(precision: str, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=getattr(torch, precision), device=device) for _ in range(2))
    times = []
    for _ in range(20):
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def operations(model_config: Any, parameters: int, batch: Sequence[Example], virtual_tokens: int) -> float:
    """Of the forward pass and the gradients of activations."""
    config = model_config.get_text_config()
    head = config.vocab_size * config.hidden_size
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = [len(e.input_ids) for e in batch]
    pairs = sum(n * (n + 1) / 2 + n * virtual_tokens for n in lengths)
    # Two products forward, four backward, of 2 operations for each pair, head and dimension.
    attention = 12 * pairs * config.num_attention_heads * dim * config.num_hidden_layers
    return 4 * ((parameters - head) * sum(lengths) + head * sum(e.units for e in batch)) + attention


def measure(
    case: Case, source: Source, rounds: int, warm: int, steps: int, compiled: bool, profiled: bool = False
) -> dict[str, Any]:
    rows, batches = source.batches(case)
    batches = batches[:DISTINCT]
    gpu, chosen, peaks, config, parameters = source.device.type == "cuda", {}, {}, None, 0
    for name in case.methods:
        before = torch.cuda.memory_allocated() if gpu else 0
        model = source.load(case)
        weights = torch.cuda.memory_allocated() - before if gpu else 0
        config, parameters = model.config, model.num_parameters()
        chosen[name] = make(name, model, case, rows, compiled)
        if gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        reserved = torch.cuda.memory_reserved() if gpu else 0
        for number in range(warm if name in ("foreword", "in turn") else min(warm, len(batches))):
            chosen[name].step(batches[number % len(batches)])
        synchronize()
        if gpu:
            peaks[name] = {
                "allocated_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2),
                "reserved_gib": round((torch.cuda.max_memory_reserved() - reserved + weights) / 2**30, 2),
            }
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    tokens, counts, order = [], [], random.Random(0)
    for number in range(rounds):
        own = [batches[(number * steps + i) % len(batches)] for i in range(steps)]
        tokens.append(sum(len(e.input_ids) for batch in own for run in batch for e in run))
        counts.append(sum(len(run) for batch in own for run in batch))
        for name in order.sample(list(chosen), len(chosen)):
            synchronize()
            began = time.perf_counter()
            for batch in own:
                chosen[name].step(batch)
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    turn = itertools.cycle(batches)
    seen = profile(lambda: chosen["foreword"].step(next(turn)), len(batches)) if profiled else None
    for method in chosen.values():
        method.close()
    speed = product_speed(case.precision, source.device)
    needed = statistics.median(
        sum(operations(config, parameters, run, case.virtual_tokens) for run in batch) for batch in batches
    )
    floor = 1000 * needed / speed
    figures = []
    for name, method in chosen.items():
        own = seconds[name]
        ratios = sorted(other / first for first, other in zip(seconds["foreword"], own, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1000 * statistics.median(own) / steps
        figures.append({
            "method": name, "trained": method.trained, "ms": round(milliseconds, 2),
            "tokens_per_s": round(statistics.median(t / s for t, s in zip(tokens, own, strict=True))),
            "rows_per_s": round(statistics.median(r / s for r, s in zip(counts, own, strict=True)), 2),
            "times_foreword": [round(middle, 2), round(low, 2), round(high, 2)],
            "floors": round(milliseconds / floor, 2), **peaks.get(name, {}),
        })  # fmt: skip
    return {
        "case": case.name, "precision": case.precision, "batch": case.batch, "virtual_tokens": case.virtual_tokens,
        "rounds": rounds, "steps_a_round": steps, "compiled": compiled, "floor_ms": round(floor, 2),
        "product_tflops": round(speed / 1e12, 2), "bars": case.bars, "methods": figures,
        **({} if seen is None else {"kernels": seen}),
    }  # fmt: skip


def verdict(report: dict[str, Any]) -> str:
    """What was to be reached, and whether it was."""
    if report["bars"] is None:
        return ""
    time_bar, memory_bar = report["bars"]
    own, other = report["methods"][:2]
    told = [f"{other['times_foreword'][0]} x (aim {time_bar})"]
    if memory_bar is not None and "allocated_gib" in own:
        told.append(f"memory {own['allocated_gib'] / other['allocated_gib']:.2f} (aim {memory_bar})")
    return ", ".join(told)


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['case']}, {report['precision']}: {verdict(report)}; floor {report['floor_ms']} ms")
    print(
        "| method | trained | ms a step | tokens/s | rows/s | time, foreword = 1 | times the floor | peak GiB |\n|---|---|---|---|---|---|---|---|"
    )
    for f in report["methods"]:
        ratio, low, high = f["times_foreword"]
        cells = [
            f"{f['trained']:,}",
            f["ms"],
            f["tokens_per_s"],
            f["rows_per_s"],
            f"{ratio} ({low}-{high})",
            f["floors"],
            f.get("allocated_gib", "-"),
        ]
        print(f"| {f['method']} | " + " | ".join(map(str, cells)) + " |", flush=True)
    if seen := report.get("kernels"):
        print(f"\nForeword's step, profiled, {seen['ms']} ms:")
        for name, (ms, count) in seen["groups"].items():
            print(f"{ms:8.2f} ms {count:6}  {name}")
        for name, ms, count in seen["longest"]:
            print(f"{ms:8.3f} ms {count:6.1f}  {name}", flush=True)


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of each method, case by case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.9 * len(reports)), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens a second, PEFT's prefix tuning (or runs in turn) = 1")
    colours = {
        "foreword": "#c8472f",
        "PEFT prefix": "#9aa7b5",
        "in turn": "#9aa7b5",
        "PEFT LoRA": "#6b7f94",
        "full fine-tuning": "#3f4f60",
    }
    for number, report in enumerate(reports):
        base = report["methods"][1]["tokens_per_s"]
        for i, f in enumerate(report["methods"]):
            bar = axes.barh(number + 0.2 * i - 0.3, f["tokens_per_s"] / base, 0.18, color=colours[f["method"]])
            axes.bar_label(bar, [f"{f['method']} {f['tokens_per_s'] / base:.2f}"], padding=3, fontsize=7)
    axes.set_yticks(range(len(reports)), [report["case"] for report in reports])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=PROFILES)
    parser.add_argument("rows", type=Path, help="rows of prompt and completion, such as benchmarks/e2e_rows.py writes")
    parser.add_argument("--model", default="smollm2", help="of the cases with rows: an alias, or a folder")
    parser.add_argument("--cases", help="only those whose name contains this")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument(
        "--warm", type=int, default=2, metavar="N", help="steps before the first round, for compiling and capturing"
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers, as `foreword train --compile` does")
    parser.add_argument("--kernels", action="store_true", help="also what a step of Foreword's spends its time on")
    parser.add_argument("--out", type=Path, help="a folder for the figures as JSON and their plot")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = Source(options.rows, options.model, "cuda" if options.profile == "gpu" else "cpu")
    reports = []
    for case in PROFILES[options.profile]:
        if options.cases is None or options.cases in case.name:
            reports.append(
                measure(case, source, options.rounds, options.warm, options.steps, options.compile, options.kernels)
            )
            show(reports[-1])
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            torch.compiler.reset()
            if options.out is not None:
                machine = {
                    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
                    "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
                }  # fmt: skip
                options.out.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"machine": machine, "cases": reports}, indent=1)
                (options.out / f"training-{options.profile}.json").write_text(text + "\n", "utf-8")
                draw(reports, options.out / f"training-{options.profile}.png")


if __name__ == "__main__":
    main()
