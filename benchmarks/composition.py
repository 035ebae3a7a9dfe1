"""What composing prefixes does to what they know: python benchmarks/composition.py [--folder FOLDER] [--seeds 2].

Tasks: the prefixes of the demo's two tasks are trained (150 steps each, once; kept in FOLDER), and the rows of each
task answered with its own prefix, the other task's, both in both orders, their average, and none. Documents: two short
texts with facts, made into prefixes without training, composed, and asked about, against both texts in context.
`keys left in place` is what happens without moving keys, `sinks kept` with every attention sink kept. Prints tables.
"""

import argparse
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers

from foreword import Prefix, PrefixConfig, TrainConfig, attach, compose, load, load_base, save, text_prefix, train
from foreword.completion import answer, completion_loss, measure
from foreword.data import Row, collate, encode, read_rows
from foreword.prefix import SiteTensors

TURNS = (  # the chat format without the system message that the model's own template puts first
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METRIC = {"tickets": "exact_match", "products": "rouge_l"}
LIGHTHOUSE = [
    ("The lighthouse of Skarvey was built in 1871.", "In which year was the lighthouse of Skarvey built?", "1871"),
    ("Its keeper is called Maud Tolliver.", "What is the name of the keeper of the lighthouse?", "Maud Tolliver"),
    ("It is 43 metres high.", "How many metres high is the lighthouse?", "43"),
    ("Its walls are painted green.", "What colour are the walls of the lighthouse?", "green"),
    ("Its lamp came from Lisbon.", "From which city did the lamp of the lighthouse come?", "Lisbon"),
    ("In its cellar a goat named Pepper lives.", "What is the name of the goat?", "Pepper"),
    ("Visitors may climb it on Tuesdays.", "On which day may visitors climb the lighthouse?", "Tuesday"),
    ("A ticket costs 6 crowns.", "How many crowns does a ticket for the lighthouse cost?", "6"),
]
BAKERY = [
    ("The bakery Halloran stands in Elm Street.", "In which street does the bakery stand?", "Elm Street"),
    ("Its owner is called Ines Halloran.", "What is the first name of the owner of the bakery?", "Ines"),
    ("It opens at five in the morning.", "At what hour does the bakery open?", "five"),
    ("It is known for its plum bread.", "For which bread is the bakery known?", "plum bread"),
    ("Its oven burns birch wood.", "What kind of wood does the oven of the bakery burn?", "birch"),
    ("On Sundays it sells almond rolls.", "What does the bakery sell on Sundays?", "almond rolls"),
    ("The delivery van is yellow.", "What colour is the delivery van?", "yellow"),
    ("Nine people work there.", "How many people work in the bakery?", "nine"),
]


def unmoved(prefixes: Sequence[Prefix]) -> Prefix:
    """One behind the other without moving any key: their positions overlap."""
    entries = zip(*(prefix.tensors() for prefix in prefixes), strict=True)
    tensors = [SiteTensors(torch.cat([e.key for e in site]), torch.cat([e.value for e in site])) for site in entries]
    first = prefixes[0]
    offset = sum(prefix.position_offset for prefix in prefixes)
    return Prefix(first.sites, tensors, position_offset=offset, base=first.base, metadata=first.metadata)


def without_sink_mark(prefix: Prefix) -> Prefix:
    metadata = {key: value for key, value in prefix.metadata.items() if key not in ("training", "attention_sink")}
    return Prefix(
        prefix.sites, prefix.tensors(), position_offset=prefix.position_offset, base=prefix.base, metadata=metadata
    )


def shorter(prefix: Prefix, length: int) -> Prefix:
    """Its first tokens, so that it can be averaged with a shorter one."""
    tensors = [SiteTensors(entry.key[:length], entry.value[:length]) for entry in prefix.tensors()]
    return Prefix(prefix.sites, tensors, position_offset=length, base=prefix.base, metadata=prefix.metadata)


def trained(base: Any, task: str, seed: int, folder: Path) -> Prefix:
    path = folder / f"{task}-{seed}.safetensors"
    if not path.exists():
        config = TrainConfig(steps=150, held_out_fraction=0.05, seed=seed)
        with as_file(files("foreword") / "demo_data" / f"{task}.train.jsonl") as rows:
            save(train(base.model, base.tokenizer, rows, PrefixConfig(), config), path)
    return load(path)


def contestants(model: Any, own: Prefix, other: Prefix) -> dict[str, Prefix | None]:
    """What a row of a task is answered with."""
    length = min(own.num_virtual_tokens, other.num_virtual_tokens)
    return {
        "own prefix": own,
        "other prefix": other,
        "own, then other": compose(model, [own, other]),
        "other, then own": compose(model, [other, own]),
        "own, then other: sinks kept": compose(model, [own, without_sink_mark(other)]),
        "other, then own: sinks kept": compose(model, [other, without_sink_mark(own)]),
        "own, then other: keys left in place": unmoved([own, other]),
        "other, then own: keys left in place": unmoved([other, own]),
        "average": compose(model, [shorter(own, length), shorter(other, length)], "average"),
        "base": None,
    }


def tasks(base: Any, folder: Path, seeds: int) -> None:
    """Each task's metric with its own prefix and with compositions."""
    prefixes = {(task, seed): trained(base, task, seed, folder) for task in METRIC for seed in range(seeds)}
    rows: dict[str, list[Row]] = {}
    for task in METRIC:
        with as_file(files("foreword") / "demo_data" / f"{task}.heldout.jsonl") as file:
            rows[task] = read_rows(file)[0]
    figures: dict[str, list[str]] = {}

    def put(name: str, task: str, prefix: Prefix | None) -> None:
        texts = answer(base.model, base.tokenizer, rows[task], [prefix] * len(rows[task]), max_new_tokens=80)
        figures.setdefault(name, []).append(f"{measure(texts, rows[task])[METRIC[task]]:.1f}")

    for task, other in (("tickets", "products"), ("products", "tickets")):
        for seed in range(seeds):
            for name, prefix in contestants(base.model, prefixes[task, seed], prefixes[other, seed]).items():
                put(name, task, prefix)
        if seeds > 1:
            same = [prefixes[task, seed] for seed in range(seeds)]
            put("average over seeds of own", task, compose(base.model, same, "average"))
            put("own of all seeds, concatenated", task, compose(base.model, same))
    show([f"{task} {METRIC[task]}, seed {seed}" for task in METRIC for seed in range(seeds)], figures)


def documents(base: Any) -> None:
    """Loss on the answers, and how many answers hold the right words."""
    texts = [" ".join(fact for fact, _, _ in document) for document in (LIGHTHOUSE, BAKERY)]
    ids = [
        base.tokenizer(f"<|im_start|>system\n{text}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        for text in texts
    ]
    first, second = (text_prefix(base.model, own) for own in ids)
    asked = [
        [Row(({"role": "user", "content": f"{q} Answer in a few words."},), a, "question") for _, q, a in document]
        for document in (LIGHTHOUSE, BAKERY)
    ]
    named = contestants(base.model, first, second)
    named = {name.replace("own", "first").replace("other", "second"): prefix for name, prefix in named.items()}
    named["both texts in context, first text first"] = text_prefix(base.model, ids[0] + ids[1])
    named["both texts in context, second text first"] = text_prefix(base.model, ids[1] + ids[0])
    figures = {}
    for name, prefix in named.items():
        figures[name] = []
        for rows in asked:
            examples, _ = encode(rows, base.tokenizer, TURNS, 256)
            labels = sum(len(example.input_ids) - example.prompt_length for example in examples)
            with attach(base.model, [prefix]), torch.inference_mode():
                loss = float(completion_loss(base.model, collate([examples]))) / labels
            said = answer(
                base.model, base.tokenizer, rows, [prefix] * len(rows), templates=[TURNS] * len(rows), max_new_tokens=24
            )
            right = sum(row.answers[0].lower() in text.lower() for text, row in zip(said, rows, strict=True))
            figures[name] += [f"{loss:.2f}", f"{right}/{len(rows)}"]
    print(f"\nDocuments of {len(ids[0])} and {len(ids[1])} tokens\n")
    show(["about the first: loss", "right", "about the second: loss", "right"], figures)


def show(columns: Sequence[str], figures: dict[str, list[str]]) -> None:
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, cells in figures.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--folder", type=Path, default=Path("composition"))
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = time.perf_counter()
    options.folder.mkdir(exist_ok=True)
    base = load_base(options.model)
    documents(base)
    print()
    tasks(base, options.folder, options.seeds)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
