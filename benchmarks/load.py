"""Load on a running server: is every answer right, is none lost, how fast, and does its memory stay.

    python benchmarks/load.py soak --seconds 600         # many clients, mixed, some hang up, prefixes come and go
    python benchmarks/load.py bars                       # throughput over prefixes, latency of a switch, 1,000 prefixes
    python benchmarks/load.py llama                      # the plain load of `bars` here and on llama.cpp's server
    python benchmarks/load.py speed http://127.0.0.1:8080/v1   # the same on any other server

All but the last start `foreword serve` themselves, on an empty store. Each answer is compared with what the model says to that
request alone, greedily, in this process: in float32, where both must be equal.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

import foreword
from foreword.data import completion_row, prompt_ids

CLIENTS, PREFIXES = 64, 8
TEXTS = [
    "Answer as a pirate would, with many an arr.",
    "Answer in one short sentence and nothing else.",
    "You are a poet. Everything you say rhymes with the line before it.",
    "Answer only with a JSON object that has the fields topic and answer.",
    "You are a patient teacher for children of six years. Use simple words.",
    "Translate what the user says into French.",
    "You are a lawyer. Begin each answer with a warning and be very careful in all that you say after it.",
    "List three points, each on a line of its own.",
]
QUESTIONS = [
    ("Where is my order?", 12),
    ("Write about the sea.", 48),
    ("What is the capital of Portugal, and what should I see there on a rainy day in November?", 32),
    ("My lamp from order 5512 flickers. " * 12, 20),
    ("Hi", 4),
]


class Case(NamedTuple):
    """A request and its right answer."""

    prefix: int | None
    question: str
    max_tokens: int
    answer: str


# ------------------------------------------------------------------------------------------------- the server


class Server:
    """`foreword serve` in a process of its own."""

    def __init__(self, store: Path, model: str, *options: object) -> None:
        command = [
            sys.executable,
            "-m",
            "foreword.cli",
            "serve",
            "--model",
            model,
            "--store",
            store,
            "--port",
            0,
            *options,
        ]
        began = time.perf_counter()
        self.log = (store.parent / "server.log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen([str(part) for part in command], stderr=self.log, stdout=self.log)
        while (found := re.search(r"http://\S+:\d+", Path(self.log.name).read_text("utf-8"))) is None:
            if self.process.poll() is not None:
                raise SystemExit(Path(self.log.name).read_text("utf-8"))
            time.sleep(0.05)
        self.url, self.seconds = found.group() + "/v1", time.perf_counter() - began

    def resident(self) -> float:
        """Memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1000

    def metric(self, name: str) -> float:
        lines = httpx.get(self.url.removesuffix("/v1") + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self.log.close()


@contextlib.contextmanager
def serving(store: Path, model: str, *options: object) -> Iterator[Server]:
    server = Server(store, model, *options)
    try:
        yield server
    finally:
        server.stop()


def make_prefixes(model: Any, tokenizer: Any, folder: Path) -> list[foreword.Prefix]:
    """A prefix from each text, as a chat's first turn."""
    made = []
    for i, text in enumerate(TEXTS[:PREFIXES]):
        ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
        prefix = foreword.text_prefix(model, tokenizer(ids, add_special_tokens=False)["input_ids"])
        prefix.metadata["template"] = tokenizer.chat_template
        foreword.save(prefix, folder / f"p{i}.safetensors")
        made.append(prefix)
    return made


def right_answers(base: Any, prefixes: Sequence[foreword.Prefix]) -> list[Case]:
    """What the model says to each request alone."""
    cases = []
    for number in (None, *range(len(prefixes))):
        for question, count in QUESTIONS:
            row = completion_row({"prompt": question}, "question", False)
            ids = torch.tensor([prompt_ids(row, base.tokenizer, base.tokenizer.chat_template)])
            with torch.inference_mode(), foreword.attach(base.model, [None if number is None else prefixes[number]]):
                out = base.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                    pad_token_id=base.tokenizer.eos_token_id,
                )  # fmt: skip
            text = base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            cases.append(Case(number, question, count, text))
    return cases


# -------------------------------------------------------------------------------------------------------- soak


class Tally:
    """What happened."""

    def __init__(self) -> None:
        self.counts, self.first, self.tokens, self.wrong = Counter[str](), list[float](), 0, list[str]()


