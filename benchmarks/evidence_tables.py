"""Tables of docs/results.md from raw results: python benchmarks/evidence_tables.py FOLDER... [--write docs/results.md].

FOLDERs hold the JSON files of evidence.py. Computes the official metrics that need Java from the answers, writes what is worth
keeping to benchmarks/results/evidence.json (every run without its answers), and prints the tables, or puts them between
the lines `<!-- evidence -->` and `<!-- /evidence -->` of the file given.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foreword.metrics import TEXT_METRICS, text_figures

TITLES = {
    "e2e": "E2E, full training set",
    "few-averaged": "E2E, low data",
    "few-greedy": "E2E, low data, greedy instead of five beams",
    "low-data": "E2E, low data, steps not averaged",
    "webnlg": "WebNLG 2017",
    "sst2": "SST-2, as completions",
    "rte": "RTE, as completions",
    "gemma": "E2E, 500 rows, Gemma 3 270M",
}
OFFICIAL = ("meteor", "coco_rouge_l", "cider")
Run = dict[str, Any]


def load(folders: Sequence[Path]) -> dict[str, Run]:
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    found = {file.stem: json.loads(file.read_text("utf-8")) for file in files}
    return {key: result for key, result in found.items() if "error" not in result}


def score(runs: dict[str, Run], data: Path) -> None:
    """Add the official metrics to the runs on all of E2E whose test rows are all answered."""
    rows = [json.loads(line) for line in (data / "e2e" / "test.jsonl").read_text("utf-8").splitlines()]
    references = [row["references"] for row in rows]
    for key, run in runs.items():
        if (
            run["cell"]["plan"] == "e2e"
            and len(run.get("answers", ())) == len(references)
            and "cider" not in run["metrics"]
        ):
            run["metrics"] |= text_figures(OFFICIAL, run["answers"], references)
            print(key, run["metrics"], flush=True)


def kept(results: dict[str, Run]) -> dict[str, Run]:
    """Without answers, but for the first five of seed 0; in one order."""
    slim = {}
    for key, result in sorted(results.items()):
        first = result.get("answers", [])[:5] if result.get("seed") == 0 else []
        slim[key] = {k: v for k, v in result.items() if k != "answers"} | ({"answers": first} if first else {})
    return slim


def shown(values: Sequence[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, body)])


def groups(results: dict[str, Run], plan: str) -> dict[tuple[str, int], list[Run]]:
    """The runs of each method and number of rows, in the order of their plan."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in results.values():
        if run["cell"]["plan"] == plan and "metrics" in run:
            found.setdefault((run["cell"]["method"], run["rows"]), []).append(run)
    return dict(sorted(found.items(), key=lambda entry: (entry[0][1], -entry[1][0]["trained"])))


def plain(results: dict[str, Run], plan: str) -> str:
    """One line a method: what is trained, its learning rate, its figures."""
    own = groups(results, plan)
    names = [name for name in TEXT_METRICS if all(name in run["metrics"] for runs in own.values() for run in runs)]
    split = sorted({group for runs in own.values() for run in runs for group in run["groups"]})
    header = ["", "trained", "of the model", "learning rate", "runs", *(TEXT_METRICS[n].title for n in names)]
    body = []
    for runs in own.values():
        first, trains = runs[0], bool(runs[0]["steps"])
        share = f"{first['percent']:.2f}" if first["percent"] >= 0.005 else f"{first['percent']:.1g}"
        trained = [f"{first['trained']:,}", f"{share} %"] if trains else ["-", "-"]
        rate = f"{first['learning_rate']:g}" if first["learning_rate"] else "-"
        figures = [shown([r["metrics"][n] for r in runs], 2 if n in ("nist", "cider") else 1) for n in names]
        parts = [shown([r["groups"][group]["bleu"] for r in runs]) for group in split]
        body.append([first["label"], *trained, rate, str(len(runs)), *figures, *parts])
    return table([*header, *(f"BLEU, {group}" for group in split)], body)


