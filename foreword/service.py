"""What a server serves: one base, its prefixes, and answers with them. No HTTP.

Here names become prefixes, messages become token ids, and limits are kept.
"""

import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .answers import Answer, Reader
from .catalog import Catalog, Entry
from .data import Row, prompt_ids
from .engine import Engine, PrefixVersion, Request, Sampling
from .errors import ConfigError, DataError, OverloadedError, PositionError, PrefixFileError, ServingError
from .keys import Key, KeyFile
from .schemas import ChatRequest, CompletionRequest, GenerationRequest
from .telemetry import Metrics

__all__ = ["EVERYONE", "Asked", "NotFoundError", "ServerLimits", "Service"]

_log = logging.getLogger("foreword.service")
EVERYONE = Key("", "", ("infer", "manage"))  # where no keys are


class NotFoundError(ConfigError):
    """There is no such model or prefix, or the key may not know of it."""


@dataclass(frozen=True)
class ServerLimits:
    """What clients may ask for.

    Args:
        body_bytes: of a request for answers.
        upload_bytes: of a prefix file.
        max_tokens: of one answer, and the default for chats.
        requests: that run or wait at a time, of all clients.
        seconds: that a request body may take to arrive.
    """

    body_bytes: int = 4_000_000
    upload_bytes: int = 64_000_000
    max_tokens: int = 1024
    requests: int = 512
    seconds: float = 60.0


@dataclass(frozen=True)
class Asked:
    """Prompts, and how to answer them: what of a request does not change when its prefix does."""

    prompts: tuple[tuple[int, ...], ...]
    prefix: PrefixVersion | None
    model: str  # as the response calls it
    options: dict[str, Any]
    count: int  # answers to each prompt
    seed: int | None
    stops: tuple[str, ...]


