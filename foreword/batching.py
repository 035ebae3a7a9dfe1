"""The engine of ours: continuous batching over one frozen Transformers model, each row with its own prefix or none.

One thread owns the model. In each turn it decodes one token for every running row, in one forward pass, then prefills a bounded
number of prompt tokens for rows that are to join: running answers never wait for a long prompt, and a short prompt never
waits for more than one part of a long one.
"""

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .anatomy import attention_sites, input_device, stacks
from .attachment import Attachment, attach
from .engine import Emit, Failed, Finished, Request, Stats, Token
from .errors import (
    ConfigError,
    ForewordError,
    ModelMismatchError,
    OverloadedError,
    PositionError,
    ServingError,
    ShutdownError,
    UnsupportedModelError,
)
from .fingerprint import check_fingerprint
from .prefix import Prefix
from .queueing import FairQueue
from .residency import Residency
from .sampling import Chooser, choose
from .slots import SlotCache, sliding_layers

__all__ = ["BatchLimits", "BatchingEngine"]

_log = logging.getLogger("foreword.engine")


@dataclass(frozen=True)
class BatchLimits:
    """What the engine may use.

    Args:
        rows: requests that run at a time.
        tokens: room for keys and values: rows times the length of the longest.
        prefill_tokens: prompt tokens between two decoding steps.
        waiting: requests that may wait.
        length: tokens that a request may have, virtual ones included; by default what the model was made for.
        device_bytes: for prefixes on the model's device.
        host_bytes: for prefixes in host memory that have left the device. On a CPU that is the same memory.
    """

    rows: int = 16
    tokens: int = 65_536
    prefill_tokens: int = 256
    waiting: int = 256
    length: int | None = None
    device_bytes: int = 256_000_000
    host_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < (0 if name == "host_bytes" else 1):
                raise ConfigError(f"{name} must be positive, got {value}.")


class _Job:
    """A request on its way through the engine."""

    def __init__(self, request: Request, emit: Emit, device: torch.device) -> None:
        self.request, self.emit, self.owner = request, emit, request.owner
        self.chooser = Chooser(request.sampling, request.prompt, device)
        self.prefix: Prefix | None = None
        self.loading = False  # its prefix is on its way
        self.holds = False  # a prefix, to be released at the end
        self.cancelled = False
        self.produced = 0
        self.last = -1  # the token to go into the next forward pass

    @property
    def ready(self) -> bool:
        return self.request.prefix is None or self.prefix is not None

    @property
    def final_length(self) -> int:
        return len(self.request.prompt) + self.request.sampling.max_tokens


class _Group:
    """Prompts that are prefilled together, padded on the left."""

    def __init__(self, jobs: list[_Job], sliding: tuple[bool, ...]) -> None:
        lengths = [len(job.request.prompt) for job in jobs]
        self.jobs, self.width, self.done = jobs, max(lengths), 0
        self.ids = torch.tensor([[0] * (self.width - len(j.request.prompt)) + [*j.request.prompt] for j in jobs])
        self.cache = SlotCache(sliding)
        self.cache.begin(lengths)


