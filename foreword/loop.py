"""The training loop. One loop for every device, any number of processes, and one prefix or several at once.

What is trained of a run is small enough to be one vector, so processes need no wrapper around the frozen model: each computes its share
of every batch, and the gradients of those vectors, and of a task's head, are added up in one exchange. The loss is a mean over the labels
of the whole batch (completion tokens, rows, words), so the result does not depend on how a batch is split into
micro-batches or over processes, or on which other runs share it.

Nothing in a step waits for the device: the loss of a step is read when the next one has been launched.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import increment_version
from transformers import PreTrainedModel

from .anatomy import input_device
from .attachment import Attachment, Choice, attach
from .averaging import Average
from .config import TrainConfig
from .data import Batch, Example, schedule
from .errors import ConfigError
from .packing import can_pack
from .passes import Graphs, checkpointed, compiled, dropout, stream_of_its_own
from .prefix import Prefix
from .processes import add_up, is_sharded
from .quantized import differentiable
from .reparameterization import Reparameterization
from .runs import RunFolder
from .tasks import Task

__all__ = ["Progress", "Run", "Trainer", "read_checkpoint"]

T = TypeVar("T")

_STATE = "state.pt"


class Progress(NamedTuple):
    """What one step did. `held_out_loss` where it was evaluated."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    held_out_loss: float | None


