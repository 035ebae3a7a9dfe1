"""Train a prefix: check the rows, choose where to start, run the loop, keep the best prefix and how it came about."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import get_available_trackers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import input_device, stacks, text_room
from .config import SHARED, PrefixConfig, TrainConfig
from .data import Data, Example, schedule
from .errors import ConfigError, DataError
from .heads import head_tensors
from .initialization import initialize
from .loop import Progress, Run, Trainer, read_checkpoint
from .prefix import Prefix
from .processes import from_first, join
from .quantized import precision_name
from .reparameterization import Reparameterization
from .runs import RunFolder, check_started, has_started, newest_checkpoint, start_file
from .store import load, save
from .tasks import TASKS, check_model, read

__all__ = ["Job", "train", "train_many"]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    prefix: PrefixConfig | None = None,
    config: TrainConfig | None = None,
    *,
    held_out: Data | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[Progress], None] | None = None,
) -> Prefix:
    """Train a prefix for `model` on rows of prompt and completion, or of another task. The model itself stays as it is.

    With `config.task` of a task that needs a head, the head is trained together with the prefix and kept with it.

    Args:
        model: a language model (decoder or encoder-decoder), or one with the head of the task and its labels (see
            `load_base`). Training starts from the head that it has.
        tokenizer: its tokenizer. Its chat template, if it has one, is applied and kept with the prefix.
        data: a file, a data set's name, or dictionaries (see `data.read_rows`).
        prefix: the prefix to make.
        config: how to train.
        held_out: rows to measure progress on; by default some are set aside from `data`.
        run: a folder for metrics, loss curve and checkpoints. Without it nothing is written. With it, Ctrl-C saves a
            checkpoint before it stops.
        resume: go on from the newest checkpoint in `run`; the result is the same as without the interruption.
        overwrite: delete an earlier run in `run`.
        on_step: called after each step.

    Returns:
        The prefix with the lowest loss on the held-out rows, on the CPU, in float32.

    Raises:
        DataError: a row cannot be used. Before training starts.
        ConfigError: options contradict each other or the earlier run, or the model has not the task's head.
        UnsupportedModelError: the model cannot carry a prefix.

    The method: Li & Liang 2021, *Prefix-Tuning*, with keys and values trained directly and started from demonstrations.

    Example:
        >>> rows = [{"prompt": "Where is order 81?", "completion": "delivery"}] * 8
        >>> prefix = train(model, tokenizer, rows)  # doctest: +SKIP
    """
    job = Job(data, prefix, config, held_out, run, on_step)
    if resume:
        if run is None:
            raise ConfigError("resume needs the run folder of the run to go on with.")
        join(input_device(model))
        from_first(lambda: check_started(run))
    return train_many(model, tokenizer, [job], resume=resume, overwrite=overwrite)[0]


class Job(NamedTuple):
    """One of several prefixes to train: the arguments of `train` that may differ.

    Args:
        data: training rows.
        prefix: the prefix to make.
        config: how to train.
        held_out: rows to measure progress on.
        run: the run folder.
        on_step: called after each step.
    """

    data: Data
    prefix: PrefixConfig | None = None
    config: TrainConfig | None = None
    held_out: Data | None = None
    run: str | Path | None = None
    on_step: Callable[[Progress], None] | None = None


def train_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    at_once: int = 8,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Prefix]:
    """Train several prefixes for one model in one process: rows of different runs share its batches.

    Each run keeps its own prefix, optimizer, order of rows, schedule and end, and gives the prefix that `train` gives, up to
    rounding. One that ends makes room for the next. Runs with a head, with dropout, and those of
    encoder-decoders, go one after another.

    Args:
        jobs: what to train. They share the task and the number of micro-batches.
        at_once: how many runs share a batch; it holds the rows of all of them.
        resume: go on with the runs that have started; `overwrite`: delete what earlier runs left.

    Raises:
        ConfigError: the runs differ in what they share, or as `train`.
        DataError: a row cannot be used. Before training starts.
        UnsupportedModelError: the model cannot carry a prefix.

    Example:
        >>> import foreword
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))
        >>> words = {word: i for i, word in enumerate("? where is it here there".split())}
        >>> own = Tokenizer(models.WordLevel(words, unk_token="?"))
        >>> own.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="?")
        >>> rows = [{"prompt": "where is it", "completion": "it is here"}, {"prompt": "is it here", "completion": "there"}]
        >>> lengths = [foreword.PrefixConfig(num_virtual_tokens=length) for length in (2, 3)]
        >>> prefixes = foreword.train_many(
        ...     model, tokenizer, [foreword.Job(rows * 3, length, foreword.TrainConfig(steps=2)) for length in lengths]
        ... )
        >>> [prefix.num_virtual_tokens for prefix in prefixes]
        [2, 3]
    """
    if not jobs:
        raise ConfigError("There is nothing to train: jobs is empty.")
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other: go on with earlier runs, or delete them.")
    folders = [Path(job.run).resolve() for job in jobs if job.run is not None]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"Two runs would write {twice}. Give each a folder of its own.")
    configs = [job.config or TrainConfig() for job in jobs]
    for name in SHARED:
        if len(found := {getattr(config, name) for config in configs}) > 1:
            raise ConfigError(
                f"Runs that are trained together share {name}, got {', '.join(map(repr, found))}. Train them apart."
            )
    first, task = configs[0], TASKS[configs[0].task]
    if len(jobs) > 1 and first.tracker is not None:
        raise ConfigError(f"A tracker ({first.tracker}) follows one run. Leave it out; each run has its metrics.jsonl.")
    check_model(first.task, model)
    _check_tracker(first.tracker, jobs[0].run)
    device = input_device(model)
    accelerator = join(device, log_with=first.tracker, project_dir=jobs[0].run)
    with _frozen(model):
        read = [_read(model, tokenizer, job) for job in jobs]  # all, before a folder is made or deleted
        prepared = [_prepare(model, tokenizer, own, accelerator.is_main_process, resume, overwrite) for own in read]
        # A mask of dropout covers the rows of all runs that share a batch: together they would be trained as no run alone is.
        if task.has_head or model.config.is_encoder_decoder or any(own.run.config.dropout for own in prepared):
            at_once = 1
        seconds = Trainer(model, task, [own.run for own in prepared], accelerator, at_once).run()
    return [_result(model, own, seconds) for own in prepared]


class _Read(NamedTuple):
    """A job, its options with their defaults, and its rows."""

    job: Job
    prefix: PrefixConfig
    config: TrainConfig
    about: dict[str, Any]
    rows: list[Example]
    held_out: list[Example]
    skipped: int


class _Prepared(NamedTuple):
    run: Run
    about: dict[str, Any]
    asked: dict[str, Any]
    skipped: int
    steps: list[Progress]


def _read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> _Read:
    """Check a job's options and rows."""
    prefix, config = job.prefix or PrefixConfig(), job.config or TrainConfig()
    task = TASKS[config.task]
    if prefix.initialization is None:
        reads_text = len(stacks(model)) == 1  # text has no keys of its own in an encoder-decoder
        prefix = replace(prefix, initialization=task.initialization if reads_text else "random")
    if config.dropout is None:
        config = replace(config, dropout=task.has_head)
    about = task.about(model, tokenizer)
    return _Read(
        job, prefix, config, about, *_examples(model, tokenizer, job.data, job.held_out, prefix, config, about)
    )


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: _Read,
    writes: bool,
    resume: bool,
    overwrite: bool,
) -> _Prepared:
    """Open a job's folder, choose where its prefix starts. Of several processes one `writes`."""
    job, prefix, config, about, rows, held_out, skipped = read
    asked = {"prefix": asdict(prefix), "train": asdict(config), "data": _digest([*rows, *held_out])}

    def earlier() -> tuple[RunFolder | None, tuple[Prefix, dict[str, Any]] | None]:
        if job.run is None:
            return None, None
        again = resume and has_started(job.run)
        folder = RunFolder(job.run, asked, resume=again, overwrite=overwrite)
        found = newest_checkpoint(job.run) if again else None
        if found is None:
            folder.rewind(0)  # what a run told that ended before its first checkpoint
        return folder, None if found is None else (load(start_file(found)), read_checkpoint(found))

    folder, found = from_first(earlier)
    folder = folder if writes else None
    start, checkpoint = found or (_start(model, tokenizer, rows, prefix, config, folder), None)
    reparameterization = Reparameterization(start, prefix, config.seed).to(input_device(model))
    steps = list[Progress]()

    def told(progress: Progress) -> None:
        steps.append(progress)
        if job.on_step is not None:
            job.on_step(progress)

    run = Run(reparameterization, config, rows, held_out, folder, checkpoint, told)
    return _Prepared(run, about, asked, skipped, steps)


