"""The command. Verbs only: each reads its options, calls the library, and prints. Heavy modules load inside the verbs.

Results go to stdout, everything else to stderr. Exit codes: 0, 1 for a failure, 2 for a usage error, 130 after Ctrl-C.
"""

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from . import __version__
from .comparing import compare
from .config import Precision
from .console import counting, err, human_bytes, is_first, out, table, training_bar
from .errors import ConfigError, DataError, ForewordError
from .exchange import export, import_, push
from .listing import Json, PrefixFile, list_, show
from .options import JobConfig, read_options, with_flags
from .serving import keys, serve
from .sweep import keep_results, read_sweep

if TYPE_CHECKING:
    from .models import Base
    from .prefix import Prefix
    from .tasks import Task

__all__ = ["app", "main"]

app = typer.Typer(
    name="foreword",
    help="Prefix tuning: freeze a pretrained Transformer, train a few key and value vectors, keep them as the task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option(
        help="The base: a folder, a Hugging Face id, `smollm2`, `gemma3` or `minilm`.", show_default="as in the file"
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Where an answer is cut.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows answered at a time.")]
BasePrecision = Annotated[Precision, typer.Option(help="Of the base.")]
Device = Annotated[str | None, typer.Option(help="For example cpu or cuda:1.", show_default="the accelerator")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them.")]


@app.command()
@with_flags
def train(
    config: Annotated[Path | None, typer.Option(help="A YAML file with any of these options.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run and start over.")] = False,
    sweep: Annotated[
        Path | None,
        typer.Option(help="A YAML file: `grid`, options with lists of values, or `runs`, a list of options."),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="For --sweep: how many runs share a batch.")] = 8,
    on: Annotated[
        Literal["ray"] | None,
        typer.Option(help="For --sweep: spread the runs over a Ray cluster.", show_default="this process"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="For --on ray: how many.", show_default="one for each GPU, or else machine"),
    ] = None,
    **given: Any,
) -> None:
    """Train a prefix on rows of prompt and completion, or of the task given.

    A row is {"prompt": ..., "completion": ...} or {"messages": [...]}; see --task for others. With --sweep several prefixes
    are trained at once, over one base.
    """
    runs = [read_options(config, given)] if sweep is None else read_sweep(sweep, config, given)
    job, prefix_config, train_config = runs[0]
    if on is None and workers is not None:
        raise ConfigError("--workers are those of a cluster: give --on ray as well.")
    if on is not None:
        _check_fleet(sweep, job)
    from .processes import leave
    from .store import check_writable, save
    from .tasks import TASKS, find_labels
    from .training import Job, train, train_many

    if is_first:
        for own in runs:
            check_writable(own.job.out)
    run = job.out.with_suffix(".run")
    labels = find_labels(TASKS[train_config.task], job.data, train_config.skip_bad_rows)
    load = partial(
        _load_base,
        job.model,
        job.device,
        job.trust_remote_code,
        precision=job.precision,
        shard=job.shard,
        task=train_config.task,
        labels=labels,
        seed=train_config.seed,
    )
    how: Any = {"resume": resume, "overwrite": overwrite}
    try:
        if sweep is not None:
            jobs = [Job(o.job.data, o.prefix, o.train, o.job.held_out, o.job.out.with_suffix(".run")) for o in runs]
            steps = sum(own.train.steps for own in runs)
            if on is not None:
                from .fleet import train_fleet

                with counting("train", steps) as count:
                    gpus = job.device != "cpu"
                    fleet = train_fleet(load, jobs, workers=workers, gpus=gpus, at_once=at_once, on_steps=count, **how)
                    keep_results(runs, fleet)
                return
            base = load()
            with counting("train", steps) as count:
                watched = [own._replace(on_step=lambda _: count(1)) for own in jobs]
                prefixes = train_many(base.model, base.tokenizer, watched, at_once=at_once, **how)
            leave()
            keep_results(runs, enumerate(prefixes))
            return
        base = load()
        with training_bar(train_config.steps) as show:
            prefix = train(
                base.model,
                base.tokenizer,
                job.data,
                prefix_config,
                train_config,
                held_out=job.held_out,
                run=run,
                on_step=show,
                **how,
            )
    except KeyboardInterrupt:
        err.print(f"Stopped. Go on with the same command and --resume; the state is in {run}.")
        raise
    leave()
    if not is_first:
        return
    training = prefix.metadata["training"]
    if resume and _holds(job.out, prefix):
        err.print(f"This run had ended. {job.out} is left as it is, with the figures that were recorded in it.")
    else:
        save(prefix, job.out)
    if training["skipped_rows"]:
        err.print(f"Left out {training['skipped_rows']} bad rows.")
    share = prefix.num_parameters / base.model.num_parameters()
    loss = training["held_out_loss"]
    head = "" if prefix.head is None else f", {sum(t.numel() for t in prefix.head.values()):,} of them the head's,"
    out.print(
        f"{job.out}: {prefix.num_virtual_tokens} virtual tokens, {prefix.num_parameters:,} parameters{head} "
        f"({share:.3%} of the model), {human_bytes(job.out.stat().st_size)}"
        + ("" if loss is None else f", held-out loss {loss:.4f} at step {training['best_step']}")
        + f", {training['seconds']:.0f} s. Loss curve: {run / 'loss.png'}"
    )


@app.command()
def evaluate(
    prefix: PrefixFile,
    data: Annotated[str, typer.Option(help="Rows with completions or references.", show_default=False)],
    model: Model = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with: base, demonstrations, none. Repeatable.", show_default="all there are"
        ),
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the figures in the prefix file.")] = False,
    confusion: Annotated[
        Path | None,
        typer.Option(
            help="Where the confusion matrix of labels is drawn.", show_default="beside the prefix, *.confusion.png"
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="For example bleu,nist,meteor.", show_default="those of the task")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    precision: BasePrecision = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Measure a prefix on rows, beside the base alone and the base prompted with the prefix's demonstrations.

    A prefix with a head is measured alone; its labels' confusion matrix is drawn.
    """
    from .evaluation import check_metrics, contestants, evaluate
    from .scores import draw_confusion
    from .store import check_place, load, save
    from .tasks import read, task_of

    loaded = load(prefix)
    task, asked = task_of(loaded), contestants(loaded, compare and [name for name in compare if name != "none"])
    names = None if metrics is None else metrics.split(",")
    titles = check_metrics(loaded, names)
    if compare and "none" in compare and len(compare) > 1:
        raise ConfigError(f"--compare none goes with no other, got {', '.join(compare)}.")
    for path in filter(None, (answers, confusion)):
        check_place(path)
    if confusion is not None and task.labels is None:
        raise ConfigError("--confusion: this prefix answers with no labels, so there is no confusion matrix.")
    rows, bad = read(task, data, skip_bad=skip_bad_rows)
    base = _load_base(model or loaded.base["name"], device, trust_remote_code, precision=precision, **_head_of(loaded))
    with counting("evaluate", len(rows) * (1 + len(asked))) as count:
        result = evaluate(
            base.model,
            base.tokenizer,
            rows,
            loaded,
            compare=asked,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            metrics=names,
            on_rows=count,
        )
    if answers is not None:
        answers.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.to_json()["rows"]), "utf-8"
        )
    if record:
        loaded.metadata["evaluation"] = {"data": data, "rows": len(rows), "metrics": result.metrics}
        save(loaded, prefix)
    details = result.details["prefix"]
    if "confusion" in details:
        confusion = confusion or prefix.with_suffix(".confusion.png")
        draw_confusion(**details["confusion"], path=confusion)
    if as_json:
        told = {"prefix": str(prefix), "rows": len(rows), "skipped_rows": len(bad), "metrics": result.metrics}
        out.print_json(data=told | ({"details": details} if details else {}))
        return
    if bad:
        err.print(f"Left out {len(bad)} bad rows.")
    body = [[name, *(figures[key] for key in titles)] for name, figures in result.metrics.items()]
    out.print(table([f"{len(rows)} rows", *titles.values()], body))
    if "confusion" in details:
        err.print(f"Confusion matrix: {confusion}")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer.", show_default=False)] = None,
    rows: Annotated[str | None, typer.Option(help="Rows to answer: a file or a data set's name.")] = None,
    prefix: Annotated[
        list[Path] | None, typer.Option(help="A prefix file. Repeatable: each answers, all in one batch.")
    ] = None,
    model: Model = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    batch_size: BatchSize = 32,
    precision: BasePrecision = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a prompt, or every row of a file, with one or more prefixes, or with the base alone.

    A row may name its own prefix in a field "prefix": the stem of one of the files given. Answers to rows are printed
    as JSON lines. A prefix with a head answers with its label, a label for each word, or a stretch of the row's context.
    """
    if (prompt is None) == (rows is None):
        raise ConfigError("Give either a prompt, or rows with --rows FILE.")
    if not prefix and model is None:
        raise ConfigError("Give a prefix with --prefix FILE, or a model with --model to answer without one.")
    from .store import load
    from .tasks import read

    loaded: dict[str, Prefix | None] = {path.stem: load(path) for path in prefix or []}
    if len(loaded) < len(prefix or []):
        raise ConfigError("Two prefix files have the same name; rename one.")
    task, head = _common_task(loaded)
    asked, _ = read(task, rows if rows is not None else [task.prompt(prompt or "")], answers=False)
    pairs: list[tuple[Any, str | None]] = []
    for row in asked:
        if row.prefix is not None and row.prefix not in loaded:
            raise DataError(
                f"{row.source}: prefix {row.prefix!r} is none of those given: {', '.join(loaded) or 'none'}."
            )
        pairs += [(row, name) for name in ([row.prefix] if row.prefix is not None else list(loaded) or [None])]
    base = _load_base(model or _common_base(loaded), device, trust_remote_code, precision=precision, **head)
    sampling: dict[str, Any] = {}
    if temperature > 0:
        from transformers import set_seed

        set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    answers = task.answer(
        base.model,
        base.tokenizer,
        [row for row, _ in pairs],
        [loaded[name] if name is not None else None for _, name in pairs],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    for (row, name), found in zip(pairs, answers, strict=True):
        if rows is not None:
            print(json.dumps(row.shown | {"prefix": name, task.answer_name: found}, ensure_ascii=False))
        else:
            text = " ".join(found) if isinstance(found, list) else found
            print(f"{name}: {text}" if len(loaded) > 1 else text)


@app.command()
def compose(
    prefixes: Annotated[list[Path], typer.Argument(help="The prefix files, in their order.", show_default=False)],
    composed: Annotated[Path, typer.Option("--out", help="The prefix file to write.", show_default=False)],
    how: Annotated[
        Literal["concatenate", "average"], typer.Option(help="One behind the other, or their mean.")
    ] = "concatenate",
    weights: Annotated[
        list[float] | None, typer.Option("--weight", help="For the mean: one for each prefix, in their order.")
    ] = None,
    model: Model = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make one prefix of several: one behind the other, keys rotated to their new positions, or their mean.

    What that is good for: docs/composition.md.
    """
    from .composition import compose
    from .store import check_writable, load, save

    if check_writable(composed).exists():
        raise ConfigError(f"{composed} exists already. Give another name with --out, or delete it.")
    found = [load(path) for path in prefixes]
    loaded: dict[str, Prefix | None] = dict(zip(map(str, prefixes), found, strict=True))
    _, head = _common_task(loaded)
    base = _load_base(model or _common_base(loaded), device, trust_remote_code, precision="float32", **head)
    result = compose(base.model, found, how, weights)
    save(result, composed)
    out.print(
        f"{composed}: {result.num_virtual_tokens} virtual tokens, {result.num_parameters:,} parameters, "
        f"{human_bytes(composed.stat().st_size)}"
    )


app.command()(compare)
app.command("list")(list_)
app.command()(show)
app.command("import")(import_)
app.command()(export)
app.command()(push)
app.command()(serve)
app.add_typer(keys)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the two prefixes go.")] = Path("foreword-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps a task.")] = 150,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows a task to answer.")] = 40,
    model: Annotated[str, typer.Option(help="The base.")] = "smollm2",
) -> None:
    """Train two prefixes for a real model and show what they do."""
    from .demo import run_demo

    run_demo(_load_base(model, None, False), folder, steps, rows)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _check_fleet(sweep: Path | None, job: JobConfig) -> None:
    """Raise `ConfigError` where the options do not go with --on ray."""
    if sweep is None:
        raise ConfigError("--on ray spreads the runs of a sweep: give --sweep FILE as well.")
    if job.shard or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "--on ray gives each worker a base of its own: leave out --shard, and start one process, without torchrun."
        )
    if job.device is not None and ":" in job.device:
        raise ConfigError(f"--on ray gives each worker a device of its own: leave out --device {job.device}.")


def _load_base(name: str, device: str | None, trust_remote_code: bool, **options: Any) -> "Base":
    import transformers

    from .models import load_base

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with err.status(f"Loading {name}"):
        return load_base(name, device=device, trust_remote_code=trust_remote_code, **options)


def _holds(file: Path, prefix: "Prefix") -> bool:
    """Whether the file is of just this prefix."""
    from .fingerprint import digest
    from .store import load

    try:
        return file.exists() and digest(load(file)) == digest(prefix)
    except ForewordError:
        return False


def _head_of(prefix: "Prefix | None") -> dict[str, Any]:
    """The options of `load_base` that load a base with the head of the prefix's task."""
    if prefix is None or prefix.head is None:
        return {}
    return {"task": prefix.metadata["task"], "labels": prefix.metadata.get("labels")}


def _common_task(prefixes: "dict[str, Prefix | None]") -> "tuple[Task, dict[str, Any]]":
    """The task of all prefixes, and the options of `load_base` for it."""
    from .tasks import task_of

    found = [(task_of(prefix), _head_of(prefix)) for prefix in prefixes.values() or [None]]
    for task, head in found[1:]:
        if task is not found[0][0] or len(head.get("labels") or ()) != len(found[0][1].get("labels") or ()):
            raise ConfigError("These prefixes are for different tasks, or have different labels. Use one at a time.")
    return found[0]


def _common_base(prefixes: "dict[str, Prefix | None]") -> str:
    names = {prefix.base["name"] for prefix in prefixes.values() if prefix is not None}
    if len(names) != 1:
        raise ConfigError(
            f"These prefixes belong to different bases: {', '.join(sorted(names))}. Use one base at a time."
        )
    return names.pop()


def main() -> None:
    """Run the command; a user's mistake ends in one message, never in a traceback."""
    # Transformers imports torchao where it is installed, and that talks a lot.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if (started := os.environ.get("WORLD_SIZE", "1")) != "1" and sys.argv[1:2] != ["train"]:
            raise ConfigError(f"{started} processes were started, but only foreword train shares its work. Start one.")
        app()
    except (ForewordError, OSError) as error:
        err.quiet = False
        where = "" if is_first else f"process {os.environ['RANK']}: "
        err.print(f"{where}[bold red]error:[/] {escape(str(error))}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