@dataclass
class Service:
    """One base and its prefixes.

    Args:
        name: of the base.
        tokenizer: of the base.
        engine: what makes the tokens.
        catalog: the prefixes.
        keys: who may do what; `None`: everybody everything.
        limits: what clients may ask for.
        stop_ids: the tokens that end an answer.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    catalog: Catalog
    keys: KeyFile | None = None
    limits: ServerLimits = ServerLimits()
    stop_ids: frozenset[int] = frozenset()
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    _in_flight: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)

    @property
    def ready(self) -> str | None:
        """Why no request can be taken, or `None`."""
        if self.engine.failure is not None:
            return f"the engine has failed: {self.engine.failure}"
        return "shutting down" if self.draining else None

    def key(self, given: str | None) -> Key | None:
        """Whose key this is; `None`: nobody's."""
        if self.keys is None or not self.keys.exist:
            return EVERYONE
        return None if given is None else self.keys.find(given)

    # names

    def entry(self, name: str, key: Key) -> Entry:
        """The prefix of this name, if there is one for this key."""
        try:
            if not key.sees(name):
                raise KeyError(name)
            return self.catalog[name]
        except KeyError:
            raise NotFoundError(f"There is no prefix {name!r}.") from None
        except PrefixFileError as error:
            _log.error("prefix file is damaged: %s", error)
            raise ServingError(f"The file of prefix {name!r} is damaged. Upload it again.") from None

    def visible(self, key: Key) -> list[str]:
        """The names of the prefixes that the key may use."""
        return [name for name in self.catalog.names() if key.sees(name)]

    def put(self, name: str, content: bytes, key: Key) -> tuple[Entry, bool]:
        """Upload a prefix. Returns its entry, and whether its name is new."""

        def allowed(new: bool) -> None:
            if new and len(self.visible(key)) >= key.max_prefixes:
                raise OverloadedError(
                    f"There are {key.max_prefixes} prefixes already, as many as this key may have. Delete one first.",
                    60,
                )

        if not key.sees(name):
            raise PermissionError(f"This key may not upload a prefix {name!r}, only: {', '.join(key.prefixes)}.")
        return self.catalog.put(name, content, allowed)

    def delete(self, name: str, key: Key) -> None:
        """Delete a prefix. Requests that have started with it end with it."""
        self.entry(name, key)
        try:
            self.catalog.delete(name)
        except KeyError:
            raise NotFoundError(f"There is no prefix {name!r}.") from None

    # answers

    def taking(self, key: Key) -> "_Place":
        """A place among the requests in flight, held while inside, or until it is released.

        Raises:
            OverloadedError: there is none left.
        """
        if self._in_flight[key.name] >= key.max_requests:
            raise OverloadedError(f"{key.max_requests} requests of this key are running or waiting already.")
        if self._in_flight.total() >= self.limits.requests:
            raise OverloadedError(f"{self.limits.requests} requests are running or waiting already.")
        return _Place(self._in_flight, key.name)

    def read(self, body: GenerationRequest, key: Key) -> Asked:
        """What a request asks for.

        Raises:
            NotFoundError: no such model.
            ForewordError: it cannot be answered.
        """
        entry = self._chosen(body.model, key)
        prefix = None if entry is None else self._version(entry)
        prompts = self._prompts(body, entry)
        offset = 0 if prefix is None else prefix.position_offset
        room = self.engine.max_length - offset - max(map(len, prompts))
        if room < 1:
            raise PositionError(
                f"The prompt has {max(map(len, prompts))} tokens{f' and the prefix {offset}' if offset else ''}; at most "
                f"{self.engine.max_length} fit, the answer included. Shorten the prompt."
            )
        options = self._options(body, room)
        vocabulary = len(self.tokenizer)
        for ids in (*prompts, tuple(options["logit_bias"])):
            if any(token >= vocabulary for token in ids):
                raise DataError(f"Token id {max(ids)}: the vocabulary has {vocabulary}.")
        model = self.name if entry is None else f"{self.name}:{entry.name}"
        return Asked(prompts, prefix, model, options, body.n, body.seed, tuple(body.stops))

    def answer(self, asked: Asked, request_id: str, key: Key) -> list[Answer]:
        """Submit all requests that this needs: for each prompt `count` answers, side by side."""
        answers = list[Answer]()
        try:
            for i, prompt in enumerate(ids for ids in asked.prompts for _ in range(asked.count)):
                seed = None if asked.seed is None else asked.seed + i
                request = Request(
                    f"{request_id}-{i}-{secrets.token_hex(4)}",
                    prompt,
                    asked.prefix,
                    Sampling(seed=seed, **asked.options),
                    owner=key.name,
                )
                answers.append(Answer(self.engine, request, Reader(self.tokenizer, asked.stops)))
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return answers

    def _chosen(self, model: str, key: Key) -> Entry | None:
        if model in ("", self.name):
            return None
        name = model.removeprefix(f"{self.name}:")
        try:
            return self.entry(name, key)
        except NotFoundError:
            raise NotFoundError(
                f"The model {model!r} does not exist. There is {self.name!r}, and each prefix that GET /v1/models lists."
            ) from None

    def _version(self, entry: Entry) -> PrefixVersion:
        try:
            return self.catalog.version(entry)
        except KeyError:
            raise NotFoundError(f"There is no prefix {entry.name!r}.") from None

    def _prompts(self, body: GenerationRequest, entry: Entry | None) -> tuple[tuple[int, ...], ...]:
        if isinstance(body, ChatRequest):
            own: Any = self.tokenizer.chat_template
            template = own if entry is None else entry.header["metadata"].get("template", own)
            messages = tuple({"role": message.role, "content": message.text} for message in body.messages)
            try:
                prompts = [prompt_ids(Row(messages, None, "messages"), self.tokenizer, template)]
            except (TemplateError, TypeError, ValueError) as error:
                raise DataError(f"The chat template cannot render these messages: {error}") from None
        else:
            assert isinstance(body, CompletionRequest)
            given: Any = body.prompt
            many = isinstance(given, list) and not isinstance(given[0], int)
            prompts = [self._ids(prompt) for prompt in (given if many else [given])]
        return tuple(tuple(prompt) for prompt in prompts)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt if isinstance(prompt, list) else prompt_ids(_plain(prompt), self.tokenizer, None)
        if not ids:
            start = self.tokenizer.bos_token_id
            if not isinstance(start, int):
                raise DataError("An empty prompt: this model has no token to start from. Give it some text.")
            ids = [start]
        return ids

    def _options(self, body: GenerationRequest, room: int) -> dict[str, Any]:
        """The fields of `Sampling` but the seed."""
        if isinstance(body, ChatRequest):
            asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            max_tokens = min(self.limits.max_tokens, room) if asked is None else asked
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        else:
            assert isinstance(body, CompletionRequest)
            max_tokens, logprobs = (min(16, room) if body.max_tokens is None else body.max_tokens), body.logprobs
        if max_tokens > self.limits.max_tokens:
            raise PositionError(
                f"max_tokens is {max_tokens}; this server gives at most {self.limits.max_tokens} (--max-tokens)."
            )
        return {
            "max_tokens": max_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": body.top_k or 0,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
            "logprobs": logprobs,
            "stop_ids": frozenset() if body.ignore_eos else self.stop_ids,
        }


class _Place:
    """Counts for one request in flight."""

    def __init__(self, counts: Counter[str], name: str) -> None:
        self._counts, self._name, self._held, self._kept = counts, name, True, False
        counts[name] += 1

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.release()

    def keep(self) -> None:
        """Hold the place beyond the `with`, until `release`."""
        self._kept = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._counts[self._name] -= 1
            if not self._counts[self._name]:
                del self._counts[self._name]


def _plain(text: str) -> Row:
    return Row(({"role": "user", "content": text},), None, "prompt")