def low_data(results: dict[str, Run], plan: str) -> str:
    """BLEU by rows, and each method's distance from full fine-tuning over the same draws."""
    own = groups(results, plan)
    counts, methods = sorted({rows for _, rows in own}), list(dict.fromkeys(method for method, _ in own))
    body = []
    for method in methods:
        cells, distances = [], []
        for count in counts:
            runs = own.get((method, count), [])
            cells.append(shown([run["metrics"]["bleu"] for run in runs]) if runs else "not run")
            full = {run["seed"]: run["metrics"]["bleu"] for run in own.get(("full", count), [])}
            distances += [run["metrics"]["bleu"] - full[run["seed"]] for run in runs if run["seed"] in full]
        label = next(runs[0]["label"] for (m, _), runs in own.items() if m == method)
        body.append([label, *cells, f"{statistics.mean(distances):+.1f}" if distances else "-"])
    return table(["BLEU", *(f"{count} rows" for count in counts), "mean over full fine-tuning"], body)


def steps_to(results: dict[str, Run], plan: str = "e2e") -> str | None:
    """How many steps each method needs to the lowest held-out loss that PEFT's prefix tuning reaches, seed by seed."""
    own = groups(results, plan)
    theirs = {run["seed"]: run for (method, _), runs in own.items() for run in runs if method.startswith("peft-prefix")}
    body = []
    for runs in own.values():
        ratios, told = [], []
        for run in runs:
            other = theirs.get(run["seed"])
            if other is None or not run["curve"]:
                continue
            aim = min(loss for _, loss in other["curve"] if loss is not None)  # rounded as the other curves are
            reached = next((step for step, loss in run["curve"] if loss is not None and loss <= aim), None)
            told.append("never" if reached is None else str(reached))
            if reached is not None:
                ratios.append(other["best_step"] / reached)
        if told:
            body.append([runs[0]["label"], ", ".join(told), f"{statistics.mean(ratios):.1f}" if ratios else "-"])
    return table(["", "steps, seed by seed", "times fewer than PEFT's prefix"], body) if body else None


def sections(results: dict[str, Run]) -> str:
    made = []
    tables: dict[str, Callable[[], str]] = {plan: lambda plan=plan: plain(results, plan) for plan in TITLES}
    tables |= {plan: lambda plan=plan: low_data(results, plan) for plan in ("few-averaged", "few-greedy", "low-data")}
    for plan, title in TITLES.items():
        if groups(results, plan):
            made += [f"### {title}", tables[plan]()]
            if plan == "e2e" and (steps := steps_to(results)):
                made += ["Steps to the lowest held-out loss of PEFT's prefix tuning (evaluated every 25 steps):", steps]
    machines = {json.dumps(run["machine"]) for run in results.values()}
    made.append(f"Machines: {'; '.join(', '.join(map(str, json.loads(m).values())) for m in sorted(machines))}.")
    return "\n\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--data", type=Path, help="as for evidence.py; computes METEOR, ROUGE-L and CIDEr of E2E, with Java"
    )
    parser.add_argument("--keep", type=Path, default=Path("benchmarks/results/evidence.json"))
    parser.add_argument("--write", type=Path, help="a Markdown file with the two lines that the tables go between")
    options = parser.parse_args()
    earlier = json.loads(options.keep.read_text("utf-8")) if options.keep.exists() else {}
    results = earlier | load(options.folders)
    for key in earlier.keys() & results.keys():  # the official metrics of the same run stay
        if results[key].get("curve") == earlier[key].get("curve") and "metrics" in earlier[key]:
            results[key]["metrics"] = earlier[key]["metrics"] | results[key]["metrics"]
    if options.data is not None:
        score(results, options.data)
    lines = [f"{json.dumps(key)}: {json.dumps(run, ensure_ascii=False)}" for key, run in kept(results).items()]
    options.keep.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    told = sections(results)
    if options.write is None:
        print(told)
        return
    text = options.write.read_text("utf-8")
    head, _, rest = text.partition("<!-- evidence -->\n")
    _, end, tail = rest.partition("<!-- /evidence -->")
    if not end:
        raise SystemExit(
            f"{options.write}: no lines <!-- evidence --> and <!-- /evidence -->, in this order. Nothing was written."
        )
    options.write.write_text(f"{head}<!-- evidence -->\n{told}\n<!-- /evidence -->{tail}", "utf-8")


if __name__ == "__main__":
    main()
