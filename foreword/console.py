"""How the command talks: results on stdout, progress and everything else on stderr. Of several processes the first one talks."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from .loop import Progress as TrainingProgress

__all__ = ["counting", "err", "human_bytes", "is_first", "out", "table", "training_bar"]

is_first = os.environ.get("RANK", "0") == "0"
out = Console(highlight=False, soft_wrap=True, quiet=not is_first)
err = Console(stderr=True, highlight=False, quiet=not is_first)


@contextmanager
def training_bar(steps: int) -> Iterator[Callable[["TrainingProgress"], None]]:
    """A progress bar for training; yields what to call after each step."""
    bar = _bar(TextColumn("{task.fields[told]}"))
    with bar:
        task = bar.add_task("train", total=steps, told="")
        held_out = ""

        def show(progress: "TrainingProgress") -> None:
            nonlocal held_out
            if progress.held_out_loss is not None:
                held_out = f"  held out {progress.held_out_loss:.3f}"
                if not bar.console.is_terminal:
                    err.print(f"step {progress.step}/{steps}  loss {progress.loss:.3f}{held_out}")
            told = f"loss {progress.loss:.3f}{held_out}  {progress.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=progress.step, told=told)

        yield show


@contextmanager
def counting(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for `total` rows; yields what to call with the number of rows just done."""
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda rows: bar.advance(task, rows)


def _bar(*columns: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """A table with the first column to the left and the others to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    return made


def human_bytes(count: int) -> str:
    """Bytes as people read them."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
