"""Prefix against linear probe and full fine-tuning on SST-2: python benchmarks/sst2.py FOLDER [--model minilm] [--seeds 1].

FOLDER holds sentences_{train,dev,test}.tsv, lines of `label<TAB>text`. Each method is tuned alike: one run for each of
four learning rates, in each run the step with the lowest loss on dev is kept, and the rate with the highest accuracy on
dev is measured on test, once for each seed. Prints one JSON line a run to stderr, and the table.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from foreword import PrefixConfig, TrainConfig, evaluate, load_base, train
from foreword.classification import decode
from foreword.data import HeadRow, schedule
from foreword.heads import head_names
from foreword.models import Base
from foreword.tasks import TASKS, read

LABELS = ["negative", "positive"]
TASK, BATCH = TASKS["classification"], 16
Data = dict[str, list[HeadRow]]


def read_part(folder: Path, part: str) -> list[HeadRow]:
    lines = (folder / f"sentences_{part}.tsv").read_text("utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    return read(TASK, [{"text": text, "label": LABELS[int(label)]} for label, text in pairs])[0]


def examples(base: Base, rows: list[HeadRow]) -> list[Any]:
    return TASK.encode(rows, base.tokenizer, {"labels": LABELS}, 512)[0]


@torch.no_grad()
def measured(base: Base, rows: list[HeadRow]) -> tuple[float, float]:
    """Loss and accuracy of a model without a prefix."""
    made, right, loss = examples(base, rows), 0, 0.0
    order = sorted(range(len(rows)), key=lambda i: len(made[i].input_ids))
    for first in range(0, len(rows), 64):
        chosen = order[first : first + 64]
        batch, asked = [made[i] for i in chosen], [rows[i] for i in chosen]
        found = decode(base.model, batch, asked, {"labels": LABELS})
        right += sum(label == row.answer for label, row in zip(found, asked, strict=True))
        loss += float(TASK.loss(base.model, batch))
    return loss / len(rows), 100 * right / len(rows)


def tuned(base: Base, data: Data, rate: float, seed: int, steps: int, dropout: bool) -> tuple[int, Base]:
    """Train what requires a gradient with AdamW and a linear schedule; keep the step with the lowest loss on dev."""
    rows = examples(base, data["train"])
    trained = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    epochs = range(1 + steps * BATCH // len(rows))
    batches = [b for epoch in epochs for b in schedule([len(e.input_ids) for e in rows], BATCH, seed, epoch)]
    best, kept = (float("inf"), 0), copy.deepcopy(base.model.state_dict())
    for step, batch in enumerate(batches[:steps], 1):
        optimizer.param_groups[0]["lr"] = rate * (1 - (step - 1) / steps)
        base.model.train(dropout)
        optimizer.zero_grad()
        (TASK.loss(base.model, [rows[i] for i in batch]) / len(batch)).backward()
        optimizer.step()
        base.model.eval()
        if step % 100 == 0 or step == steps:
            loss, _ = measured(base, data["dev"])
            if loss < best[0]:
                best, kept = (loss, step), copy.deepcopy(base.model.state_dict())
    base.model.load_state_dict(kept)
    return best[1], base


def load(name: str, seed: int, precision: Any) -> Base:
    return load_base(name, task="classification", labels=LABELS, seed=seed, precision=precision)


def fine_tuning(options: Any, data: Data, rate: float, seed: int) -> tuple[int, Callable[[str], float], int]:
    torch.manual_seed(seed)  # for dropout
    base = load(options.model, seed, "float32")
    base.model.requires_grad_(True)
    step, base = tuned(base, data, rate, seed, options.steps, dropout=True)
    return step, lambda part: measured(base, data[part])[1], base.model.num_parameters()


def linear_probe(options: Any, data: Data, rate: float, seed: int) -> tuple[int, Callable[[str], float], int]:
    base = load(options.model, seed, "float32")
    for name in head_names(base.model):
        base.model.get_parameter(name).requires_grad_(True)
    trained = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
    step, base = tuned(base, data, rate, seed, options.steps, dropout=False)
    return step, lambda part: measured(base, data[part])[1], trained


def prefix(options: Any, data: Data, rate: float, seed: int) -> tuple[int, Callable[[str], float], int]:
    base = load(options.model, seed, "auto")
    config = TrainConfig(
        task="classification",
        steps=options.prefix_steps,
        batch_size=options.prefix_batch,
        learning_rate=rate,
        evaluate_every=100,
        patience=100,
        seed=seed,
    )
    shape = PrefixConfig(num_virtual_tokens=options.virtual_tokens)
    made = train(base.model, base.tokenizer, data["train"], shape, config, held_out=data["dev"])

    def accuracy(part: str) -> float:
        return evaluate(base.model, base.tokenizer, data[part], made).metrics["prefix"]["accuracy"]

    return made.metadata["training"]["best_step"], accuracy, made.num_parameters


METHODS = {
    "linear probe": (linear_probe, [3e-3, 1e-2, 3e-2, 1e-1]),
    "full fine-tuning": (fine_tuning, [2e-5, 5e-5, 1e-4, 2e-4]),
    "prefix": (prefix, [3e-3, 1e-2, 3e-2, 6e-2]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=1300, help="of 16 rows, for probe and fine-tuning")
    parser.add_argument("--prefix-steps", type=int, default=1300)
    parser.add_argument("--prefix-batch", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=64)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = {part: read_part(options.folder, part) for part in ("train", "dev", "test")}
    table = []
    for name in options.methods:
        method, rates = METHODS[name]
        tries = []
        for rate in rates:
            began = time.perf_counter()
            step, accuracy, parameters = method(options, data, rate, 0)
            told = {"method": name, "rate": rate, "best_step": step, "dev": round(accuracy("dev"), 2)}
            tries.append((told["dev"], rate, accuracy, parameters))
            seconds = round(time.perf_counter() - began)
            print(json.dumps(told | {"seconds": seconds}), file=sys.stderr, flush=True)
        dev, rate, accuracy, parameters = max(tries, key=lambda entry: entry[0])
        tests = [accuracy("test")]
        tests += [method(options, data, rate, seed)[1]("test") for seed in range(1, options.seeds)]
        shown = " ".join(f"{test:.1f}" for test in tests)
        table.append(f"| {name} | {parameters:,} | {rate} | {dev:.1f} | {shown} |")
    print("| method | trained parameters | learning rate | dev | test |\n|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