class Run:
    """One prefix in training: its parameters and optimizer, its rows, and how far it is."""

    def __init__(
        self,
        prefix: Reparameterization,
        config: TrainConfig,
        rows: Sequence[Example],
        held_out: Sequence[Example] = (),
        folder: RunFolder | None = None,
        checkpoint: dict[str, Any] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> None:
        self.prefix, self.config, self.rows, self.folder, self.on_step = prefix, config, rows, folder, on_step
        self.held_out = sorted(held_out, key=lambda example: len(example.input_ids))
        head = list(prefix.head_parameters)
        self.own = [parameter for parameter in prefix.parameters() if all(parameter is not h for h in head)]
        groups = [
            {"params": self.own, "peak": config.learning_rate},
            {"params": head, "peak": config.head_learning_rate},
        ]
        fused = self.own[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], weight_decay=0.0, fused=fused or None
        )
        self.average = Average([*self.own, *head], config.averaging)
        self.step = self.best_step = self.evaluations_since_best = 0
        self.best_loss, self.best = math.inf, prefix.snapshot()
        if checkpoint is not None:
            self._load(checkpoint)
        self._batches = _endless([len(example.input_ids) for example in rows], config, self.step)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or nothing was learned for too long."""
        return self.step >= self.config.steps or self.evaluations_since_best >= self.config.patience

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.config.learning_rate * (1 - self.step / self.config.steps)

    @property
    def evaluates(self) -> bool:
        """Whether it is to be evaluated after the step just made."""
        return bool(self.held_out) and (self.step % self.config.evaluate_every == 0 or self.step == self.config.steps)

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due after the step just made."""
        return self.step % self.config.checkpoint_every == 0 or self.ended

    def folded(self) -> Prefix:
        """The best prefix so far, as plain tensors."""
        return self.prefix.fold(self.best)

    def next_rows(self) -> list[Example]:
        """The rows of the next step."""
        return [self.rows[i] for i in next(self._batches)]

    def update(self) -> None:
        """One step of the optimizer, with the gradients that have gathered."""
        left = 1 - self.step / self.config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * left
        self.optimizer.step()
        increment_version(self.own)  # which a fused optimizer forgets, and by which an attachment sees the change
        self.optimizer.zero_grad()
        self.step += 1
        self.average.add(self.step)

    def keep(self, loss: float | None) -> None:
        """Remember the prefix, as it is now, if it is the best on the held-out rows; `None` where there are none."""
        if loss is None or loss < self.best_loss:
            self.best_loss = math.inf if loss is None else loss
            self.best_step, self.evaluations_since_best = self.step, 0
            self.best = self.prefix.snapshot()
            if loss is None and not all(bool(tensor.isfinite().all()) for tensor in self.best):
                raise self.diverged("prefix", math.nan, self.step)
        else:
            self.evaluations_since_best += 1

    def diverged(self, what: str, became: float, step: int) -> ConfigError:
        """The error that says so."""
        which = "" if self.folder is None else f"{self.folder.path}: "
        return ConfigError(
            f"{which}The {what} became {became} at step {step}. Lower the learning rate (now "
            f"{self.config.learning_rate}), or train in float32."
        )

    _KEPT = ("step", "best_step", "best_loss", "evaluations_since_best", "best")

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self.folder is None:
            return
        state = {name: getattr(self, name) for name in self._KEPT}
        state |= {"prefix": self.prefix.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average.values}
        self.folder.save_checkpoint(self.step, lambda path: torch.save(state, Path(path) / _STATE))

    def _load(self, state: dict[str, Any]) -> None:
        self.prefix.load_state_dict(state["prefix"])
        self.optimizer.load_state_dict(state["optimizer"])
        for own, saved in zip(self.average.values, state["average"], strict=True):
            own.copy_(saved)
        vars(self).update({name: state[name] for name in self._KEPT})
        if self.folder is not None:
            self.folder.rewind(self.step)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a run saved, as `Run` takes it."""
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)


class _Step(NamedTuple):
    """A step that was launched; its losses may still be on their way."""

    runs: list[Run]
    told: (
        Tensor  # [1 + K] on the host: how many processes were interrupted before it, each run's loss summed over labels
    )
    wait: Callable[[], None]  # until `told` is there
    labels: list[int]
    tokens: list[int]
    numbers: list[int]
    learning_rates: list[float]

    def read(self) -> list[float]:
        """What it told, once it is there."""
        self.wait()
        return self.told.tolist()


class Trainer:
    """Trains prefixes on one model, as many at once as there are runs; their rows share its batches.

    Runs that share batches have the same number of micro-batches; none has a head, as a model has one at a time, and none
    dropout, whose masks cover the whole batch.
    """

    def __init__(
        self, model: PreTrainedModel, task: Task, runs: Sequence[Run], accelerator: Accelerator, at_once: int = 1
    ) -> None:
        self.model, self.task, self.runs, self.accelerator, self.at_once = model, task, list(runs), accelerator, at_once
        self.device = input_device(model)
        self.checked = False
        self.world, self.rank, self.sharded = accelerator.num_processes, accelerator.process_index, is_sharded(model)
        self.graphs = Graphs() if self.device.type == "cuda" and not self.sharded else None
        self.attachment: Attachment | None = None
        self.inside = ExitStack()  # what is undone after training
        if self.device.type == "cuda" and not task.has_head:
            can_pack(model)  # before anything is attached
        self.tracked = next((run.config.tracker for run in runs), None) is not None
        if self.tracked:
            accelerator.init_trackers("foreword", config=asdict(self.runs[0].config))

    def run(self) -> float:
        """Train all runs to their ends; returns the seconds it took."""
        began = time.perf_counter()
        waiting: _Step | None = None
        catch = self.world > 1 or any(run.folder is not None for run in self.runs)
        with self, _interrupted(catch) as interrupted:
            while active := [run for run in self.runs if not run.ended][: self.at_once]:
                step = self.step(active, interrupted())
                stop = waiting is not None and self._report(waiting)
                waiting, stop = step, interrupted() if self.world == 1 else stop  # several stop after the same step
                if not stop and not any(run.evaluates or run.saves or run.ended for run in active):
                    continue
                stop = self._report(waiting, self._measure(active)) or stop
                waiting = None
                for run in active:
                    if run.saves or stop:
                        run.save()
                if stop:
                    raise KeyboardInterrupt
        for run in self.runs:
            if run.folder is not None:
                run.folder.draw()
        if self.tracked:
            self.accelerator.end_training()
        return time.perf_counter() - began

    def __enter__(self) -> "Trainer":
        self.attachment = attach(self.model, self.runs[0].prefix)
        self.seen: Any = (id(self.runs[0]),), ()
        self.choices: dict[Any, Choice] = {}
        self.last_report = time.perf_counter()
        if self.graphs is not None:
            self.inside.enter_context(stream_of_its_own())
        self.inside.enter_context(differentiable(self.model))
        if any(_wants_compiling(run.config, self.device, self.sharded) for run in self.runs):
            self.inside.enter_context(compiled(self.model))
        if any(run.config.gradient_checkpointing for run in self.runs):
            self.inside.enter_context(checkpointed(self.model))
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.attachment is not None
        self.attachment.detach()
        self.attachment = None
        if self.graphs is not None:
            self.graphs.clear()
        self.choices.clear()
        self.inside.close()

    def step(self, active: list[Run], stop: bool = False) -> _Step:
        """One optimizer step of each run, of which this process computes its share."""
        config = active[0].config
        groups = [run.next_rows() for run in active]
        labels = [sum(example.units for example in rows) for rows in groups]
        losses = torch.zeros(len(active), device=self.device)
        seed = f"{config.seed} {active[0].step} {self.rank}"  # so that training resumes with the same masks
        with ExitStack() as once:
            if config.dropout:
                once.enter_context(dropout(self.model, seed))
            for run in active:
                once.enter_context(run.prefix.once())
            for part, counts in self._share(_parts(groups, config.micro_batches * self.world)):
                losses += self._differentiate(active, part, counts)
            gradients = [run.prefix.gradients() for run in active]
            told = torch.cat([torch.full_like(losses[:1], float(stop)), losses])
            told, *sums = add_up([told, *(own for tensors in gradients for own in tensors)])
            totals = iter(sums)
            for tensors, count in zip(gradients, labels, strict=True):
                for own in tensors:
                    own.copy_(next(totals)).div_(count)
        if not self.checked:
            self._check_gradient(active)
        rates = [run.learning_rate for run in active]
        for run in active:
            run.update()
        tokens = [sum(len(example.input_ids) for example in rows) for rows in groups]
        return _Step(active, *_to_host(told), labels, tokens, [run.step for run in active], rates)

    def _share(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's part of the work, and whether it counts.

        Processes that hold the layers together call the model equally often: one for which nothing is left takes the first
        part again, which then does not count.
        """
        own = [(part, True) for part in parts[self.rank :: self.world]]
        if self.sharded and len(own) < math.ceil(len(parts) / self.world):
            own.append((parts[0], False))
        return own

    def _differentiate(self, active: list[Run], groups: Sequence[Sequence[Example]], counts: bool = True) -> Tensor:
        """The summed loss of each run's rows; their gradients gather in the runs' prefixes."""
        batch = self.task.collate(self.model, groups)
        self._show(active, batch)
        # Only where the model makes no mask of its own, for which Transformers waits for the device.
        graphed = isinstance(batch, Batch) and batch.longest > 0 and (len(active) == 1 or batch.starts is not None)
        if self.graphs is None or not graphed or active[0].config.dropout:
            return self._compute(batch, counts)
        return self.graphs.run(tuple(map(id, active)), batch, self._compute)

    def _compute(self, batch: Any, counts: bool = True) -> Tensor:
        losses = self.task.loss(self.model, batch)
        losses = losses if counts else 0 * losses
        losses.sum().backward()
        return losses.detach()

    def _show(self, active: list[Run], batch: Any) -> None:
        """Let each row of the batch see the prefix of its run."""
        assert self.attachment is not None
        owners = batch.owners if isinstance(batch, Batch) and len(active) > 1 else ()
        seen = tuple(map(id, active)), owners
        if seen == self.seen:
            return
        own = [active[owner].prefix for owner in owners] if owners else active[0].prefix
        self.choices[seen] = self.attachment.use(self.choices.get(seen, own))  # kept, as graphs read from it
        self.seen = seen

    def _check_gradient(self, active: list[Run]) -> None:
        """Kernels made for inference may let no gradient through and say nothing."""
        self.checked = True
        if not all(any(p.grad is not None and bool(p.grad.any()) for p in run.own) for run in active):
            raise ConfigError(
                f"No gradient reaches the prefix through {type(self.model).__name__}, so nothing would be trained. Code "
                "made for inference does that. Load the base with weights that train: precision bfloat16, int8, int4 or fp8."
            )

    def _measure(self, active: list[Run]) -> dict[int, float]:
        """Evaluate the runs for which it is time; each keeps its best prefix."""
        due = [run for run in active if run.evaluates]
        blind = [run for run in active if run.ended and not run.held_out]
        with ExitStack() as shown:
            for run in [*due, *blind]:
                shown.enter_context(run.average.shown())
            evaluated = dict(zip(map(id, due), self._evaluate(due), strict=True))
            for run in due:
                run.keep(evaluated[id(run)])
            for run in blind:
                run.keep(None)
        return evaluated

    @torch.no_grad()
    def _evaluate(self, runs: list[Run]) -> list[float]:
        """For each run the mean loss per label on its held-out rows."""
        totals, size = [torch.zeros((), device=self.device) for _ in runs], runs[0].config.batch_size if runs else 1
        longest = max((len(run.held_out) for run in runs), default=0)
        with torch.compiler.set_stance("force_eager"):
            for first, counts in self._share(range(0, longest, size)):
                left = [
                    (i, run.held_out[first : first + size]) for i, run in enumerate(runs) if first < len(run.held_out)
                ]
                own = [runs[i] for i, _ in left]
                batch = self.task.collate(self.model, [rows for _, rows in left])
                self._show(own, batch)
                for (i, _), loss in zip(left, self.task.loss(self.model, batch), strict=True):
                    totals[i] += loss * counts
        units = [sum(example.units for example in run.held_out) for run in runs]
        return [float(total) / count for total, count in zip(add_up(totals), units, strict=True)]

    def _report(self, step: _Step, evaluated: dict[int, float] | None = None) -> bool:
        """Read the losses of a step and pass them on. Whether a process was interrupted before it."""
        stop, *losses = step.read()
        now = time.perf_counter()
        seconds, self.last_report = now - self.last_report, now
        for run, loss, labels, tokens, number, rate in zip(
            step.runs, losses, step.labels, step.tokens, step.numbers, step.learning_rates, strict=True
        ):
            progress = Progress(number, loss / labels, rate, tokens / seconds, (evaluated or {}).get(id(run)))
            for what, told in (("loss", loss), ("held-out loss", progress.held_out_loss)):
                if told is not None and not math.isfinite(told):
                    raise run.diverged(what, told, number)
            values = {key: value for key, value in progress._asdict().items() if value is not None}
            if run.folder is not None:
                run.folder.log(values)
            if self.tracked:
                self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=number)
            if run.on_step is not None:
                run.on_step(progress)
        return stop > 0


def _to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the host, and what waits for it, but not for what a GPU is given to do after it."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    copy, done = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    done.record()
    return copy, done.synchronize


def _wants_compiling(config: TrainConfig, device: torch.device, sharded: bool) -> bool:
    if config.compile is None:
        return device.type == "cuda" and config.steps >= 1000 and not sharded
    if config.compile and sharded:
        raise ConfigError("The layers of a sharded base cannot be compiled here. Leave compile out.")
    return config.compile


def _endless(lengths: Sequence[int], config: TrainConfig, first: int) -> Iterator[list[int]]:
    """Batches of row numbers, epoch after epoch, from number `first` on."""
    epoch = 0
    while True:
        batches = schedule(lengths, config.batch_size, config.seed, epoch)
        yield from batches[first:]
        first = max(0, first - len(batches))
        epoch += 1


def _parts(groups: Sequence[Sequence[Example]], count: int) -> list[list[Sequence[Example]]]:
    """The rows of each run in `count` parts of nearly equal size, without parts that are empty for all."""
    return [part for i in range(count) if any(part := [rows[i::count] for rows in groups])]


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
