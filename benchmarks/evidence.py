"""Measure docs/results.md's comparisons: python benchmarks/evidence.py OUT --data FOLDER --plans e2e low-data [--seconds 540].

FOLDER holds e2e/, webnlg/, sst2/ and rte/ as e2e_rows.py, webnlg_rows.py and label_rows.py write them. A plan is a list of
cells (a data set, how many rows, a method), in their order of importance. For each cell learning rates are tried, then every
seed is trained, answered and measured; --workers processes share the devices. Each result is one JSON file in OUT as soon as
it is there; what lies in OUT, or in a folder of --done, is not run again, so the same command goes on after an interruption.
After --seconds no run is started that would not end in time. --tiny runs every cell in a few steps, to see that it works.

evidence_tables.py makes the tables of the results.
"""

import argparse
import json
import os
import platform
import queue
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Cell:
    """What is trained on what, and how. `rows`: all if `None`; then validation rows are 512, else 0.3 times as many."""

    plan: str
    data: str
    method: str  # as in `foreword compare --methods`
    rows: int | None = None
    seeds: int = 3
    steps: int = 660  # of 64 rows: an epoch of E2E
    tuning_steps: int | None = 150
    batch: int = 64
    tries: int = 3
    beams: int = 5
    averaging: float = 0.0
    model: str = "smollm2"
    metrics: tuple[str, ...] = ("bleu", "nist", "rouge_l")

    @property
    def key(self) -> str:
        return re.sub(r"[^\w.-]+", "-", f"{self.plan}.{self.rows or 'all'}.{self.method}")


# adapter:58 has 3.0 % of the parameters of SmolLM2-135M, adapter:1 0.08 %; prefix:16 0.14 %, prefix:58 0.50 %.
_ALL = (
    "full",
    "prefix:16",
    "prefix:58",
    "lora:8",
    "peft-prefix:16",
    "prompt:20",
    "adapter:1",
    "adapter:58",
    "few-shot",
    "base",
)
_FEW = ("prefix:16", "full", "prompt:20")
_FOUR = ("full", "prefix:16", "lora:8", "prompt:20")
_SIZES = (50, 500, 100, 200)
_WORDS = ("exact_match",)


def _plans() -> dict[str, list[Cell]]:
    few: dict[str, Any] = {"steps": 300, "tuning_steps": None, "batch": 4}
    labels: dict[str, Any] = {"steps": 600, "batch": 32, "beams": 1, "metrics": _WORDS}
    averaged: dict[str, Any] = {**few, "averaging": 0.95}  # the default of the library
    return {
        "e2e": [Cell("e2e", "e2e", method, seeds=1 if method == "base" else 3) for method in _ALL],
        "low-data": [Cell("low-data", "e2e", m, rows, **few) for rows in _SIZES for m in _FEW],
        **{
            plan: [Cell(plan, "e2e", m, rows, beams=beams, **averaged) for rows in _SIZES for m in (*_FEW, "prefix:58")]
            for plan, beams in (("few-averaged", 5), ("few-greedy", 1))
        },
        "webnlg": [Cell("webnlg", "webnlg", m, steps=560) for m in ("full", "prefix:58", "lora:8", "prompt:20", "adapter:58")],
        "sst2": [Cell("sst2", "sst2", m, **labels) for m in _FOUR],
        # After 150 steps on RTE the prefix is still at chance, and a try says nothing about its learning rate.
        "rte": [Cell("rte", "rte", m, **{**labels, "tuning_steps": None, "averaging": 0.95}) for m in _FOUR],
        "gemma": [
            Cell("gemma", "e2e", m, 500, model="gemma3", seeds=1 if m == "base" else 3, **averaged)
            for m in (*_FEW, "lora:8", "peft-prefix:16", "base")
        ],
    }  # fmt: skip


def tiny(cell: Cell) -> Cell:
    return replace(cell, steps=4, tuning_steps=cell.tuning_steps and 2, batch=4, tries=2, seeds=min(cell.seeds, 2))


# ------------------------------------------------------------------------------------------------------- one process


