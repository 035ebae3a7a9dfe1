"""Many runs spread over a Ray cluster: each worker holds one base and trains several runs at once.

The runs are dealt out in shares. A worker that is done gets the next; what a lost one had goes back in two halves and goes on
from its checkpoints. So the run folders, the rows and the model lie where every machine finds them under the same path.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError, ForewordError
from .models import Base
from .prefix import Prefix
from .runs import make_room, steps_logged
from .training import Job, train_many

__all__ = ["train_fleet"]

_LOSSES = 3  # of its worker that a run may see
_PACKS = 4  # that a share has at most: what ends early makes room for what waits in the same share


class _Share(NamedTuple):
    """Some of the runs, by number, and how often their worker was lost."""

    numbers: list[int]
    losses: int = 0

    def halves(self) -> "list[_Share]":
        """What is bad about it stays in one of them."""
        middle = ceil(len(self.numbers) / 2)
        parts = self.numbers[:middle], self.numbers[middle:]
        return [_Share(part, self.losses + 1) for part in parts if part]


class _Worker:
    """One process of the cluster, with its base."""

    def __init__(self, load: Callable[[], Base], folder: str) -> None:
        self._load, self._folder = load, folder

    @cached_property
    def _base(self) -> Base:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise ConfigError(
                f"A worker on {os.uname().nodename} has no folder {self._folder} ({error.strerror}). All machines of the "
                "cluster must share the folder that the sweep is started in."
            ) from None
        return self._load()

    def open(self) -> None:
        """Load the base."""
        _ = self._base

    def train(self, jobs: Sequence[Job], at_once: int) -> list[Prefix | str]:
        """The prefix of each job, or what went wrong: jobs that fail together are tried again in halves."""
        try:
            return [*train_many(self._base.model, self._base.tokenizer, jobs, at_once=at_once, resume=True)]
        except (ForewordError, OSError, RuntimeError) as error:  # too little memory is a RuntimeError
            if len(jobs) == 1:
                return [str(error)]
        middle = ceil(len(jobs) / 2)
        return self.train(jobs[:middle], at_once) + self.train(jobs[middle:], at_once)


def train_fleet(
    load: Callable[[], Base],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    gpus: bool = True,
    at_once: int = 8,
    resume: bool = False,
    overwrite: bool = False,
    on_steps: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, Prefix | str]]:
    """Train the jobs on a Ray cluster; yields the number of each that ended, with its prefix or what went wrong.

    The cluster is the one that runs here or that `RAY_ADDRESS` names, else one is started on this machine.

    Args:
        load: loads the base, in each worker.
        jobs: what to train, each with a run folder. `on_step` is called in the worker.
        workers: how many; by default one for each GPU of the cluster, or without any one for each machine.
        gpus: whether they take GPUs.
        at_once: how many runs of a worker share a batch.
        resume: go on with the runs that have started; `overwrite`: delete what earlier runs left.
        on_steps: called with how many further steps were made.

    Raises:
        ConfigError: Ray is missing, the base cannot be loaded, or there are earlier runs.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'foreword[ray]'.") from None
    folders = [Path(job.run) for job in jobs if job.run is not None]
    assert len(folders) == len(jobs), "what goes on after a loss needs a folder"
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other: go on with the earlier runs, or delete them.")
    for folder in folders if not resume else ():
        make_room(folder, overwrite=overwrite)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield from _spread(ray, load, jobs, folders, workers, gpus, at_once, on_steps)
    finally:
        if started:
            ray.shutdown()


def _spread(
    ray: Any,
    load: Callable[[], Base],
    jobs: Sequence[Job],
    folders: Sequence[Path],
    workers: int | None,
    gpus: bool,
    at_once: int,
    on_steps: Callable[[int], None],
) -> Iterator[tuple[int, Prefix | str]]:
    had = ray.cluster_resources()
    cards = had.get("GPU", 0) if gpus else 0
    count = min(len(jobs), workers or int(cards) or sum(node["Alive"] for node in ray.nodes()))
    cores = max(1, int(had.get("CPU", 1)) // count)  # Ray lets a worker compute with as many threads
    needs = {"num_gpus": min(1, cards / count), "num_cpus": 1} if cards else {"num_gpus": 0, "num_cpus": cores}
    worker_type = ray.remote(**needs)(_Worker)

    def hire(losses: int = 0) -> None:
        """Ask the cluster for a worker; it gets a share once it is there and has its base."""
        worker = worker_type.remote(load, os.getcwd())
        running[worker.open.remote()] = worker, _Share([], losses)

    size = min(_PACKS * at_once, ceil(len(jobs) / count))
    numbers = range(len(jobs))
    waiting = deque(_Share([*numbers[first : first + size]]) for first in numbers[::size])
    idle: list[Any] = []
    running: dict[Any, tuple[Any, _Share]] = {}
    steps = [steps_logged(folder) for folder in folders]
    for _ in range(count):
        hire()
    try:
        while waiting or any(share.numbers for _, share in running.values()):
            while waiting and idle:
                worker, share = idle.pop(), waiting.popleft()
                running[worker.train.remote([jobs[i] for i in share.numbers], at_once)] = worker, share
            done, _ = ray.wait(list(running), timeout=1)
            for i in (i for _, share in running.values() for i in share.numbers):
                before, steps[i] = steps[i], steps_logged(folders[i])
                on_steps(steps[i] - before)
            for task in done:
                worker, share = running.pop(task)
                try:
                    results = ray.get(task)
                except ray.exceptions.RayActorError:
                    results = _lost(share, hire, waiting)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                else:
                    idle.append(worker)
                yield from zip(share.numbers, results or [], strict=False)
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            ray.kill(worker)


def _lost(share: _Share, hire: Callable[..., None], waiting: deque[_Share]) -> list[str]:
    """Replace the worker that had this share, and deal the share out again, unless it seems to be what kills workers."""
    if share.numbers:
        hire()
        if len(share.numbers) == 1 and share.losses + 1 >= _LOSSES:
            return [f"Its worker was lost {share.losses + 1} times."]
        waiting.extend(share.halves())
    elif share.losses + 1 < _LOSSES:
        hire(share.losses + 1)
    else:
        raise ForewordError(
            f"A worker was lost {_LOSSES} times while it loaded the base. Is there memory for it on every machine? "
            "Ray's logs, on that machine in /tmp/ray/session_latest/logs, tell more."
        )
    return []