async def ask(
    client: httpx.AsyncClient,
    case: Case,
    name: str,
    tally: Tally,
    cases: Sequence[Case],
    versions: dict[str, int],
    hang_up: bool,
) -> None:
    """One streamed request, compared with its right answer."""
    body = {"model": name, "messages": [{"role": "user", "content": case.question}], "temperature": 0, "stream": True}
    body |= {"max_tokens": case.max_tokens, "stream_options": {"include_usage": True}}
    began, text, done = time.perf_counter(), "", False
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            expected = (response.status_code == 404 and name == "churn") or response.status_code == 429
            tally.counts[f"status {response.status_code}"] += 1
            if not expected:
                tally.counts["lost"] += 1
                tally.wrong.append(f"{response.status_code} {response.text[:200]}")
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers["retry-after"]))
            return
        if name == "churn":  # which content answered
            number = versions[response.headers["foreword-prefix-version"]]
            case = next(c for c in cases if c.prefix == number and c.question == case.question)
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                tally.wrong.append(str(chunk))
                break
            if not text and chunk["choices"]:
                tally.first.append(time.perf_counter() - began)
            text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            tally.tokens += chunk.get("usage", {}).get("completion_tokens", 0)
            if hang_up and len(text) > 12:
                tally.counts["hung up"] += 1
                return
    tally.counts["whole"] += done
    tally.counts["lost"] += not done
    if done and text != case.answer:
        tally.wrong.append(f"{name}: {case.question[:30]!r}: {text!r}, right is {case.answer!r}")


async def soak(
    server: Server, cases: list[Case], contents: list[bytes], seconds: float, clients: int
) -> dict[str, Any]:
    tally, ends = Tally(), time.perf_counter() + seconds
    versions = {hashlib.sha256(content).hexdigest(): i for i, content in enumerate(contents)}
    memory = list[tuple[float, float]]()
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            chooser = random.Random(number)
            while time.perf_counter() < ends:
                case, hang_up = chooser.choice(cases), chooser.random() < 0.1
                name = "churn" if chooser.random() < 0.1 else "" if case.prefix is None else f"p{case.prefix}"
                await ask(client, case, name, tally, cases, versions, hang_up)

        async def churn() -> None:
            chooser = random.Random("churn")
            while time.perf_counter() < ends:
                if chooser.random() < 0.2:
                    status = (await client.delete("prefixes/churn")).status_code
                    assert status in (204, 404), status
                    tally.counts["deleted"] += status == 204
                else:
                    status = (await client.put("prefixes/churn", content=chooser.choice(contents))).status_code
                    assert status in (200, 201), status
                    tally.counts["uploaded"] += 1
                await asyncio.sleep(chooser.random())

        async def watch() -> None:
            began = time.perf_counter()
            while time.perf_counter() < ends:
                memory.append((time.perf_counter() - began, server.resident()))
                await asyncio.sleep(2)

        began = time.perf_counter()
        await asyncio.gather(churn(), watch(), *(one(number) for number in range(clients)))
        took = time.perf_counter() - began
    late = [(t, m) for t, m in memory if t > seconds / 3]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else 0.0
    return {
        "seconds": round(took, 1),
        "clients": clients,
        "requests": dict(tally.counts),
        "wrong answers": len(tally.wrong),
        "first wrong": tally.wrong[:3],
        "lost": tally.counts["lost"],
        "tokens per second": round(tally.tokens / took, 1),
        "time to first token, s": {f"p{q}": round(_quantile(tally.first, q), 2) for q in (50, 95, 99)},
        "memory, MB": {
            "after a third": round(late[0][1]),
            "end": round(memory[-1][1]),
            "most": round(max(m for _, m in memory)),
        },
        "memory growth in the last two thirds, MB a minute": round(slope * 60, 2),
    }


def _quantile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)] if values else float("nan")


# -------------------------------------------------------------------------------------------------------- bars


_numbers = itertools.count(1000)


async def throughput(url: str, models: Sequence[str], at_once: int, count: int = 64) -> float:
    """Tokens a second of one request for each of `models`, so many at once."""
    gate, tokens = asyncio.Semaphore(at_once), 0
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:

        async def one(model: str) -> int:
            number = next(_numbers)  # no prompt comes twice, as servers remember them
            words = f"Customer {number} writes: my lamp from order {5000 + number} flickers since Monday, what can I do about it?"
            body = {"prompt": words, "max_tokens": count, "temperature": 0, "ignore_eos": True} | (
                {"model": model} if model else {}
            )
            async with gate:
                response = await client.post("completions", json=body)
            response.raise_for_status()
            return response.json()["usage"]["completion_tokens"]

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(one, models)))
        return tokens / (time.perf_counter() - began)