@cache
def _base(name: str) -> Any:
    import transformers

    from foreword import load_base

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load_base(name)


@cache
def _rows(folder: Path, model: str, part: str) -> Any:
    """Encoded rows, and the rows themselves."""
    from foreword.completion import about, encode
    from foreword.data import read_rows

    base = _base(model)
    raw = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()]
    rows, _ = read_rows(raw)
    if part == "test":
        return rows, [entry.get("group") for entry in raw]
    return encode(rows, base.tokenizer, about(base.model, base.tokenizer), 1024)[0]


def _bench(cell: Cell, model: str, folder: Path, seed: int, test_rows: int | None) -> Any:
    from foreword import TrainConfig
    from foreword.comparison import Bench, draw

    valid = _rows(folder / cell.data, model, "valid")
    test, _ = _rows(folder / cell.data, model, "test")
    held_out = draw(valid, min(len(valid), 512 if cell.rows is None else round(0.3 * cell.rows)), seed)
    every = max(1, min(25, cell.steps // 10))
    # The best step is kept, but nothing stops early: every method gets all of its steps.
    config = TrainConfig(
        steps=cell.steps, batch_size=cell.batch, evaluate_every=every, patience=10**6, averaging=cell.averaging
    )
    return Bench(
        _base(model), held_out, test[:test_rows], config, cell.tries, cell.tuning_steps, cell.metrics, cell.beams,
        max_new_tokens=80, answer_batch=128 if cell.beams > 1 else 512,
    )  # fmt: skip


def work(cell: Cell, seed: int | None, rate: float, model: str, folder: Path, test_rows: int | None) -> dict[str, Any]:
    """The tries of a cell, if `seed` is `None`; else the run of a seed."""
    from foreword.comparison import entries, run_once, tune

    bench = _bench(cell, model, folder, seed or 0, test_rows)
    (entry,), rows = entries(cell.method), _rows(folder / cell.data, model, "train")
    count = cell.rows or len(rows)
    if seed is None:
        rate, tries, fitted = tune(bench, entry, rows, count)
        found = {"learning_rate": rate, "tries": tries}
        if fitted is None:
            return found
        run = run_once(bench, entry, rows, count, rate, 0, fitted)  # the best try is the first run
        return found | {"run": _grouped(cell, run, bench, model, folder)}
    return _grouped(cell, run_once(bench, entry, rows, count, rate, seed), bench, model, folder)


def _grouped(cell: Cell, run: dict[str, Any], bench: Any, model: str, folder: Path) -> dict[str, Any]:
    """The run with the figures of each group of its test rows."""
    from foreword.completion import measure

    groups = _rows(folder / cell.data, model, "test")[1][: len(bench.test)]
    run["groups"] = {
        group: measure(
            [a for a, own in zip(run["answers"], groups, strict=True) if own == group],
            [row for row, own in zip(bench.test, groups, strict=True) if own == group],
            cell.metrics,
        )
        for group in sorted({group for group in groups if group})
    }
    return run


def worker(inbox: Any, results: Any, number: int, workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if devices := torch.cuda.device_count():
        torch.cuda.set_device(number % devices)
    while (job := inbox.get()) is not None:
        key, arguments = job
        began = time.perf_counter()
        try:
            found = work(*arguments)
        except Exception as error:  # noqa: BLE001  # one cell that fails does not end the others
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes want it
        results.put((key, found | {"all_seconds": round(time.perf_counter() - began, 1)}))


# --------------------------------------------------------------------------------------------------------- all of it


def stored(folders: list[Path]) -> dict[str, Any]:
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    found = {file.stem: json.loads(file.read_text("utf-8")) for file in files}
    return {key: result for key, result in found.items() if "error" not in result}


def keep(folder: Path, key: str, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = folder / f"{key}.writing"
    aside.write_text(json.dumps(result, ensure_ascii=False) + "\n", "utf-8")
    aside.rename(folder / f"{key}.json")


def ready(cells: list[Cell], found: dict[str, Any], begun: set[str]) -> Iterator[tuple[str, Cell, int | None]]:
    """What can be run now, the most important first: the tries of a cell, then its seeds."""
    for cell in cells:
        if f"{cell.key}.tries" not in found:
            if f"{cell.key}.tries" not in begun:
                yield f"{cell.key}.tries", cell, None
            continue
        for seed in range(cell.seeds):
            if (key := f"{cell.key}.seed{seed}") not in found and key not in begun:
                yield key, cell, seed


def machine() -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    cells = [cell for plan in options.plans for cell in _plans()[plan]]
    if options.methods:
        cells = [cell for cell in cells if cell.method in options.methods]
    cells = [tiny(cell) for cell in cells] if options.tiny else cells
    options.out.mkdir(parents=True, exist_ok=True)
    found, begun = stored([options.out, *options.done]), set[str]()
    context = mp.get_context("spawn")
    inbox, results = context.Queue(), context.Queue()
    for number in range(options.workers):
        context.Process(target=worker, args=(inbox, results, number, options.workers), daemon=True).start()
    busy, latest, about = 0, {True: options.expect, False: options.expect}, machine()  # seconds of tries, of a run
    by_key: dict[str, tuple[Cell, int | None]] = {}
    failed: dict[str, int] = {}
    while True:
        left = options.seconds - (time.perf_counter() - began)
        for key, cell, seed in ready(cells, found, begun):
            if busy == options.workers or left < latest[seed is None]:
                break
            rate = found.get(f"{cell.key}.tries", {}).get("learning_rate", 0.0)
            model = options.model or os.environ.get(f"FOREWORD_{cell.model.upper()}", cell.model)
            inbox.put((key, (cell, seed, rate, model, options.data, options.test_rows)))
            begun.add(key)
            by_key[key] = (cell, seed)
            busy += 1
        if not busy:
            break
        try:
            key, result = results.get(timeout=max(1.0, left))
        except queue.Empty:
            print(f"time is up; {busy} runs were cut off", flush=True)
            break
        busy -= 1
        cell, seed = by_key[key]
        if "error" not in result:
            latest[seed is None] = result["all_seconds"]
        result |= {"cell": cell.__dict__, "machine": about, "workers": options.workers}
        first = result.pop("run", None)
        keep(options.out, key, result)
        if first is not None:
            found[f"{cell.key}.seed0"] = first
            keep(options.out, f"{cell.key}.seed0", first | {"cell": cell.__dict__, "machine": about})
        if "error" not in result:
            found[key] = result
        elif (again := failed.setdefault(key, 0)) < 1:  # perhaps the others had taken the memory
            failed[key] = again + 1
            begun.discard(key)
        told = result.get("metrics") or result.get("error") or {"learning_rate": result["learning_rate"]}
        print(f"{time.perf_counter() - began:6.1f} s  {key}  {result['all_seconds']} s  {told}", flush=True)
    missing = [key for key, _, _ in ready(cells, found, set())]
    print(f"{len(found)} results in all; still to run: {', '.join(missing) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="one JSON file for each result goes here")
    parser.add_argument("--data", type=Path, required=True, help="holds e2e/, webnlg/, sst2/, rte/ with rows")
    parser.add_argument("--plans", nargs="+", default=["e2e", "low-data"], choices=list(_plans()))
    parser.add_argument("--methods", nargs="+", help="only these, for example full prefix:16")
    parser.add_argument("--done", nargs="*", type=Path, default=[], help="folders with earlier results")
    parser.add_argument(
        "--model", help="another base for every cell; $FOREWORD_SMOLLM2 and $FOREWORD_GEMMA3 for one each"
    )
    parser.add_argument("--workers", type=int, default=6, help="processes that share the device (default 6)")
    parser.add_argument("--seconds", type=float, default=86400, help="no run is started that would end later")
    parser.add_argument("--expect", type=float, default=60.0, help="seconds of a run, before one has ended")
    parser.add_argument("--test-rows", type=int, help="answer fewer, for a try")
    parser.add_argument("--tiny", action="store_true")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
