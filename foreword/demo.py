"""`foreword demo`: two tasks, two prefixes, one model, a few minutes on a plain CPU."""

import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape

from .completion import METRICS, answer
from .config import PrefixConfig, TrainConfig
from .console import counting, human_bytes, out, table, training_bar
from .data import Row, read_rows
from .evaluation import Evaluation, evaluate
from .fingerprint import digest
from .models import Base
from .prefix import Prefix
from .store import load, save
from .training import train

__all__ = ["run_demo"]


class _Task(NamedTuple):
    name: str
    told: str
    metric: str


TASKS = (
    _Task("tickets", "a customer's message -> a JSON ticket", "exact_match"),
    _Task("products", "facts about a product -> a sentence in the shop's style", "rouge_l"),
)


def run_demo(base: Base, folder: Path, steps: int, rows: int) -> None:
    """Train both prefixes into `folder` and print what they change."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    parameters, untouched = base.model.num_parameters(), digest(base.model)
    out.print(f"[bold]{base.name}[/]: {parameters:,} parameters, frozen. Digest of its weights: {untouched[:16]}")
    held_out: dict[str, list[Row]] = {}
    prefixes: dict[str, Prefix] = {}
    for task in TASKS:
        out.print(f"\n[bold]Task {task.name}[/]: {task.told}")
        data = files("foreword") / "demo_data"
        with as_file(data / f"{task.name}.train.jsonl") as file, training_bar(steps) as show:
            config = TrainConfig(steps=steps, held_out_fraction=0.05)
            prefix = train(base.model, base.tokenizer, file, PrefixConfig(), config, on_step=show)
        with as_file(data / f"{task.name}.heldout.jsonl") as file:
            held_out[task.name] = read_rows(file)[0][:rows]
        path = save(prefix, folder / f"{task.name}.safetensors")
        prefixes[task.name] = load(path)
        with counting("answer", 3 * len(held_out[task.name])) as count:
            report = evaluate(base.model, base.tokenizer, held_out[task.name], prefix, on_rows=count)
        _show(task, report)
        out.print(
            f"{path}: {prefix.num_parameters:,} parameters, {prefix.num_parameters / parameters:.3%} of the model; "
            f"{human_bytes(path.stat().st_size)} against {human_bytes(4 * parameters)} for a fine-tuned copy"
        )
    out.print("\n[bold]Rows of both tasks in one batch[/], each with its own prefix")
    mixed = [
        (row, name) for pair in zip(*held_out.values(), strict=False) for row, name in zip(pair, held_out, strict=True)
    ]
    mixed = mixed[:6]
    texts = answer(
        base.model, base.tokenizer, [r for r, _ in mixed], [prefixes[n] for _, n in mixed], max_new_tokens=64
    )
    for (row, name), text in zip(mixed, texts, strict=True):
        out.print(f"  [bold]{name:8}[/] {escape(row.prompt)}\n           [green]{escape(text)}[/]")
    after = digest(base.model)
    assert after == untouched, "training changed the base"
    out.print(f"\nDigest of the model's weights: {after[:16]}, as before.")
    out.print(f"Done in {time.perf_counter() - began:.0f} s. Now with your own rows:\n")
    out.print(f"  foreword show {folder}/tickets.safetensors")
    out.print(f'  foreword generate "My lamp from order 5512 flickers." --prefix {folder}/tickets.safetensors')
    out.print(f"  foreword train --model {base.name} --data rows.jsonl --out mine.safetensors")
    out.print("  foreword evaluate mine.safetensors --data more-rows.jsonl")


def _show(task: _Task, report: Evaluation) -> None:
    """Figures of all contestants, and two rows as base and prefix answer them."""
    body = [[name, *(figures[key] for key in METRICS)] for name, figures in report.metrics.items()]
    out.print(table([f"{len(report.rows)} held-out rows", *METRICS.values()], body))
    for i, row in enumerate(report.rows[:2]):
        out.print(f"  {escape(row.prompt)}")
        out.print(f"    base    [red]{escape(_short(report.answers['base'][i]))}[/]")
        out.print(f"    prefix  [green]{escape(_short(report.answers['prefix'][i]))}[/]")


def _short(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
