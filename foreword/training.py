"""Train a prefix. One loop for every device and any number of processes; the base is frozen and never prepared.

What is trained is small enough to be one vector, so processes need no wrapper around the model: each runs its share of
every batch, and the gradients of that one vector are added up. The loss is a mean over the completion tokens of the
whole batch, so the result does not depend on how a batch is split into micro-batches or over processes.
"""

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import position_limit
from .attachment import attach
from .config import PrefixConfig, TrainConfig
from .data import IGNORED, Batch, Data, Example, collate, encode, read_rows, schedule
from .errors import ConfigError, DataError
from .initialization import initialize
from .prefix import Prefix
from .reparameterization import Reparameterization
from .runs import RunFolder
from .store import load, save

__all__ = ["Progress", "completion_loss", "train"]


class Progress(NamedTuple):
    """What one step did. `held_out_loss` where it was evaluated."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    held_out_loss: float | None


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
    """Train a prefix for `model` on rows of prompt and completion. The model itself stays as it is.

    Args:
        model: a causal language model.
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
        ConfigError: options contradict each other or the earlier run.
        UnsupportedModelError: the model cannot carry a prefix.

    The method: Li & Liang 2021, *Prefix-Tuning*, with keys and values trained directly and started from demonstrations.

    Example:
        >>> rows = [{"prompt": "Where is order 81?", "completion": "delivery"}] * 8
        >>> prefix = train(model, tokenizer, rows)  # doctest: +SKIP
    """
    prefix, config = prefix or PrefixConfig(), config or TrainConfig()
    _check_tracker(config.tracker)
    rows, held_out_rows, skipped = _examples(model, tokenizer, data, held_out, prefix, config)
    accelerator = Accelerator(cpu=model.device.type == "cpu", log_with=config.tracker, project_dir=run)
    asked = {"prefix": asdict(prefix), "train": asdict(config), "data": _digest([*rows, *held_out_rows])}
    folder = None
    if run is not None and accelerator.is_main_process:
        folder = RunFolder(run, asked, resume=resume, overwrite=overwrite)
    elif resume:
        raise ConfigError("resume needs the run folder of the run to go on with.")
    with _frozen(model):
        start = _start(model, tokenizer, rows, prefix, config, folder)
        trainer = _Trainer(model, Reparameterization(start, prefix, config.seed), config, accelerator, folder)
        seconds = trainer.run(rows, held_out_rows, on_step)
    result = trainer.best()
    result.metadata |= {
        "template": tokenizer.chat_template,
        "training": asked
        | {
            "rows": len(rows),
            "held_out_rows": len(held_out_rows),
            "skipped_rows": skipped,
            "steps": trainer.state.step,
            "best_step": trainer.state.best_step,
            "held_out_loss": trainer.state.best_loss if held_out_rows else None,
            "seconds": round(seconds, 1),
            "precision": str(model.dtype).removeprefix("torch."),
        },
    }
    return result


# --------------------------------------------------------------------------------------------------- before training


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    held_out: Any,
    prefix: PrefixConfig,
    config: TrainConfig,
) -> tuple[list[Example], list[Example], int]:
    """Training rows, held-out rows, and how many rows were left out."""
    limit = position_limit(model)
    max_length = config.max_length if limit is None else min(config.max_length, limit - prefix.num_virtual_tokens)

    def read(source: Any) -> tuple[list[Example], int]:
        rows, bad = read_rows(source, skip_bad=config.skip_bad_rows)
        template: Any = tokenizer.chat_template
        examples, long = encode(rows, tokenizer, template, max_length, config.skip_bad_rows)
        return examples, len(bad) + len(long)

    examples, skipped = read(data)
    if held_out is not None:
        aside, more = read(held_out)
        return examples, aside, skipped + more
    shuffled = [i for batch in schedule([0] * len(examples), 1, config.seed, epoch=-1) for i in batch]
    count = min(round(config.held_out_fraction * len(examples)), 64)
    aside = set(shuffled[:count])
    kept = [example for i, example in enumerate(examples) if i not in aside]
    if not kept:
        raise DataError(f"All {len(examples)} rows were set aside as held out. Lower held_out_fraction, or add rows.")
    return kept, [examples[i] for i in sorted(aside)], skipped


def _check_tracker(name: str | None) -> None:
    known = [str(tracker) for tracker in get_available_trackers()]  # Accelerate itself would ignore a missing one
    if name is not None and name not in known:
        raise ConfigError(
            f"tracker {name!r} is not installed, or not known to Accelerate. "
            f"Installed: {', '.join(known) or 'none'}. Install it, for example with pip install tensorboard."
        )


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[e.prompt_length, *e.input_ids] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def _start(model, tokenizer, rows: Sequence[Example], prefix: PrefixConfig, config: TrainConfig, folder) -> Prefix:
    if folder is not None and folder.newest_checkpoint() is not None:
        return load(folder.start_file)
    start = initialize(model, tokenizer, rows, prefix, config.seed)
    if folder is not None:
        save(start, folder.start_file)
    return start


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode (no dropout) and none of its parameters is trained."""
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


# ---------------------------------------------------------------------------------------------------------- the loop


