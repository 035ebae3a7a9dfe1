"""The engine: each answer is the one that its request would get alone, whatever else runs, comes and goes."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import make_model, named, tokens

import foreword
from foreword.batching import BatchingEngine, BatchLimits
from foreword.engine import Event, Failed, Finished, PrefixVersion, Request, Sampling, Token
from foreword.errors import (
    ModelMismatchError,
    OverloadedError,
    PositionError,
    PrefixChangedError,
    PrefixFileError,
    ShutdownError,
    UnsupportedModelError,
)
from foreword.initialization import noop_prefix, random_prefix


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


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12), st.sampled_from([None, 0, 1])), min_size=1, max_size=9),
    st.sampled_from([1, 7, 64]),
    st.integers(1, 4),
)
def test_any_mix_of_lengths_rows_and_parts(serving, asked, prefill_tokens, rows):
    model = make_model("gemma3")  # whose window is shorter than some prompts
    prefixes = [random_prefix(model, 2, seed=1), random_prefix(model, 6, seed=2)]
    chosen = [
        ((tokens(n, seed=i) % 200 + 10).tolist(), None if p is None else prefixes[p], count)
        for i, (n, count, p) in enumerate(asked)
    ]
    right = [alone(model, *one) for one in chosen]
    client = serving(model, rows=rows, prefill_tokens=prefill_tokens)
    versions = [client.version(prefix, f"q{i}") for i, prefix in enumerate(prefixes)]
    names = [
        client.submit(prompt, None if p is None else versions[p], max_tokens=count)
        for (prompt, _, count), (_, _, p) in zip(chosen, asked, strict=True)
    ]
    assert [client.tokens(name) for name in names] == right


def test_a_short_request_starts_within_two_steps_of_long_ones(serving):
    client = serving(make_model("llama"), rows=8, prefill_tokens=8)
    waits, ended = dict[str, list[int]](), threading.Event()

    def short(name: str) -> None:
        """Submitted by the engine's own thread, between two steps, so that they can be counted."""
        waits[name] = [client.engine.stats().steps_total]
        request = Request(name, (7, 8), None, Sampling(max_tokens=1, temperature=0.0))
        client.engine.submit(request, lambda event: waits[name].append(client.engine.stats().steps_total))

    def watch(event: Event) -> None:
        if isinstance(event, Token):
            short(f"short-{len(waits)}")
        else:
            ended.set()

    client.engine.submit(Request("watched", (5, 6), None, Sampling(max_tokens=30, temperature=0.0)), watch)
    long = client.submit(tokens(250).tolist(), max_tokens=60)  # a prompt of 32 parts beside one that decodes
    assert ended.wait(60)
    assert len(client.tokens(long)) == 60
    began = [first - submitted for submitted, first, *_ in waits.values()]
    assert len(began) == 30
    assert max(began) <= 2
    assert max(began) > 0  # some came when the turn was the long prompt's


def test_samples_repeat_by_seed_whatever_else_runs(serving):
    client = serving(make_model("llama"), rows=8)
    options = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 7, "max_tokens": 12}
    options |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    one = client.tokens(client.submit([1, 2, 3], **options))
    names = [client.submit([1, 2, 3], **options | {"seed": seed}) for seed in (7, 8, 9, 7)]
    found = [client.tokens(name) for name in names]
    assert found[0] == found[3] == one
    assert len({tuple(answer) for answer in found}) == 3


def test_sampling_options_do_what_they_say(serving, llama):
    client = serving(make_model("llama"))
    [likeliest] = alone(llama, [1, 2, 3], None, 1)
    assert client.tokens(client.submit([1, 2, 3], temperature=5.0, top_k=1, max_tokens=1)) == [likeliest]
    assert client.tokens(client.submit([1, 2, 3], temperature=5.0, top_p=1e-9, max_tokens=1)) == [likeliest]
    assert client.tokens(client.submit([1, 2, 3], logit_bias={9: 1e4}, max_tokens=3)) == [9, 9, 9]
    assert client.tokens(client.submit([1, 2, 3], logit_bias={likeliest: -1e4}, max_tokens=1)) != [likeliest]
    bias = {9: 1e5, 8: 1e5 - 1e3}  # the second is chosen once the first has a penalty
    assert client.tokens(client.submit([1], logit_bias=bias, presence_penalty=1e4, max_tokens=2)) == [9, 8]
    ended = client.wait(client.submit([1, 2, 3], stop_ids=frozenset({likeliest})))
    assert ended == [Finished("stop")]
    told = client.wait(client.submit([1, 2, 3], logprobs=2, max_tokens=1))[0]
    assert isinstance(told, Token)
    assert told.top[0] == (likeliest, told.logprob)


def test_cancelled_requests_end_and_others_do_not_notice(serving, llama):
    client = serving(make_model("llama"), rows=2, waiting=20)
    names = [client.submit([5, 6, 7, i], max_tokens=200) for i in range(6)]
    last = client.submit([5, 6, 7], max_tokens=9)
    for name in names:
        client.engine.cancel(name)
    client.engine.cancel("nobody")
    assert {client.wait(name)[-1] for name in names} == {Finished("cancelled")}
    assert client.tokens(last) == alone(llama, [5, 6, 7], None, 9)


def test_owners_take_turns(serving):
    client = serving(make_model("llama"), rows=1)
    order = list[str]()

    def submit(name: str) -> threading.Event:
        ended = threading.Event()

        def emit(event: Event) -> None:
            if not isinstance(event, Token):
                order.append(name)
                ended.set()

        request = Request(name, (1, 2), None, Sampling(max_tokens=30, temperature=0.0), owner=name[0])
        client.engine.submit(request, emit)
        return ended

    for ended in [submit(name) for name in ("a1", "a2", "a3", "b1", "b2")]:
        assert ended.wait(60)
    assert order.index("b1") <= 2  # the first of `a` had begun, perhaps the second was next
    assert order.index("b2") < order.index("a3") or order.index("b1") < order.index("a3")


