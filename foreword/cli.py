"""The command. Verbs only: each reads its options, calls the library, and prints. Heavy modules load inside the verbs.

Results go to stdout, everything else to stderr. Exit codes: 0, 1 for a failure, 2 for a usage error, 130 after Ctrl-C.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import __version__
from .console import counting, err, human_bytes, out, table, training_bar
from .errors import ConfigError, DataError, ForewordError
from .listing import Json, PrefixFile, list_, show
from .options import read_options, with_flags

if TYPE_CHECKING:
    from .models import Base
    from .prefix import Prefix

__all__ = ["app", "main"]

app = typer.Typer(
    name="foreword",
    help="Prefix tuning: freeze a pretrained Transformer, train a few key and value vectors, keep them as the task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None, typer.Option(help="The base: a folder, a Hugging Face id, or `smollm2`.", show_default="as in the file")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Where an answer is cut.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows answered at a time.")]
Device = Annotated[str | None, typer.Option(help="For example cpu or cuda:1.", show_default="the accelerator")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them.")]


@app.command()
@with_flags
def train(
    config: Annotated[Path | None, typer.Option(help="A YAML file with any of these options.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run and start over.")] = False,
    **given: Any,
) -> None:
    """Train a prefix on rows of prompt and completion.

    A row is {"prompt": ..., "completion": ...} or {"messages": [...]}.
    """
    job, prefix_config, train_config = read_options(config, given)
    from .store import check_writable, save
    from .training import train

    check_writable(job.out)
    run = job.out.with_suffix(".run")
    base = _load_base(job.model, job.device, job.trust_remote_code, job.precision)
    try:
        with training_bar(train_config.steps) as show:
            prefix = train(
                base.model,
                base.tokenizer,
                job.data,
                prefix_config,
                train_config,
                held_out=job.held_out,
                run=run,
                resume=resume,
                overwrite=overwrite,
                on_step=show,
            )
    except KeyboardInterrupt:
        err.print(f"Stopped. Go on with the same command and --resume; the state is in {run}.")
        raise
    save(prefix, job.out)
    training = prefix.metadata["training"]
    if training["skipped_rows"]:
        err.print(f"Left out {training['skipped_rows']} bad rows.")
    share = prefix.num_parameters / base.model.num_parameters()
    loss = training["held_out_loss"]
    out.print(
        f"{job.out}: {prefix.num_virtual_tokens} virtual tokens, {prefix.num_parameters:,} parameters "
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
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Measure a prefix on rows, beside the base alone and the base prompted with the prefix's demonstrations."""
    from .completion import METRICS
    from .data import read_rows
    from .evaluation import evaluate
    from .store import load, save

    loaded = load(prefix)
    rows, bad = read_rows(data, skip_bad=skip_bad_rows)
    contestants = ["base", "demonstrations"] if loaded.metadata.get("demonstrations") else ["base"]
    if compare is not None:
        contestants = [name for name in compare if name != "none"]
    base = _load_base(model or loaded.base["name"], device, trust_remote_code)
    with counting("evaluate", len(rows) * (1 + len(contestants))) as count:
        result = evaluate(
            base.model,
            base.tokenizer,
            rows,
            loaded,
            compare=contestants,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_rows=count,
        )
    if answers is not None:
        answers.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.to_json()["rows"]), "utf-8"
        )
    if record:
        loaded.metadata["evaluation"] = {"data": data, "rows": len(rows), "metrics": result.metrics}
        save(loaded, prefix)
    if as_json:
        out.print_json(
            data={"prefix": str(prefix), "rows": len(rows), "skipped_rows": len(bad), "metrics": result.metrics}
        )
        return
    if bad:
        err.print(f"Left out {len(bad)} bad rows.")
    body = [[name, *(figures[key] for key in METRICS)] for name, figures in result.metrics.items()]
    out.print(table([f"{len(rows)} rows", *METRICS.values()], body))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer.", show_default=False)] = None,
    rows: Annotated[str | None, typer.Option(help="Rows to answer: a file or a data set's name.")] = None,
    prefix: Annotated[
        list[Path] | None, typer.Option(help="A prefix file. Repeatable: each answers, all in one batch.")
    ] = None,
    model: Model = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a prompt, or every row of a file, with one or more prefixes, or with the base alone.

    A row may name its own prefix in a field "prefix": the stem of one of the files given. Answers to rows are printed
    as JSON lines.
    """
    if (prompt is None) == (rows is None):
        raise ConfigError("Give either a prompt, or rows with --rows FILE.")
    if not prefix and model is None:
        raise ConfigError("Give a prefix with --prefix FILE, or a model with --model to answer without one.")
    from .completion import answer
    from .data import Row, read_rows
    from .store import load

    loaded: dict[str, Prefix | None] = {path.stem: load(path) for path in prefix or []}
    if len(loaded) < len(prefix or []):
        raise ConfigError("Two prefix files have the same name; rename one.")
    asked = [Row(({"role": "user", "content": prompt},), None, "prompt")] if prompt else []
    if rows is not None:
        asked, _ = read_rows(rows, completions=False)
    pairs: list[tuple[Row, str | None]] = []
    for row in asked:
        if row.prefix is not None and row.prefix not in loaded:
            raise DataError(
                f"{row.source}: prefix {row.prefix!r} is none of those given: {', '.join(loaded) or 'none'}."
            )
        pairs += [(row, name) for name in ([row.prefix] if row.prefix is not None else list(loaded) or [None])]
    base = _load_base(model or _common_base(loaded), device, trust_remote_code)
    sampling: dict[str, Any] = {}
    if temperature > 0:
        from transformers import set_seed

        set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    texts = answer(
        base.model,
        base.tokenizer,
        [row for row, _ in pairs],
        [loaded[name] if name is not None else None for _, name in pairs],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or 256,
        **sampling,
    )
    for (row, name), text in zip(pairs, texts, strict=True):
        if rows is not None:
            print(json.dumps({"prompt": row.prompt, "prefix": name, "completion": text}, ensure_ascii=False))
        else:
            print(f"{name}: {text}" if len(loaded) > 1 else text)


app.command("list")(list_)
app.command()(show)


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


def _load_base(name: str, device: str | None, trust_remote_code: bool, precision: Any = "auto") -> "Base":
    import transformers

    from .models import load_base

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with err.status(f"Loading {name}"):
        return load_base(name, precision=precision, device=device, trust_remote_code=trust_remote_code)


def _common_base(prefixes: "dict[str, Prefix | None]") -> str:
    names = {prefix.base["name"] for prefix in prefixes.values() if prefix is not None}
    if len(names) != 1:
        raise ConfigError(
            f"These prefixes belong to different bases: {', '.join(sorted(names))}. Use one base at a time."
        )
    return names.pop()


def main() -> None:
    """Run the command; a user's mistake ends in one message, never in a traceback."""
    try:
        app()
    except ForewordError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
