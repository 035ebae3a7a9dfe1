"""What a comparison says: its runs as a table, and as one page with plots that needs nothing else. Plain data in and out.

A report is a dictionary: `base`, `facts` (name to text), `metrics` (name to title, the first being the one to look at),
`test` (prompts and references) and `runs`, as `comparison.compare` yields them.
"""

import html
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["HEADER", "html_page", "markdown", "summary"]

HEADER = ("trained", "of model", "stored", "memory", "time", "tokens/s", "learning rate")
_COLORS = ("#2a7de1", "#d9662b", "#2f9e64", "#b8479a", "#8a6fd1", "#b08a1e", "#3aa6b0", "#c8433f", "#7d8790", "#5a8f29")
_INK = "#010203"  # stands for the page's own colour while a plot is drawn


def summary(report: dict[str, Any]) -> list[list[str]]:
    """One line for each method and number of rows: its name, rows, metrics with their spread, then as `HEADER`.

    The spread is the standard deviation over seeds. Time, memory and speed are means.
    """
    return [[_label(runs), f"{runs[0]['rows']:,}", *_figures(report, runs), *_costs(runs)] for runs in _groups(report)]


def markdown(report: dict[str, Any]) -> str:
    """The summary and its facts as Markdown."""
    header = ["method", "rows", *report["metrics"].values(), *HEADER]
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *summary(report)]]
    facts = [f"- {name}: {told}" for name, told in report["facts"].items()]
    return "\n".join([f"# {report['base']}: methods compared", "", *facts, "", *lines, "", _explained(report), ""])


