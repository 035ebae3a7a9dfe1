"""What serves requests: the interface between whoever has text and whoever has the model.

A request is token ids, the prefix that it names and how to sample; its answer comes back as events, one a token. An engine
knows no text and no HTTP, and what submits requests knows no model, so that another engine can take the place of ours
(`batching.BatchingEngine`): vLLM workers, for example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from .errors import ForewordError
from .prefix import Prefix

__all__ = ["Emit", "Engine", "Event", "Failed", "Finished", "PrefixVersion", "Request", "Sampling", "Stats", "Token"]


@dataclass(frozen=True)
class PrefixVersion:
    """One content of a named prefix. A name gets a new version with each upload; a version never changes."""

    name: str
    version: str  # SHA-256 of the file, in hexadecimal
    path: Path  # where the file was when the request came; by now it may hold a newer version
    position_offset: int  # of the prefix: the first real token has this position


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Args:
        max_tokens: how many tokens the answer has at most.
        temperature: 0 always takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among so many of the likeliest tokens; 0: among all.
        seed: the same seed, prompt and prefix give the same answer, whatever else is in the batch. `None`: a random one.
        repetition_penalty: divides the logits above zero, and multiplies those below, of tokens that the prompt or the answer
            has already (Keskar et al. 2019, *CTRL*, section 4.1). 1: none.
        presence_penalty: taken from the logit of each token that the answer has already.
        frequency_penalty: taken as many times as the answer has the token.
        logit_bias: added to the logits of these tokens.
        logprobs: how many of the likeliest tokens are told with their log-probabilities beside the chosen one. 0: the chosen
            one alone. `None`: no log-probabilities. They are the model's own, before temperature, penalties and bias.
        stop_ids: tokens that end the answer. The one that did is not among the events.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Request:
    """One answer to be made. The first real token has position `prefix.position_offset`, or 0."""

    id: str  # unique among the requests that an engine has
    prompt: tuple[int, ...]
    prefix: PrefixVersion | None
    sampling: Sampling
    owner: str = ""  # on whose behalf: owners take turns, however many requests each has


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of an answer."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log-probabilities, where asked for


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is whole, or was cancelled. No event follows."""

    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of this answer, for this reason. No event follows."""

    error: ForewordError


Event = Token | Finished | Failed
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Stats:
    """What an engine counts. Those that end in `total` only grow."""

    waiting: int = 0  # requests that have not started
    running: int = 0  # requests that have
    steps_total: int = 0  # forward passes that made tokens
    prefill_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_hits_total: int = 0  # requests whose prefix was on the device
    prefix_loads_total: dict[str, int] = field(default_factory=dict)  # by where it came from: host, disk
    prefix_bytes: dict[str, int] = field(default_factory=dict)  # by where they are: device, host


@runtime_checkable
class Engine(Protocol):
    """What an engine promises.

    - The answer to a request is the one that it would get alone, with exactly the content of its prefix version (or none):
      what else is in the batch changes nothing.
    - For each request that `submit` took, `emit` is called once for each token, in order, then once with `Finished` or
      `Failed`, whatever happens. It is called from a thread of the engine's and must return at once.
    - Loading one prefix does not hold up requests with other prefixes.
    - A prefix that cannot be used fails its own requests alone. If its file no longer holds the version asked for, the
      error is a `PrefixChangedError`, before the first token: resolve the name again and submit once more.
    - All methods may be called from any thread, and only `close` may block.
    """

    @property
    def max_length(self) -> int:
        """How many tokens a request may have: virtual, prompt and answer together."""
        ...

    def check(self, prefix: Prefix) -> None:
        """Raise a `ModelMismatchError` or `UnsupportedModelError` if the engine could not serve this prefix."""
        ...

    def submit(self, request: Request, emit: Emit) -> None:
        """Put the request into the queue.

        Raises:
            PositionError: prefix, prompt and `max_tokens` together are longer than `max_length`.
            OverloadedError: too many requests wait already; its `retry_after` says when to try again.
            ShutdownError: the engine was closed, or has failed.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request soon, with `Finished("cancelled")`. One that is unknown, or has ended, is passed over."""
        ...

    def stats(self) -> Stats:
        """The counts of now."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine for good, if anything did."""
        ...

    def close(self, timeout: float = 0.0) -> None:
        """Take no more requests, give those that it has `timeout` seconds, then fail the rest with a `ShutdownError`."""
        ...
