"""Several runs from one file: what differs between them, where each goes, and a table of how they ended."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from .config import SHARED
from .console import err, human_bytes, is_first, out, table
from .errors import ConfigError, ForewordError
from .options import Options, check_names, read_options

__all__ = ["keep_results", "read_sweep"]

_SHARED = ("model", "precision", "device", "shard", "trust_remote_code", *SHARED)


def read_sweep(file: Path, config: Path | None, given: Mapping[str, Any]) -> list[Options]:
    """The options of each run of a sweep.

    The file holds `grid`, options with a list of values each, of which every combination is a run; or `runs`, a list of
    options for one run each; or both, then every run with every combination. Other options come from flags and `config`.
    A run without an `out` of its own is named after what it differs in: `tickets.safetensors` and seed 1 give
    `tickets.seed=1.safetensors`.

    Raises:
        ConfigError: the file cannot be read, names something else, differs in what all runs share, or two runs would write
            the same file.
    """
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content or set(content) - {"grid", "runs"}:
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{file}: expected `grid`, `runs` or both, got {got or 'nothing'}.")
    grid, runs = content.get("grid") or {}, content.get("runs") or [{}]
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"{file}: `grid` must map options to lists of values, for example seed: [0, 1, 2].")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file}: `runs` must be a list of options, for example - {{data: tickets.jsonl, seed: 1}}.")
    check_names([*grid, *(name for run in runs for name in run)], file)
    if shared := [name for name in _SHARED if name in grid or any(name in run for run in runs)]:
        raise ConfigError(f"{file}: all runs share {', '.join(shared)}. Give it as a flag, or in the file of --config.")
    made: dict[Path, Options] = {}
    for run in runs:
        for point in product(*([(name, value) for value in values] for name, values in grid.items())):
            own = run | dict(point)
            options = read_options(config, {**given, **own})
            if point or "out" not in run:
                differs = {name: value for name, value in own.items() if name not in ("out", "data", "held_out")}
                path = options.job.out
                names = [Path(own["data"]).stem] if "data" in own and "out" not in own else []
                names += [re.sub(r"[/\\\0\n]", "-", f"{name}={value}")[:60] for name, value in differs.items()]
                path = path.with_name(".".join([path.stem, *names]) + path.suffix)
                options = options._replace(job=replace(options.job, out=path))
            if options.job.out in made:
                raise ConfigError(f"{file}: two runs would write {options.job.out}. Give each an `out`.")
            made[options.job.out] = options
    return list(made.values())


def keep_results(sweep: Sequence[Options], results: Iterable[tuple[int, Any]]) -> None:
    """Write the prefix of each run as it ends, then print a table with the best on top.

    Args:
        sweep: the runs.
        results: of each run its number, and its prefix or what went wrong.

    Raises:
        ForewordError: some runs failed; the others are kept.
    """
    from .store import save

    rows, failed = [], 0
    for number, prefix in results:
        path = sweep[number].job.out
        if isinstance(prefix, str):
            failed += 1
            err.print(f"{path}: {escape(prefix)}")
            continue
        if not is_first:
            continue
        save(prefix, path)
        training = prefix.metadata["training"]
        loss, size = training["held_out_loss"], human_bytes(path.stat().st_size)
        shown = "-" if loss is None else f"{loss:.4f}"
        rows.append((loss, [str(path), shown, training["best_step"], training["steps"], size]))
        if training["skipped_rows"]:
            err.print(f"{path}: left out {training['skipped_rows']} bad rows.")
    ordered = sorted(rows, key=lambda row: (row[0] is None, row[0]))
    out.print(table(["prefix", "held-out loss", "at step", "of", "size"], [row for _, row in ordered]))
    if failed:
        raise ForewordError(
            f"{failed} of {len(sweep)} runs failed. Mend what is told above, then the same with --resume."
        )