class _State:
    """What a checkpoint holds besides parameters and optimizer."""

    def __init__(self, vector: Tensor) -> None:
        self.step = 0
        self.best_step = 0
        self.best_loss = math.inf
        self.best_vector = vector
        self.evaluations_since_best = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Trainer:
    def __init__(
        self,
        model: PreTrainedModel,
        reparameterization: Reparameterization,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.config, self.accelerator, self.folder = model, config, accelerator, folder
        self.prefix = reparameterization.to(model.device)
        optimizer = torch.optim.AdamW(self.prefix.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self.optimizer = accelerator.prepare(optimizer)
        self.state = _State(self.prefix.vector().detach().clone())
        accelerator.register_for_checkpointing(self.prefix, self.state)
        self.tracked = config.tracker is not None
        if self.tracked:
            accelerator.init_trackers("foreword", config=asdict(config))

    def best(self) -> Prefix:
        """The best prefix so far, as plain tensors."""
        return self.prefix.fold(self.state.best_vector)

    def run(
        self, rows: Sequence[Example], held_out: Sequence[Example], on_step: Callable[[Progress], None] | None
    ) -> float:
        """Train to the end; returns the seconds it took."""
        config, state, began = self.config, self.state, time.perf_counter()
        self._load()
        batches = _endless([len(example.input_ids) for example in rows], config, state.step)
        with attach(self.model, self.prefix), _interrupted(self.folder is not None) as interrupted:
            while state.step < config.steps and state.evaluations_since_best < config.patience:
                progress = self._step([rows[i] for i in next(batches)])
                last = state.step == config.steps
                if held_out and (last or state.step % config.evaluate_every == 0):
                    progress = progress._replace(held_out_loss=self._evaluate(held_out))
                elif not held_out and last:
                    self._keep(math.inf)
                self._log(progress)
                if interrupted() or last or state.step % config.checkpoint_every == 0:
                    self._save()
                if on_step is not None:
                    on_step(progress)
                if interrupted():
                    raise KeyboardInterrupt
        if self.folder is not None:
            self.folder.draw()
        if self.tracked:
            self.accelerator.end_training()
        return time.perf_counter() - began

    def _step(self, examples: list[Example]) -> Progress:
        """One optimizer step on one batch, of which this process runs its share."""
        began = time.perf_counter()
        accelerator, config, state = self.accelerator, self.config, self.state
        learning_rate = config.learning_rate * (1 - state.step / config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        labels = sum(len(e.input_ids) - e.prompt_length for e in examples)
        losses = torch.zeros((), device=self.model.device)
        parts = _parts(examples, config.micro_batches * accelerator.num_processes)
        self.optimizer.zero_grad()
        with self.prefix.once(lambda gradient: self._sum(gradient) / labels):
            for part in parts[accelerator.process_index :: accelerator.num_processes]:
                loss = completion_loss(self.model, collate(part, self.model.device))
                loss.backward()
                losses += loss.detach()
        self.optimizer.step()
        state.step += 1
        loss = float(self._sum(losses)) / labels
        if not math.isfinite(loss):
            raise ConfigError(
                f"The loss became {loss} at step {state.step}. Lower the learning rate (now {config.learning_rate}), "
                "or train in float32."
            )
        tokens = sum(len(e.input_ids) for e in examples)
        return Progress(state.step, loss, learning_rate, tokens / (time.perf_counter() - began), None)

    @torch.no_grad()
    def _evaluate(self, held_out: Sequence[Example]) -> float:
        """Mean loss per completion token on the held-out rows; keeps the prefix if it is the best."""
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.config.batch_size
        by_length = sorted(held_out, key=lambda example: len(example.input_ids))
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        total = torch.zeros((), device=self.model.device)
        for batch in batches[rank::world]:
            total += completion_loss(self.model, collate(batch, self.model.device))
        loss = float(self._sum(total)) / sum(len(e.input_ids) - e.prompt_length for e in held_out)
        self._keep(loss)
        return loss

    def _keep(self, loss: float) -> None:
        state = self.state
        if loss < state.best_loss or math.isinf(loss):
            state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
            state.best_vector = self.prefix.vector().detach().clone()
        else:
            state.evaluations_since_best += 1

    def _sum(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))

    def _log(self, progress: Progress) -> None:
        values = {key: value for key, value in progress._asdict().items() if value is not None}
        if self.folder is not None:
            self.folder.log(values)
        if self.tracked:
            self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=progress.step)

    def _save(self) -> None:
        if self.folder is not None:
            self.folder.save_checkpoint(self.state.step, self.accelerator.save_state)

    def _load(self) -> None:
        if self.folder is not None and (newest := self.folder.newest_checkpoint()) is not None:
            self.accelerator.load_state(str(newest))
            self.folder.rewind(self.state.step)


def completion_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The summed cross-entropy of the completion tokens, in nats. Logits are computed only where a row has a label."""
    labels = batch.labels[:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(-1)
    logits = model(input_ids=batch.input_ids, logits_to_keep=columns, use_cache=False).logits
    return cross_entropy(
        logits.float().flatten(0, 1), labels[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _endless(lengths: Sequence[int], config: TrainConfig, first: int) -> Iterator[list[int]]:
    """Batches of row numbers, epoch after epoch, from number `first` on."""
    epoch = 0
    while True:
        batches = schedule(lengths, config.batch_size, config.seed, epoch)
        yield from batches[first:]
        first = max(0, first - len(batches))
        epoch += 1


def _parts(examples: Sequence[Example], count: int) -> list[Sequence[Example]]:
    """The rows in `count` parts of nearly equal size, without empty ones."""
    return [part for i in range(count) if (part := examples[i::count])]


@contextmanager
def _interrupted(catch: bool) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true, so that a step is never cut in two."""
    if not catch or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()
    earlier = signal.getsignal(signal.SIGINT)

    def press(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, earlier)  # the second one stops at once

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, earlier)