def speeds(url: str, names: Sequence[str], rounds: int = 2) -> dict[str, Any]:
    """The same load in turns, so that a busy machine meets all alike: medians, and medians of the ratios within a round.

    Without prefixes the fastest round of each, to be compared with another server's: other work on the machine only slows.
    """
    loads: dict[str, tuple[list[str], int]] = {"16 at once, no prefix": ([""] * 16, 16)}
    if names:
        loads["16 at once, one prefix"] = ([names[0]] * 16, 16)
        loads["16 at once, 8 prefixes"] = ([*names[:8]] * 2, 16)
        loads["one after another"] = ([*names[:4]], 1)
    else:
        loads["one after another"] = ([""] * 4, 1)
    for models, at_once in loads.values():  # warm up
        asyncio.run(throughput(url, models, at_once, 8))
    found = [{name: asyncio.run(throughput(url, *load)) for name, load in loads.items()} for _ in range(rounds)]
    choose = statistics.median if names else max
    told: dict[str, Any] = {name: round(choose([r[name] for r in found]), 1) for name in loads}
    if names:
        for one, other in (
            ("16 at once, 8 prefixes", "16 at once, one prefix"),
            ("16 at once, 8 prefixes", "one after another"),
        ):
            told[f"{one} / {other}"] = round(statistics.median(r[one] / r[other] for r in found), 2)
    return told