def _groups(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Runs of one method and number of rows, in their order."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault((run["label"], run["rows"]), []).append(run)
    return list(groups.values())


def _label(runs: Sequence[dict[str, Any]]) -> str:
    return runs[0]["label"]


def _figures(report: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    told = []
    for name in report["metrics"]:
        values = [run["metrics"][name] for run in runs]
        digits = 2 if name in ("nist", "cider") else 1
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        told.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return told


def _costs(runs: Sequence[dict[str, Any]]) -> list[str]:
    first, trains = runs[0], bool(runs[0]["steps"])
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    return [
        f"{first['trained']:,}" if trains else "-",
        f"{first['percent']:.3g} %" if trains else "-",
        _bytes(first["bytes"]) if first["bytes"] else "-",
        _bytes(statistics.mean(peaks)) if peaks else "-",
        f"{statistics.mean(run['seconds'] for run in runs):,.0f} s" if trains else "-",
        f"{statistics.mean(speeds):,.0f}" if speeds else "-",
        f"{first['learning_rate']:g}" if first["learning_rate"] else "-",
    ]


def _bytes(count: float | int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _explained(report: dict[str, Any]) -> str:
    return (
        "± is the standard deviation over seeds; each seed draws its own rows. Stored: the numbers that a task keeps, 4 bytes "
        "each. Memory: the tensors of one training step at their peak, weights and AdamW's state included. Time: training "
        "without evaluations. The learning rate is the best of as many tries for each method, by the loss on held-out rows."
    )


# ------------------------------------------------------------------------------------------------------------ plots


def _plot(draw: Callable[[Any], None], height: float = 4.2, **axes: Any) -> str:
    """An SVG whose text and lines take the page's colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "foreword", "font.family": "sans-serif", "font.size": 11,
        "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(7, height), layout="constrained")
        own = figure.add_subplot(**axes)
        own.grid(alpha=0.15, color=_INK)
        draw(own)
        if own.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _quality(report: dict[str, Any]) -> str:
    """Each method's figure: its seeds as dots, their mean as a bar."""
    most = max(run["rows"] for run in report["runs"])
    groups = [runs for runs in _groups(report) if runs[0]["rows"] == most][::-1]
    metric, title = next(iter(report["metrics"].items()))

    def draw(axes: Any) -> None:
        color = _colors(report)
        for place, runs in enumerate(groups):
            values = [run["metrics"][metric] for run in runs]
            own = color[_label(runs)]
            axes.barh(place, statistics.mean(values), height=0.62, color=own, alpha=0.35)
            axes.plot(values, [place] * len(values), "o", color=own, markersize=6)
        axes.set_yticks(range(len(groups)), [_label(runs) for runs in groups])
        axes.grid(False, axis="y")

    return _plot(draw, 0.9 + 0.42 * len(groups), xlabel=title)


def _curves(report: dict[str, Any]) -> str | None:
    """Held-out loss by step, of the first seed on the most rows."""
    most = max(run["rows"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["rows"] == most and run["seed"] == 0 and len(run["curve"]) > 1]
    if not runs:
        return None

    def draw(axes: Any) -> None:
        color = _colors(report)
        for run in runs:
            points = [(step, loss) for step, loss in run["curve"] if loss is not None]
            axes.plot(*zip(*points, strict=True), color=color[run["label"]], label=run["label"])

    return _plot(draw, xlabel="step", ylabel="held-out loss (nats a token)")


def _low_data(report: dict[str, Any]) -> str | None:
    """The first metric by the number of training rows, with a band of one standard deviation."""
    labels = list(dict.fromkeys(run["label"] for run in report["runs"]))
    if len({run["rows"] for run in report["runs"]}) < 2:
        return None
    metric, title = next(iter(report["metrics"].items()))

    def draw(axes: Any) -> None:
        color = _colors(report)
        for label in labels:
            groups = sorted((r for r in _groups(report) if _label(r) == label), key=lambda runs: runs[0]["rows"])
            rows = [runs[0]["rows"] for runs in groups]
            values = [[run["metrics"][metric] for run in runs] for runs in groups]
            middle = [statistics.mean(own) for own in values]
            spread = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values]
            low, high = zip(*((m - s, m + s) for m, s in zip(middle, spread, strict=True)), strict=True)
            axes.plot(rows, middle, "o-", color=color[label], label=label)
            axes.fill_between(rows, low, high, color=color[label], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        ticks = sorted({run["rows"] for run in report["runs"]})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()

    return _plot(draw, xlabel="training rows", ylabel=title)


def _cost(report: dict[str, Any]) -> str | None:
    """The first metric by the number of trained parameters."""
    most = max(run["rows"] for run in report["runs"])
    groups = [runs for runs in _groups(report) if runs[0]["rows"] == most and runs[0]["steps"]]
    if len({runs[0]["trained"] for runs in groups}) < 2:
        return None
    metric, title = next(iter(report["metrics"].items()))

    def draw(axes: Any) -> None:
        color = _colors(report)
        for runs in groups:
            where = runs[0]["percent"], statistics.mean(run["metrics"][metric] for run in runs)
            axes.plot(*where, "o", color=color[_label(runs)], markersize=9, label=_label(runs))
        axes.set_xscale("log")

    return _plot(draw, xlabel="trained parameters, % of the model", ylabel=title)


def _colors(report: dict[str, Any]) -> dict[str, str]:
    labels = list(dict.fromkeys(run["label"] for run in report["runs"]))
    return {label: _COLORS[i % len(_COLORS)] for i, label in enumerate(labels)}


# ------------------------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2024, #e6e8ea); --soft: light-dark(#59636e, #9aa4ae);
  --line: light-dark(#d9dee3, #353b42); --back: light-dark(#fff, #15181b); --panel: light-dark(#f6f7f9, #1d2125); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption, .facts { color: var(--soft); font-size: .9rem; }
.facts { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { font-weight: 600; background: var(--panel); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--panel); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; color: var(--ink); display: block; }
.example { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .8rem 1rem; overflow-wrap: anywhere; }
.example dl { display: grid; grid-template-columns: minmax(7rem, 13rem) 1fr; gap: .35rem 1rem; margin: .6rem 0 0; font-size: .9rem; }
.example dt { color: var(--soft); } .example dd { margin: 0; white-space: pre-wrap; } .prompt { font-weight: 600; white-space: pre-wrap; }
@media (max-width: 36rem) { .example dl { grid-template-columns: 1fr; gap: 0; } .example dd { margin-bottom: .5rem; }
  th:first-child, td:first-child { max-width: 9.5rem; white-space: normal; } }
"""


def html_page(report: dict[str, Any], examples: int = 8) -> str:
    """One page that needs nothing else: summary, plots, answers side by side; light and dark, wide and narrow."""
    title = f"{report['base']}: methods compared"
    facts = "".join(f"<li><b>{_text(name)}</b> {_text(told)}</li>" for name, told in report["facts"].items())
    header = ["method", "rows", *report["metrics"].values(), *HEADER]
    body = _table(header, summary(report))
    plots = [
        (_quality(report), "Each dot is a seed, the bar their mean."),
        (_cost(report), "Quality by how much is trained."),
        (_low_data(report), "The band is one standard deviation over draws of the rows."),
        (_curves(report), "Seed 0, evaluated on the held-out rows."),
    ]
    drawn = "".join(f"<figure>{svg}<figcaption>{_text(told)}</figcaption></figure>" for svg, told in plots if svg)
    tries = [
        [
            f"{run['label']}, {run['rows']:,} rows",
            f"{own['learning_rate']:g}",
            _loss(own["held_out_loss"]),
            str(own["steps"]),
        ]
        for run in report["runs"]
        for own in run.get("tries", [])
    ]
    tried = (
        f"<h2>Learning rates tried</h2>{_table(['method', 'learning rate', 'held-out loss', 'steps'], tries)}"
        if tries
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style><body><h1>{_text(title)}</h1>"
        f'<ul class="facts">{facts}</ul><h2>Result</h2>{body}<p>{_text(_explained(report))}</p>'
        f'<div class="plots">{drawn}</div><h2>Answers side by side</h2>{_examples(report, examples)}{tried}</body></html>\n'
    )


def _examples(report: dict[str, Any], count: int) -> str:
    most = max(run["rows"] for run in report["runs"])
    runs = [run for run in report["runs"] if run["rows"] == most and run["seed"] == 0]
    made = []
    for i, row in enumerate(report["test"][:count]):
        answers = [("right", row["references"][0]), *((run["label"], run["answers"][i]) for run in runs)]
        listed = "".join(
            f"<dt>{_text(name)}</dt><dd>{_text(answer) or '<i>nothing</i>'}</dd>" for name, answer in answers
        )
        made.append(f'<div class="example"><div class="prompt">{_text(row["prompt"])}</div><dl>{listed}</dl></div>')
    return "".join(made)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _text(told: str) -> str:
    return html.escape(told)