def _result(model: PreTrainedModel, prepared: _Prepared, seconds: float) -> Prefix:
    """The best prefix of a run, with how it came about."""
    run, about, asked, skipped, steps = prepared
    result = run.folded()
    result.metadata |= {"task": run.config.task} | about
    result.metadata |= {
        "training": asked
        | {
            "rows": len(run.rows),
            "held_out_rows": len(run.held_out),
            "skipped_rows": skipped,
            "steps": run.step,
            "best_step": run.best_step,
            "held_out_loss": run.best_loss if run.held_out else None,
            "seconds": round(seconds, 1),
            "precision": precision_name(model),
            "curve": _curve([step._asdict() for step in steps] if run.folder is None else run.folder.metrics()),
        },
    }
    return result


def _curve(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses of a run in about 50 steps, every evaluation among them: small enough for the prefix file."""
    apart = max(1, len(steps) // 50)
    kept = [entry for i, entry in enumerate(steps) if i % apart == 0 or entry.get("held_out_loss") is not None]
    names = ("step", "loss", "held_out_loss")
    return [{name: round(entry[name], 4) for name in names if entry.get(name) is not None} for entry in kept]


# --------------------------------------------------------------------------------------------------- before training


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    held_out: Any,
    prefix: PrefixConfig,
    config: TrainConfig,
    about: dict[str, Any],
) -> tuple[list[Example], list[Example], int]:
    """Training rows, held-out rows, and how many rows were left out."""
    task, room = TASKS[config.task], text_room(model, prefix.num_virtual_tokens)
    max_length = config.max_length if room is None else min(config.max_length, room)

    def encoded(source: Any) -> tuple[list[Example], int]:
        rows, bad = read(task, source, skip_bad=config.skip_bad_rows)
        examples, long = task.encode(rows, tokenizer, about, max_length, config.skip_bad_rows)
        return examples, len(bad) + len(long)

    examples, skipped = encoded(data)
    if held_out is not None:
        aside, more = encoded(held_out)
        return examples, aside, skipped + more
    shuffled = [i for batch in schedule([0] * len(examples), 1, config.seed, epoch=-1) for i in batch]
    count = min(round(config.held_out_fraction * len(examples)), 64)
    aside = set(shuffled[:count])
    kept = [example for i, example in enumerate(examples) if i not in aside]
    if not kept:
        raise DataError(f"All {len(examples)} rows were set aside as held out. Lower held_out_fraction, or add rows.")
    return kept, [examples[i] for i in sorted(aside)], skipped


def _check_tracker(name: str | None, run: str | Path | None) -> None:
    known = [str(tracker) for tracker in get_available_trackers()]  # Accelerate itself would ignore a missing one
    if name is not None and name not in known:
        raise ConfigError(
            f"tracker {name!r} is not installed, or not known to Accelerate. "
            f"Installed: {', '.join(known) or 'none'}. Install it, for example with pip install tensorboard."
        )
    if name == "tensorboard" and run is None:
        raise ConfigError("tracker 'tensorboard' writes into the run folder, and none was given. Give one with run.")


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps(
        [[e.prompt_length, *e.input_ids, *([] if e.labels is None else [list(e.labels)])] for e in examples]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    prefix: PrefixConfig,
    config: TrainConfig,
    folder: RunFolder | None,
) -> Prefix:
    """The same in all processes: each may have to run the model, but devices differ in the last bit."""
    own = initialize(model, tokenizer, rows, prefix, config.seed)
    if TASKS[config.task].has_head:
        own = own.with_head(head_tensors(model))
    start = from_first(lambda: own)
    if folder is not None:
        save(start, folder.start_file)
    return start


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and none of its parameters is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
