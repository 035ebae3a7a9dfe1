"""The engine: each answer is the one that its request would get alone, whatever else runs, comes and goes."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from zoo import make_model, named, tokens

import foreword
from foreword.batching import BatchingEngine, BatchLimits
from foreword.engine import Event, Finished, PrefixVersion, Request, Sampling, Token
from foreword.initialization import noop_prefix, random_prefix

VOCABULARY = 256


class Client:
    """Submits requests and collects their events."""

    def __init__(self, engine: BatchingEngine, folder: Path) -> None:
        self.engine, self.folder, self.events = engine, folder, dict[str, list[Event]]()
        self._ended = dict[str, threading.Event]()

    def version(self, prefix: foreword.Prefix | None, name: str = "p") -> PrefixVersion | None:
        if prefix is None:
            return None
        path = foreword.save(prefix, self.folder / f"{name}.safetensors")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return PrefixVersion(name, digest, path, prefix.position_offset)

    def submit(self, prompt, prefix: PrefixVersion | None = None, owner: str = "", **sampling) -> str:
        name = f"r{len(self.events)}"
        events, ended = self.events.setdefault(name, []), self._ended.setdefault(name, threading.Event())

        def emit(event: Event) -> None:
            events.append(event)
            if not isinstance(event, Token):
                ended.set()

        options = {"max_tokens": 8, "temperature": 0.0} | sampling
        self.engine.submit(Request(name, tuple(prompt), prefix, Sampling(**options), owner), emit)
        return name

    def wait(self, name: str) -> list[Event]:
        assert self._ended[name].wait(60), name
        return self.events[name]

    def tokens(self, name: str) -> list[int]:
        *made, end = self.wait(name)
        assert isinstance(end, Finished), end
        return [event.id for event in made if isinstance(event, Token)]


@pytest.fixture
def serving(tmp_path) -> Iterator:
    """Makes clients of engines, and closes these."""
    engines = []

    def make(model, **limits) -> Client:
        engines.append(BatchingEngine(model, BatchLimits(**limits)))
        return Client(engines[-1], tmp_path)

    yield make
    for engine in engines:
        engine.close()
        assert engine.failure is None


def alone(model, prompt, prefix, count: int = 8) -> list[int]:
    """What the model says, by whole forward passes without a cache."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode(), foreword.attach(model, [prefix]):
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def prompts(count: int) -> list[list[int]]:
    return [(tokens(3 + 7 * i % 23, seed=i) % 200 + 10).tolist() for i in range(count)]


@pytest.mark.parametrize("family", named("decoder"))
def test_each_answer_is_that_of_the_request_alone(serving, family):
    model = make_model(family)
    prefixes = [random_prefix(model, 3, seed=1), None, random_prefix(model, 5, seed=2), noop_prefix(model, 4)]
    asked = [(prompt, prefixes[i % 4], 3 + 5 * i % 14) for i, prompt in enumerate(prompts(10))]
    right = [alone(model, *one) for one in asked]
    client = serving(model, rows=4, prefill_tokens=16)  # fewer rows than requests, prompts in parts
    versions = [client.version(prefix, f"p{i}") for i, prefix in enumerate(prefixes)]
    names = [client.submit(p, versions[i % 4], max_tokens=count) for i, (p, _, count) in enumerate(asked)]
    assert [client.tokens(name) for name in names] == right