def test_what_does_not_fit_is_refused(serving):
    client = serving(make_model("gpt2"), rows=1, waiting=1, length=100)
    assert client.engine.max_length == 100
    with pytest.raises(PositionError, match="at most 100 fit"):
        client.submit([1] * 95, max_tokens=10)
    long = client.submit([1, 2], max_tokens=90)
    with pytest.raises(OverloadedError):
        for _ in range(5):
            client.submit([1, 2], max_tokens=90)
    client.engine.cancel(long)


def test_a_model_that_cannot_be_served_is_refused():
    for family, told in (("t5", "encoder-decoder"), ("bert", "encoder"), ("lfm2", "more than keys and values")):
        with pytest.raises(UnsupportedModelError, match=told):
            BatchingEngine(make_model(family))


def test_close_lets_requests_finish_or_fails_them(tmp_path):
    for timeout, end in ((60.0, Finished), (0.0, Failed)):
        client = Client(BatchingEngine(make_model("llama")), tmp_path)
        name = client.submit([1, 2, 3], max_tokens=300)
        client.engine.close(timeout)
        assert isinstance(client.wait(name)[-1], end)
        with pytest.raises(ShutdownError):
            client.submit([1, 2, 3])


# ------------------------------------------------------------------------------------------- prefixes in and out


def test_a_budget_bounds_what_is_held(serving, llama, tmp_path):
    prefixes = [random_prefix(llama, 4, seed=i) for i in range(6)]
    size = max((foreword.save(p, tmp_path / "x.safetensors")).stat().st_size for p in prefixes)
    client = serving(make_model("llama"), rows=2, device_bytes=2 * size)
    versions = [client.version(prefix, f"b{i}") for i, prefix in enumerate(prefixes)]
    right = [alone(llama, [1, 2, 3], prefix) for prefix in prefixes]
    for _ in range(2):
        names = [client.submit([1, 2, 3], version) for version in versions]
        assert [client.tokens(name) for name in names] == right
        assert client.engine.stats().prefix_bytes["device"] <= 2 * size
    assert client.engine.stats().prefix_loads_total["disk"] > 6
    hits = client.engine.stats().prefix_hits_total
    assert client.tokens(client.submit([1, 2, 3], versions[5])) == right[5]
    assert client.engine.stats().prefix_hits_total == hits + 1


def test_what_leaves_the_device_waits_in_host_memory(llama, tmp_path):
    from foreword.residency import Residency

    ready = threading.Event()
    residency = Residency(torch.device("cpu"), torch.float64, lambda prefix: None, device_bytes=9000, host_bytes=10**6)
    client = Client(None, tmp_path)  # pyright: ignore[reportArgumentType]
    versions = [client.version(random_prefix(llama, 3, seed=i), f"h{i}") for i in range(2)]

    def hold(version) -> None:
        ready.clear()
        if residency.acquire(version, lambda found: ready.set()) == "loading":
            assert ready.wait(60)
        residency.release(version.version)

    for version in (versions[0], versions[1], versions[0], versions[0]):
        hold(version)
    assert residency.loads_total == {"disk": 2, "host": 1}
    assert residency.hits_total == 1
    residency.close()


def test_a_slow_disk_holds_up_nobody_else(serving, llama, monkeypatch):
    client = serving(make_model("llama"))
    slow, quick = (
        client.version(random_prefix(llama, 3), "slow"),
        client.version(random_prefix(llama, 3, seed=1), "quick"),
    )
    go, read = threading.Event(), Path.read_bytes

    def waits(path: Path) -> bytes:
        if path.stem == "slow":
            assert go.wait(60)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", waits)
    held = [client.submit([1, 2, 3], slow) for _ in range(3)]
    assert client.tokens(client.submit([1, 2, 3], quick))
    assert client.tokens(client.submit([1, 2, 3]))
    assert client.events[held[0]] == []
    go.set()
    assert client.tokens(held[0]) == client.tokens(held[2])


def test_a_request_ends_with_the_content_that_it_began_with(serving, llama):
    client = serving(make_model("llama"))
    old, new = random_prefix(llama, 3, seed=1), random_prefix(llama, 3, seed=2)
    version = client.version(old)
    began = client.submit([1, 2, 3], version, max_tokens=60)
    while not client.events[began]:
        pass
    after = client.submit([1, 2, 3], client.version(new), max_tokens=8)  # replaces the file
    assert client.tokens(began) == alone(llama, [1, 2, 3], old, 60)
    assert client.tokens(after) == alone(llama, [1, 2, 3], new, 8)


def test_a_prefix_that_is_gone_damaged_or_foreign_fails_its_requests_alone(serving, llama, tmp_path):
    client = serving(make_model("llama"))
    replaced, deleted, foreign = (client.version(random_prefix(llama, 3, seed=i), f"f{i}") for i in range(3))
    replaced.path.write_bytes(b"something else")
    deleted.path.unlink()
    foreign = client.version(random_prefix(make_model("llama", seed=5), 3), "foreign")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"x" * 50)
    damaged = PrefixVersion("junk", hashlib.sha256(junk.read_bytes()).hexdigest(), junk, 3)
    good = client.submit([1, 2, 3])
    for version, error in (
        (replaced, PrefixChangedError),
        (deleted, PrefixChangedError),
        (foreign, ModelMismatchError),
        (damaged, PrefixFileError),
    ):
        [event] = client.wait(client.submit([1, 2, 3], version))
        assert isinstance(event, Failed)
        assert isinstance(event.error, error)
    assert client.tokens(good)
