"""The training loop. One loop for every device and any number of processes; the base is frozen and never prepared.

What is trained is small enough to be one vector, so processes need no wrapper around the model: each runs its share of
every batch, and the gradients of that one vector, and of a task's head, are added up. The loss is a mean over the labels
of the whole batch (completion tokens, rows, words), so the result does not depend on how a batch is split into
micro-batches or over processes.
"""

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from .anatomy import input_device
from .attachment import attach
from .config import TrainConfig
from .data import Example, schedule
from .errors import ConfigError
from .prefix import Prefix
from .reparameterization import Reparameterization
from .runs import RunFolder

__all__ = ["Progress", "Trainer"]


class Progress(NamedTuple):
    """What one step did. `held_out_loss` where it was evaluated."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    held_out_loss: float | None


class _State:
    """What a checkpoint holds besides parameters and optimizer."""

    def __init__(self, best: list[Tensor]) -> None:
        self.step = 0
        self.best_step = 0
        self.best_loss = math.inf
        self.best = best
        self.evaluations_since_best = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """A prefix in training on one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Callable[[PreTrainedModel, Sequence[Example]], Tensor],
        reparameterization: Reparameterization,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.loss, self.config, self.accelerator, self.folder = model, loss, config, accelerator, folder
        self.prefix = reparameterization.to(input_device(model))
        head = list(self.prefix.head_parameters)
        own = [parameter for parameter in self.prefix.parameters() if all(parameter is not h for h in head)]
        groups = [{"params": own, "peak": config.learning_rate}, {"params": head, "peak": config.head_learning_rate}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        self.optimizer = accelerator.prepare(optimizer)
        self.state = _State(self.prefix.snapshot())
        accelerator.register_for_checkpointing(self.prefix, self.state)
        self.own, self.first = own, True  # what is the prefix's, and whether this process has made no step yet
        self.tracked = config.tracker is not None
        if self.tracked:
            accelerator.init_trackers("foreword", config=asdict(config))

    def best(self) -> Prefix:
        """The best prefix so far, as plain tensors."""
        return self.prefix.fold(self.state.best)

    def run(
        self, rows: Sequence[Example], held_out: Sequence[Example], on_step: Callable[[Progress], None] | None
    ) -> float:
        """Train to the end; returns the seconds it took."""
        config, state, began = self.config, self.state, time.perf_counter()
        self._load()
        batches = _endless([len(example.input_ids) for example in rows], config, state.step)
        with attach(self.model, self.prefix), _interrupted(self.folder is not None) as interrupted:
            while state.step < config.steps and state.evaluations_since_best < config.patience:
                progress = self.step([rows[i] for i in next(batches)])
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

    def step(self, examples: list[Example]) -> Progress:
        """One optimizer step on one batch, of which this process runs its share."""
        began = time.perf_counter()
        accelerator, config, state = self.accelerator, self.config, self.state
        left = 1 - state.step / config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * left
        labels, first = sum(example.units for example in examples), self.first
        self.first = False
        losses = torch.zeros((), device=input_device(self.model))
        parts = _parts(examples, config.micro_batches * accelerator.num_processes)
        self.optimizer.zero_grad()
        seed = f"{config.seed} {state.step} {accelerator.process_index}"  # so that training resumes with the same masks
        dropout = _dropout(self.model, seed) if config.dropout else nullcontext()
        with dropout, self.prefix.once(lambda gradient: self._sum(gradient) / labels):
            for part in parts[accelerator.process_index :: accelerator.num_processes]:
                loss = self.loss(self.model, part)
                loss.backward()
                losses += loss.detach()
        if first:
            self._check_gradient()
        self.optimizer.step()
        state.step += 1
        loss = float(self._sum(losses)) / labels
        if not math.isfinite(loss):
            raise ConfigError(
                f"The loss became {loss} at step {state.step}. Lower the learning rate (now {config.learning_rate}), "
                "or train in float32."
            )
        tokens = sum(len(e.input_ids) for e in examples)
        return Progress(state.step, loss, config.learning_rate * left, tokens / (time.perf_counter() - began), None)

    def _check_gradient(self) -> None:
        """Kernels made for inference may let no gradient through and say nothing."""
        if not any(p.grad is not None and bool(p.grad.any()) for p in self.own):
            raise ConfigError(
                f"No gradient reaches the prefix through {type(self.model).__name__}, so nothing would be trained. Kernels "
                "for inference do that, for example those that bitsandbytes uses for 4 bits on CPUs. Load the base in 8 "
                "bits or unquantized."
            )

    @torch.no_grad()
    def _evaluate(self, held_out: Sequence[Example]) -> float:
        """Mean loss per label on the held-out rows; keeps the prefix if it is the best."""
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.config.batch_size
        by_length = sorted(held_out, key=lambda example: len(example.input_ids))
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        total = torch.zeros((), device=input_device(self.model))
        for batch in batches[rank::world]:
            total += self.loss(self.model, batch)
        loss = float(self._sum(total)) / sum(example.units for example in held_out)
        self._keep(loss)
        return loss

    def _keep(self, loss: float) -> None:
        state = self.state
        if loss < state.best_loss or math.isinf(loss):
            state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
            state.best = self.prefix.snapshot()
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
def _dropout(model: PreTrainedModel, seed: str) -> Iterator[None]:
    """Inside, the model drops out as it did when it was pretrained; what it counts about its inputs stays as it is."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    device = input_device(model)
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(random.Random(seed).getrandbits(63))
            yield
    finally:
        model.eval()


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