def switching(server: Server, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds to the first token with a prefix that is on the disk alone, and with one that is on the device."""
    client = httpx.Client(base_url=server.url, timeout=60)

    def once(name: str) -> float:
        began = time.perf_counter()
        client.post(
            "completions", json={"model": name, "prompt": "Hello there", "max_tokens": 1, "temperature": 0}
        ).raise_for_status()
        return 1000 * (time.perf_counter() - began)

    once("")
    cold, warm = zip(*((once(name), once(name)) for name in names), strict=True)
    return {
        "from disk, ms": round(statistics.median(cold), 1),
        "on the device, ms": round(statistics.median(warm), 1),
        "added, ms": round(statistics.median(c - w for c, w in zip(cold, warm, strict=True)), 1),
    }


async def interrupting(url: str, shorts: int = 12) -> dict[str, Any]:
    """Tokens that a running answer gets while a short request waits for its first, beside a long prompt that is read."""
    made, told = 0, list[tuple[int, float]]()
    limits = httpx.Limits(max_connections=8)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def stream(prompt: str, count: int) -> AsyncGenerator[dict[str, Any]]:
            body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "completions", json=body | {"logprobs": 0}) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        yield json.loads(line[6:])["choices"][0]

        async def running() -> None:
            nonlocal made
            async for choice in stream("A long story about the sea.", 600):
                made += len((choice["logprobs"] or {}).get("tokens", ()))

        async def long_prompts() -> None:
            while True:
                async for _ in stream(f"{made} lamps from order 5512 flicker. " * 120, 1):
                    pass

        tasks = [asyncio.create_task(running())]
        while made < 10:
            await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(long_prompts()))
        await asyncio.sleep(0.5)
        for i in range(shorts):
            before, began = made, time.perf_counter()
            async with contextlib.aclosing(stream(f"Hi {i}", 1)) as answer:
                await anext(answer)
                told.append((made - before, time.perf_counter() - began))
            await asyncio.sleep(0.3)
        assert not tasks[0].done(), "the running answer ended before the short requests did"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    steps, seconds = zip(*told, strict=True)
    return {
        "steps until its first token": sorted(steps),
        "ms until its first token": round(1000 * statistics.median(seconds)),
    }


def beside_llama(folder: Path, model: str, precision: str) -> dict[str, Any]:
    """The plain load here, then on llama.cpp's server with the same weights in float32 and as they were quantized."""
    from engines import unquantized
    from llamacpp import llama_server

    from foreword.models import packaged_files

    [quantized] = packaged_files(model)
    store = folder / "plain" / "store"
    store.mkdir(parents=True)
    told = dict[str, Any]()
    with serving(store, model, "--precision", precision) as server:
        told[f"foreword, {precision}"] = speeds(server.url, [])
    print(told, file=sys.stderr, flush=True)
    full = unquantized(quantized, folder / "f32.gguf")
    for name, file in (("llama.cpp, F32", full), ("llama.cpp, Q4_1", quantized)):
        with llama_server(file, folder, os.cpu_count() or 1, n_ctx=16 * 512, n_parallel=16, warmup=True) as server:
            told[name] = speeds(f"{server.address}/v1", [])
        print(name, told[name], file=sys.stderr, flush=True)
    for found in told.values():
        found["foreword / this, 16 at once"] = round(
            told[f"foreword, {precision}"]["16 at once, no prefix"] / found["16 at once, no prefix"], 2
        )
    return told


def many(folder: Path, model: str, contents: bytes, count: int) -> dict[str, Any]:
    """Start-up with `count` prefixes and with none, and memory once each has been used."""
    options = ("--prefix-memory", 20_000_000, "--precision", "float32")
    empty = folder / "empty" / "store"
    empty.mkdir(parents=True)
    with serving(empty, model, *options) as server:
        alone = server.seconds
    store = folder / "many" / "store"
    store.mkdir(parents=True)
    for i in range(count):  # each another content: its last number is its own
        (store / f"p{i:04d}.safetensors").write_bytes(contents[:-4] + torch.tensor([i / 1e4]).numpy().tobytes())
    with serving(store, model, *options) as server:
        started, before = server.seconds, server.resident()
        found = len(httpx.get(f"{server.url}/models", timeout=60).json()["data"]) - 1
        most, told = 0.0, []
        for i in range(count):
            body = {"model": f"p{i:04d}", "prompt": "Hi", "max_tokens": 1, "temperature": 0}
            told.append(httpx.post(f"{server.url}/completions", json=body, timeout=60).status_code)
            if i % 50 == 49:
                most = max(most, server.metric('foreword_prefix_bytes{place="device"}'))
        return {
            "prefixes": found,
            "answered": told.count(200),
            "start-up, s": round(started, 2),
            "without prefixes, s": round(alone, 2),
            "added, s": round(started - alone, 2),
            "budget for prefixes, MB": 20,
            "prefixes on the device at most, MB": round(most / 1e6, 1),
            "memory before and after, MB": [round(before), round(server.resident())],
        }


# -------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("soak", "bars", "llama"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--model", default="smollm2")
        sub.add_argument("--seconds", type=float, default=600)
        sub.add_argument("--clients", type=int, default=CLIENTS)
        sub.add_argument("--precision", default="float32")
        sub.add_argument("--many", type=int, default=1000)
        sub.add_argument("--rounds", type=int, default=3)
        sub.add_argument("--out", type=Path)
    plain = verbs.add_parser("speed")
    plain.add_argument("url")
    plain.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/load.py", *sys.argv[1:]]),
        "versions": {name: _version(name) for name in ("foreword", "torch", "transformers", "xllamacpp")}
        | {"cores": os.cpu_count()},
    }
    if arguments.verb == "speed":
        result |= speeds(arguments.url, [])
    elif arguments.verb == "llama":
        with tempfile.TemporaryDirectory() as folder:
            result |= beside_llama(Path(folder), arguments.model, arguments.precision)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result |= measure(arguments, Path(folder))
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", "utf-8")
    if result.get("wrong answers") or result.get("lost"):
        sys.exit(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    store = folder / "first" / "store"
    store.mkdir(parents=True)
    base = foreword.load_base(arguments.model, precision="float32")
    prefixes = make_prefixes(base.model, base.tokenizer, store)
    contents = [(store / f"p{i}.safetensors").read_bytes() for i in range(len(prefixes))]
    names = [f"p{i}" for i in range(len(prefixes))]
    if arguments.verb == "soak":
        print("asking each request alone", file=sys.stderr)
        cases = right_answers(base, prefixes)
        del base
        with serving(store, arguments.model, "--precision", "float32") as server:
            return asyncio.run(soak(server, cases, contents, arguments.seconds, arguments.clients))
    del base
    with serving(store, arguments.model, "--precision", arguments.precision) as server:
        found = {
            "switching": switching(server, names),
            "tokens per second": speeds(server.url, names, arguments.rounds),
            "short requests beside a running answer and long prompts": asyncio.run(interrupting(server.url)),
        }
    return found | {"many": many(folder, arguments.model, contents[0], arguments.many)}


if __name__ == "__main__":
    main()
