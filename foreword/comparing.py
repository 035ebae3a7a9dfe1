"""`foreword compare`: other methods beside a prefix, on the user's own rows."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .config import PrefixConfig, TrainConfig
from .console import err, out, table
from .errors import ConfigError, DataError
from .listing import Json
from .metrics import TEXT_METRICS, check_text_metrics
from .report import HEADER, html_page, markdown, summary

if TYPE_CHECKING:
    from .data import Row

__all__ = ["compare"]

_METHODS = "full,prefix,prompt,adapter,lora,few-shot,base"
_TEST, _HELD_OUT = 200, 64  # rows that are set aside at most
_WIDTH = 190  # columns of the table


def compare(
    model: Annotated[
        str, typer.Option(help="The base: a folder, a Hugging Face id, or `smollm2`.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="Training rows of prompt and completion.", show_default=False)],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Also prefix-mlp and peft-prefix; a size behind a colon: prefix:32,lora:4,adapter:8.",
            show_default=_METHODS,
        ),
    ] = None,
    ablation: Annotated[
        Literal["length", "layers", "initialization", "sink", "mlp"] | None,
        typer.Option(help="Compare prefixes that differ in one thing, in place of methods.", show_default=False),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Numbers of training rows, such as 50,100,200.", show_default="all")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Rows to choose learning rates and steps on.", show_default="a tenth of the rows")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Rows to answer.", show_default="a fifth of the rows")] = None,
    test_rows: Annotated[
        int | None, typer.Option(min=1, help="Answer only the first of them.", show_default=False)
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where report.html, .md and .json go.")] = Path("comparison"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each method, each with rows of its own order or draw.")
    ] = 3,
    tries: Annotated[int, typer.Option(min=1, help="Learning rates tried for each method.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 300,
    tuning_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a try; too few mislead.", show_default="as of a run")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 4,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 25,
    patience: Annotated[int, typer.Option(min=1, help="Evaluations without improvement after which a run stops.")] = 4,
    averaging: Annotated[
        float, typer.Option(help="What the moving average that is kept keeps of itself in a step; 0: none.")
    ] = TrainConfig.averaging,
    virtual_tokens: Annotated[int, typer.Option(min=1, help="Of prefixes without a size of their own.")] = 16,
    metrics: Annotated[str, typer.Option(help=f"Of {', '.join(TEXT_METRICS)}.")] = "bleu,rouge_l,exact_match",
    beams: Annotated[int, typer.Option(min=1, help="1 always takes the likeliest token.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where an answer is cut.", show_default=False)
    ] = None,
    answer_batch: Annotated[int, typer.Option(min=1, help="Rows answered at a time.")] = 32,
    precision: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the base.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="For example cpu or cuda:1.", show_default="the accelerator")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    as_json: Json = False,
) -> None:
    """Train other methods beside a prefix on your rows, each with as many learning rates tried, and measure their answers.

    Full fine-tuning, prompt tuning, adapters, LoRA, prompting with demonstrations, and the base alone. The base is not changed.
    """
    from .comparison import Bench, entries
    from .comparison import ablation as ablate
    from .comparison import compare as run_all
    from .completion import about, encode
    from .fingerprint import digest
    from .models import load_base

    names = tuple(metrics.split(","))
    check_text_metrics(names)
    if ablation and methods:
        raise ConfigError("--ablation compares prefixes in place of methods: leave out --methods.")
    counts = None if rows is None else _counts(rows)
    prefix = PrefixConfig(num_virtual_tokens=virtual_tokens)
    chosen = [] if ablation else entries(methods or _METHODS, prefix)
    config = TrainConfig(
        steps=steps, batch_size=batch_size, evaluate_every=evaluate_every, patience=patience, averaging=averaging
    )
    if (folder / "report.json").exists() and not overwrite:
        raise ConfigError(
            f"{folder} holds a report already. Write to another folder with --out, or replace it with --overwrite."
        )
    parts = _split(data, held_out, test)
    parts["test"] = parts["test"][:test_rows]
    folder.mkdir(parents=True, exist_ok=True)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with err.status(f"Loading {model}"):
        base = load_base(model, precision=precision, device=device)
    if base.model.config.is_encoder_decoder:
        raise ConfigError("Methods are compared on decoders only; this model has an encoder.")
    before = digest(base.model)
    shape = about(base.model, base.tokenizer)
    training, aside = (
        encode(parts[part], base.tokenizer, shape, config.max_length)[0] for part in ("train", "held_out")
    )
    chosen = ablate(ablation, base, training, prefix) if ablation else chosen
    bench = Bench(
        base, aside, parts["test"], config, tries, tuning_steps, names, beams, max_new_tokens, answer_batch=answer_batch
    )
    report: dict[str, Any] = {
        "base": model,
        "facts": _facts(base, data, parts, config) | {"tries, seeds": f"{tries}, {seeds}"},
        "metrics": {name: TEXT_METRICS[name].title for name in names},
        "test": [{"prompt": row.prompt, "references": row.answers} for row in parts["test"]],
        "runs": [],
    }
    with err.status("compare") as status:
        for run in run_all(
            bench,
            chosen,
            training,
            counts=counts,
            seeds=seeds,
            on_step=lambda told, step: status.update(f"{told}, step {step}"),
        ):
            report["runs"].append(run)
            figures = ", ".join(f"{report['metrics'][name]} {value}" for name, value in run["metrics"].items())
            err.print(f"{run['label']}, {run['rows']:,} rows, seed {run['seed']}: {figures}")
            (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if digest(base.model) != before:
        raise AssertionError("comparing changed the base")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    (folder / "report.html").write_text(html_page(report), "utf-8")
    if as_json:
        out.print_json(data=report)
        return
    wide = Console(width=max(out.width, _WIDTH), highlight=False, soft_wrap=True)  # a row stays a line, also in a pipe
    wide.print(table(["method", "rows", *report["metrics"].values(), *HEADER], summary(report)))
    err.print(f"Plots and answers: {folder / 'report.html'}")


def _counts(rows: str) -> list[int]:
    found = [part.strip() for part in rows.split(",")]
    if not all(part.isdecimal() and int(part) for part in found):
        raise ConfigError(f"--rows: expected whole numbers parted by commas, such as 50,100,200; got {rows!r}.")
    return [int(part) for part in found]


def _split(data: str, held_out: str | None, test: str | None) -> "dict[str, list[Row]]":
    """Training, held-out and test rows; what was not given is set aside from the training rows, with a fixed seed."""
    from .data import read_rows

    rows = read_rows(data)[0]
    order = random.Random(0).sample(rows, len(rows))
    aside = 0 if test else min(len(rows) // 5, _TEST)
    more = aside + (0 if held_out else min(len(rows) // 10, _HELD_OUT))
    parts = {
        "test": read_rows(test)[0] if test else order[:aside],
        "held_out": read_rows(held_out)[0] if held_out else order[aside:more],
        "train": order[more:],
    }
    if empty := [name for name, own in parts.items() if not own]:
        raise DataError(
            f"{data}: {len(rows)} rows are too few to set {empty[0].replace('_', '-')} rows aside. Give more."
        )
    return parts


def _facts(base: Any, data: str, parts: "dict[str, list[Row]]", config: TrainConfig) -> dict[str, str]:
    import platform

    import torch
    import transformers

    device = base.model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "model": f"{base.model.num_parameters():,} parameters, {str(base.model.dtype).removeprefix('torch.')}",
        "rows": f"{len(parts['train']):,} to train on, {len(parts['held_out']):,} held out, {len(parts['test']):,} to answer ({data})",
        "runs": f"{config.steps} steps of {config.batch_size} rows at most",
        "machine": f"{machine}, Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}",
    }
