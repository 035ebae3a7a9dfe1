"""Decoding speed with no prefix, one for all rows, and several in one batch: python -m benchmarks.decode [--static] [--out FILE].

In one process, round after round, each way of answering once, in another order each time; the time is that of all new
tokens, the prompt's included. Rows without a prefix are those of a model that has one attached and does not use it. A ratio is the
median, and the range of the middle half, of the rounds' ratios to one prefix.
On a GPU a Llama-shaped model of 1.24 billion random parameters in bfloat16, on a CPU `smollm2`.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreword import attach, load_base
from foreword.initialization import random_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="of a CPU")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--virtual-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", help="only these, for example: one prefix,8 prefixes")
    parser.add_argument("--static", action="store_true", help="a static cache, with compiled decoding on a GPU")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    if gpu:
        config = LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.device("cuda"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    else:
        model = load_base(options.model).model
    prefixes = [random_prefix(model, options.virtual_tokens, seed).to(model.device) for seed in range(options.prefixes)]
    each = options.rows // options.prefixes
    many = f"{options.prefixes} prefixes"
    ways: dict[str, Any] = {
        "none": [None] * options.rows,
        "one prefix": prefixes[0],
        many: [prefix for prefix in prefixes for _ in range(each)],
    }
    ways = {name: prefix for name, prefix in ways.items() if options.ways is None or name in options.ways.split(",")}
    ids = torch.randint(100, 250, (options.rows, options.prompt), device=model.device)
    cache = {"cache_implementation": "static"} if options.static else {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    draw = random.Random(0)
    # Attached once, and prefixes swapped: so that what was compiled is used again.
    with attach(model, prefixes[0]) as attachment:
        for number in range(options.rounds + 2):
            for name in draw.sample(list(ways), len(ways)):
                attachment.use(ways[name])
                before = torch.cuda.memory_allocated() if gpu else 0
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, min_new_tokens=options.new,
                    do_sample=False, pad_token_id=0, **cache,
                )  # fmt: skip
                if gpu:
                    torch.cuda.synchronize()
                took = time.perf_counter() - began
                print(f"round {number - 1}: {name} {took:.2f} s", file=sys.stderr, flush=True)
                if number > 1:
                    seconds[name].append(took)
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20 if gpu else 0.0
    report = []
    print("| prefixes | tokens/s | speed, one prefix = 1 | peak MiB beside what stood |\n|---|---|---|---|")
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds["one prefix"], own, strict=True)], n=4)
        tokens = options.rows * options.new / statistics.median(own)
        report.append({"way": name, "tokens_per_s": round(tokens, 1), "speed": [round(x, 3) for x in (middle, low, high)],
                       "peak_mib": round(peaks[name], 1)})  # fmt: skip
        print(f"| {name} | {tokens:.0f} | {middle:.3f} ({low:.3f}-{high:.3f}) | {peaks[name]:.0f} |", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(vars(options) | {"out": None, "ways": report}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