class BatchingEngine:
    """An `Engine` over one model in this process. See `engine.Engine` for what it promises.

    In float32 and above, greedy answers are those of each request alone. In bfloat16 a row's numbers differ in their last
    bits with the shape of the batch, as in any engine, so where two tokens are about equally likely the other may be chosen.

    Args:
        model: a decoder whose layers keep keys and values. The engine's alone while it runs.
        limits: what it may use.

    Raises:
        UnsupportedModelError: it is no such model.

    Example:
        >>> engine = BatchingEngine(model)                                                   # doctest: +SKIP
        >>> engine.submit(Request("1", (7, 8, 9), None, Sampling(max_tokens=2)), print)      # doctest: +SKIP
        Token(id=5, logprob=None, top=())
        Token(id=3, logprob=None, top=())
        Finished(reason='length')
        >>> engine.close()                                                                   # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, limits: BatchLimits | None = None) -> None:
        self.limits = limits or BatchLimits()
        self._model, self._device = model, input_device(model)
        self._sliding = sliding_layers(model)
        self._stack = _decoder_stack(model)
        self._sites = {site.name: site for site in attention_sites(model)}
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._keeps = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        own_length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._max_length = min(n for n in (self.limits.length, own_length, self.limits.tokens) if n is not None)
        self.residency = Residency(
            self._device,
            model.dtype,
            self.check,
            device_bytes=self.limits.device_bytes,
            host_bytes=0 if self._device.type == "cpu" else self.limits.host_bytes,
        )
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # something to do
        self._jobs: dict[str, _Job] = {}  # all that have not ended
        self._waiting = FairQueue[_Job]()
        self._staged = deque[_Group]()
        self._rows: list[_Job] = []  # those that decode, in the order of the cache's rows
        self._cache = SlotCache(self._sliding)
        self._short_turn = True
        self._deadline: float | None = None  # set by `close`
        self._failure: BaseException | None = None
        self._counts = {"steps_total": 0, "prefill_tokens_total": 0, "generated_tokens_total": 0}
        self._attachment: Attachment = attach(model, [None])
        self._attached: list[Prefix | None] = [None]
        self._thread = threading.Thread(target=self._run, name="foreword-engine", daemon=True)
        self._thread.start()

    # What others call, from any thread.

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def check(self, prefix: Prefix) -> None:
        name = prefix.base.get("name", "another model")
        if prefix.head is not None:
            raise UnsupportedModelError(
                f"The prefix has a trained head, for the task {prefix.metadata.get('task')}; only completions are served."
            )
        for site in prefix.sites:
            if self._sites.get(site.name) != site:
                raise ModelMismatchError(
                    f"The prefix was made for {name} and has a site {site}, but this model has "
                    f"{self._sites.get(site.name, 'no such site')}. Serve the base that the prefix was trained on."
                )
        if len({site.name for site in prefix.sites}) < len(prefix.sites):
            raise ModelMismatchError("The prefix has two entries for one attention site.")
        if prefix.position_offset not in (0, prefix.num_virtual_tokens):
            raise ModelMismatchError(
                f"The prefix has {prefix.num_virtual_tokens} virtual tokens and shifts positions by {prefix.position_offset}; "
                "a prefix shifts them by as many, or by none."
            )
        if "fingerprint" not in prefix.base:
            raise ModelMismatchError("The prefix does not say which model it was made for (no fingerprint).")
        try:
            check_fingerprint(prefix.base["fingerprint"], self._model, name)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelMismatchError(f"The prefix's fingerprint is damaged: {type(error).__name__}: {error}.") from None

    def submit(self, request: Request, emit: Emit) -> None:
        virtual = 0 if request.prefix is None else request.prefix.position_offset
        asked = virtual + len(request.prompt) + request.sampling.max_tokens
        if asked > self._max_length:
            raise PositionError(
                f"{virtual} virtual tokens, a prompt of {len(request.prompt)} and an answer of up to "
                f"{request.sampling.max_tokens} tokens make {asked}; at most {self._max_length} fit. Shorten the prompt or the answer."
            )
        assert request.prompt, "an empty prompt has no next token"
        job = _Job(request, emit, self._device)
        with self._lock:
            if self._failure is not None:
                raise ShutdownError(f"The engine has failed: {self._failure}")
            if self._deadline is not None:
                raise ShutdownError("The server is shutting down.")
            if len(self._waiting) >= self.limits.waiting:
                raise OverloadedError(f"{len(self._waiting)} requests are waiting already. Try again later.")
            assert request.id not in self._jobs, "two requests with one id"
            self._jobs[request.id] = job
            self._waiting.add(job)
            self._news.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if (job := self._jobs.get(request_id)) is not None:
                job.cancelled = True
                self._news.notify_all()

    def stats(self) -> Stats:
        with self._lock:
            waiting, running = len(self._waiting), len(self._jobs)
        return Stats(
            waiting=waiting,
            running=running - waiting,
            prefix_hits_total=self.residency.hits_total,
            prefix_loads_total=dict(self.residency.loads_total),
            prefix_bytes=self.residency.num_bytes,
            **self._counts,
        )

    def close(self, timeout: float = 0.0) -> None:
        with self._lock:
            self._deadline = time.monotonic() + timeout
            self._news.notify_all()
        self._thread.join()
        self.residency.close()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._drop_cancelled()
                    if self._rows:
                        self._decode()
                    self._prefill()
        except Exception as error:  # noqa: BLE001  # the model itself failed: nobody can be served any more
            _log.exception("the engine failed")
            self._failure = error
        finally:
            with self._lock:
                self._deadline = self._deadline or 0.0
            reason = (
                "The engine has failed." if self._failure else "The server was shut down before the answer was whole."
            )
            for job in list(self._jobs.values()):
                self._end(job, Failed(ShutdownError(reason)))
            self._attachment.detach()

    def _wait(self) -> bool:
        """Wait until there is something to do. Whether to go on."""
        with self._lock:
            while True:
                if self._deadline is not None and (not self._jobs or time.monotonic() >= self._deadline):
                    return False
                self._prepare()
                if self._rows or self._staged or any(job.ready or job.cancelled for job in self._waiting):
                    return True
                self._news.wait(None if self._deadline is None else max(0.0, self._deadline - time.monotonic()))

    def _prepare(self) -> None:
        """Ask for the prefixes of those that are next."""
        for job in list(islice(self._waiting, 2 * self.limits.rows)):
            wanted = job.request.prefix
            if wanted is None or job.prefix is not None or job.loading or job.cancelled:
                continue
            try:
                found = self.residency.acquire(wanted, lambda found, job=job: self._arrived(job, found))
            except ForewordError as error:
                self._refused(job, error)
                continue
            if isinstance(found, Prefix):
                job.prefix, job.holds = found, True
            job.loading = found == "loading"

    def _arrived(self, job: _Job, found: Prefix | ForewordError) -> None:
        """A prefix was loaded, or cannot be. Called by the thread that tried."""
        with self._lock:
            job.loading = False
            if isinstance(found, Prefix):
                job.prefix, job.holds = found, True
                if job.request.id not in self._jobs:  # cancelled meanwhile
                    self._release(job)
            else:
                self._refused(job, found)
            self._news.notify_all()

    def _refused(self, job: _Job, error: ForewordError) -> None:
        """End a waiting job. The lock is held."""
        if self._jobs.pop(job.request.id, None) is not None:
            self._waiting.remove(job)
            _tell(job, Failed(error))

    def _release(self, job: _Job) -> None:
        if job.holds and job.request.prefix is not None:
            job.holds = False
            self.residency.release(job.request.prefix.version)

    def _end(self, job: _Job, event: Finished | Failed) -> None:
        with self._lock:
            if self._jobs.pop(job.request.id, None) is None:
                return
            if job in self._waiting:
                self._waiting.remove(job)
            self._release(job)
        _tell(job, event)

    def _drop_cancelled(self) -> None:
        with self._lock:
            waiting = [job for job in self._waiting if job.cancelled]
        for job in waiting:
            self._end(job, Finished("cancelled"))
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._end(self._rows[row], Finished("cancelled"))
                self._leave(row)
        for group in list(self._staged):
            for job in group.jobs:
                if job.cancelled:
                    self._end(job, Finished("cancelled"))
            if all(job.cancelled for job in group.jobs):
                self._staged.remove(group)

    # decoding

    def _decode(self) -> None:
        """One more token for each running row."""
        ids = torch.tensor([[job.last] for job in self._rows])
        logits = self._forward(self._rows, ids, self._cache)
        self._counts["steps_total"] += 1
        going = self._take(self._rows, logits)
        for row in reversed(range(len(self._rows))):
            if not going[row]:
                self._leave(row)

    def _leave(self, row: int) -> None:
        self._cache.leave(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _take(self, jobs: Sequence[_Job], logits: Float[Tensor, "B V"]) -> list[bool]:
        """Choose each row's next token and tell it; which rows go on."""
        going = []
        for job, token in zip(jobs, choose(logits, [job.chooser for job in jobs]), strict=True):
            end: Finished | Failed | None = None
            if token is None:
                about = "" if job.request.prefix is None else f" with prefix {job.request.prefix.name!r}"
                end = Failed(ServingError(f"The model's output{about} is not finite."))
            elif token.id in job.request.sampling.stop_ids:
                end = Finished("stop")
            else:
                self._counts["generated_tokens_total"] += 1
                job.produced, job.last = job.produced + 1, token.id
                _tell(job, token)
                if job.produced == job.request.sampling.max_tokens:
                    end = Finished("length")
            if end is not None:
                self._end(job, end)
            going.append(end is None)
        return going

    def _forward(self, jobs: Sequence[_Job], ids: Int[Tensor, "B T"], cache: SlotCache) -> Float[Tensor, "B V"]:
        """The logits after the last of these tokens, each row with its prefix."""
        prefixes = [job.prefix for job in jobs]
        if prefixes != self._attached:
            self._attachment.use(prefixes)
            self._attached = prefixes
        queries = ids.shape[1]
        cache.reserve(queries)
        mask, positions = cache.mask(queries), cache.positions(queries) + self._stack.first_position
        placed: dict[str, Any] = {"position_ids": positions.to(self._device)} if self._stack.takes_positions else {}
        placed |= {self._cache_name: cache} | self._keeps
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
            use_cache=True,
            **placed,
        )
        cache.advance(queries)
        return output.logits[:, -1]

    # prefilling

    def _prefill(self) -> None:
        """One part of the prompts of one group; a group that is whole joins those that run."""
        group = self._next_group()
        if group is None:
            return
        columns = max(1, self.limits.prefill_tokens // len(group.jobs))
        ids = group.ids[:, group.done : group.done + columns]
        logits = self._forward(group.jobs, ids, group.cache)
        group.done += ids.shape[1]
        self._counts["prefill_tokens_total"] += ids.numel()
        if group.done < group.width:
            self._staged.append(group)
            return
        alive = [row for row, job in enumerate(group.jobs) if not job.cancelled]
        going = self._take([group.jobs[row] for row in alive], logits[alive])
        for row, job in enumerate(group.jobs):
            if job.cancelled:
                self._end(job, Finished("cancelled"))
            elif going[alive.index(row)]:
                self._cache.join(group.cache, row)
                self._rows.append(job)

    def _next_group(self) -> _Group | None:
        """In turns a group that is read in one part and one that takes several, if there are both.

        Long prompts that have come first are put aside, so a short one waits for one part of one of them, however many there are.
        """
        if self._short_turn or not self._staged:
            while jobs := self._admit():
                group = _Group(jobs, self._sliding)
                if len(jobs) * group.width <= self.limits.prefill_tokens:
                    self._short_turn = False
                    return group
                self._staged.append(group)
        self._short_turn = True
        return self._staged.popleft() if self._staged else None

    def _admit(self) -> list[_Job]:
        """Those that are next, as many as may be prefilled at once."""
        with self._lock:
            inside = [*self._rows, *(job for group in self._staged for job in group.jobs)]
            chosen = list[_Job]()
            for job in [job for job in self._waiting if job.ready and not job.cancelled]:
                rows = len(inside) + len(chosen) + 1
                longest = max(other.final_length for other in (job, *inside, *chosen))
                padded = (len(chosen) + 1) * max(len(other.request.prompt) for other in (job, *chosen))
                too_long = chosen and padded > self.limits.prefill_tokens
                if rows > self.limits.rows or (rows > 1 and rows * longest > self.limits.tokens) or too_long:
                    break
                chosen.append(job)
            for job in chosen:
                self._waiting.take(job)
            return chosen


def _tell(job: _Job, event: Token | Finished | Failed) -> None:
    try:
        job.emit(event)
    except Exception:  # noqa: BLE001  # its listener is gone; that is no reason to fail the others
        _log.exception("request %s: nobody takes its events", job.request.id)
        job.cancelled = True


def _decoder_stack(model: PreTrainedModel) -> Any:
    first, *others = stacks(model)
    if others or model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} reads more than token ids, or has {1 + len(others)} stacks with attention; decoders "
            "that read token ids can be served."
        )
    if not any(site.kind == "self" for site in first.sites):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder: it completes nothing. Serve a decoder.")
    return first
