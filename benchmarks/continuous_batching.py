"""Transformers' continuous batching and ours on the same requests without prefixes, in one process, in turns.

    python benchmarks/continuous_batching.py --model smollm2 --rounds 2

Each answer is compared with what `generate` says to that request alone. Prints tokens a second and how many answers are equal,
and what happens when a prefix is attached to the model that Transformers' engine runs.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

import foreword
from foreword.batching import BatchingEngine
from foreword.engine import Event, Request, Sampling, Token


class Timed(NamedTuple):
    answers: list[list[int]]
    seconds: float


class Asked(NamedTuple):
    prompt: list[int]
    more: int  # tokens to be made, whatever they are


def loads(tokenizer: Any) -> dict[str, list[Asked]]:
    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    line = "Customer {i} writes: my lamp from order {n} flickers since Monday, what can I do about it? "
    even = [Asked(ids(line.format(i=i, n=5000 + i)), 64) for i in range(16)]
    mixed = [Asked(ids(line.format(i=i, n=5000 + i) * (1 + 5 * i % 16)), 16 + 6 * (7 * i % 16)) for i in range(16)]
    return {"16 alike (25 tokens, 64 more at most)": even, "16 mixed (25 to 400 tokens, 16 to 106 more at most)": mixed}


def alone(model: Any, asked: Sequence[Asked]) -> list[list[int]]:
    found = []
    for prompt, more in asked:
        ids = torch.tensor([prompt])
        settings = GenerationConfig(max_new_tokens=more, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found.append(out[0, len(prompt) :].tolist())
    return found


def by_transformers(model: Any, asked: Sequence[Asked]) -> Timed:
    """All at once. Its manager is made for the load, as `generate_batch` does; making it is not part of the time."""
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, use_async_batching=False)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=room, block=True, timeout=10
    ) as manager:
        began = time.perf_counter()
        names = [manager.add_request(list(one.prompt), max_new_tokens=one.more) for one in asked]
        while len(found) < len(asked):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                found[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("Transformers' engine has stopped")
        seconds = time.perf_counter() - began
    return Timed([found[name] for name in names], seconds)


def by_us(engine: BatchingEngine, asked: Sequence[Asked]) -> Timed:
    began, found, ended = time.perf_counter(), [list[int]() for _ in asked], threading.Semaphore(0)

    def listener(own: list[int]) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            own.append(event.id) if isinstance(event, Token) else ended.release()

        return emit

    for i, one in enumerate(asked):
        request = Request(str(i), tuple(one.prompt), None, Sampling(max_tokens=one.more, temperature=0.0))
        engine.submit(request, listener(found[i]))
    for _ in asked:
        ended.acquire()
    return Timed(found, time.perf_counter() - began)


def with_a_prefix(model: Any) -> str:
    """What Transformers' engine says to a model that has a prefix attached."""
    prefix = foreword.text_prefix(model, [1, 2, 3])
    with foreword.attach(model, prefix):
        try:
            by_transformers(model, [Asked([1, 2, 3], 2)])
        except Exception as error:  # noqa: BLE001  # whatever it says
            return f"{type(error).__name__}: {error}"
    return "it ran"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most")
    arguments = parser.parse_args()
    base = foreword.load_base(arguments.model, precision="float32")
    theirs, ours = copy.deepcopy(base.model), BatchingEngine(base.model)
    told: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/continuous_batching.py", *sys.argv[1:]]),
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "cores": os.cpu_count(),
        },
    }  # fmt: skip
    for name, load in loads(base.tokenizer).items():
        asked = [one._replace(more=min(one.more, arguments.tokens)) for one in load]
        right = alone(theirs, asked)
        made, seconds, equal = sum(one.more for one in asked), {"ours": [], "theirs": []}, {"ours": 0, "theirs": 0}
        by_us(ours, asked[:2])  # warm up
        by_transformers(theirs, asked[:2])
        for _ in range(arguments.rounds):
            for engine, timed in (("ours", by_us(ours, asked)), ("theirs", by_transformers(theirs, asked))):
                equal[engine] = sum(map(list.__eq__, timed.answers, right))
                seconds[engine].append(timed.seconds)
        told[name] = {
            engine: {"tokens/s": round(made / statistics.median(seconds[engine]), 1), "equal to alone": equal[engine]}
            for engine in seconds
        }
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        told[name]["ours / theirs"] = round(ratio, 2)
        print(name, told[name], file=sys.stderr, flush=True)
    ours.close()
    told["theirs, with a prefix attached"] = with_a_prefix(theirs)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
