"""How best to prompt a model with demonstrations: python benchmarks/few_shot.py FOLDER [--model smollm2] [--seeds 3].

FOLDER holds train.jsonl and test.jsonl (see e2e_rows.py). Three ways to put the same three rows before a question:
`chats` one finished chat after the other, as `foreword evaluate` does; `turns` earlier turns of one chat; `lines` plain
text without the chat template, the answer cut at the end of its line. Prints one JSON line for each way and draw.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from foreword import load_base, text_prefix
from foreword.completion import answer, measure
from foreword.data import Row, encode, read_rows
from foreword.initialization import demonstrate


def chats(base: Any, shown: Sequence[Row], rows: Sequence[Row]) -> tuple[list[Row], Any, str | None]:
    template = base.tokenizer.chat_template
    examples, _ = encode(shown, base.tokenizer, template, 4096)
    return list(rows), text_prefix(base.model, demonstrate(examples, len(shown))), template


def turns(base: Any, shown: Sequence[Row], rows: Sequence[Row]) -> tuple[list[Row], Any, str | None]:
    earlier = [m for r in shown for m in (*r.messages, {"role": "assistant", "content": r.completion or ""})]
    asked = [Row((*earlier, *row.messages), row.completion, row.source, row.references) for row in rows]
    return asked, None, base.tokenizer.chat_template


def lines(base: Any, shown: Sequence[Row], rows: Sequence[Row]) -> tuple[list[Row], Any, str | None]:
    earlier = "".join(f"{row.prompt}\n{row.completion}\n\n" for row in shown)
    asked = [
        Row(({"role": "user", "content": f"{earlier}{row.prompt}\n"},), row.completion, row.source, row.references)
        for row in rows
    ]
    return asked, None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=630)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    base = load_base(options.model)
    train, _ = read_rows(options.folder / "train.jsonl")
    test = read_rows(options.folder / "test.jsonl")[0][: options.rows]
    for seed in range(options.seeds):
        shown = random.Random(seed).sample(train, options.shots)
        for way in (chats, turns, lines):
            began = time.perf_counter()
            asked, prefix, template = way(base, shown, test)
            texts = answer(
                base.model,
                base.tokenizer,
                asked,
                [prefix] * len(asked),
                templates=[template] * len(asked),
                batch_size=options.batch_size,
                max_new_tokens=120,
            )
            if way is lines:
                texts = [text.split("\n")[0] for text in texts]
            seconds = round(time.perf_counter() - began, 1)
            print(
                json.dumps({"way": way.__name__, "seed": seed, "seconds": seconds} | measure(texts, test)), flush=True
            )


if __name__ == "__main__":
    main()
