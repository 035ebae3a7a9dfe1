"""Prefix against linear probe and full fine-tuning with an encoder: python benchmarks/encoder.py ROWS [--model minilm] [--seeds 1].

ROWS holds train.jsonl, valid.jsonl and test.jsonl, as `label_rows.py --head` writes them. Each method is tuned alike: one run for each of
four learning rates, which fall linearly to zero, and the one with the highest accuracy on the validation rows after the last step is
measured on test, once for each seed. All train with dropout. Prints one JSON line a try to stderr, and the table.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from foreword import PrefixConfig, TrainConfig, evaluate, load_base, train
from foreword.classification import decode, labels
from foreword.data import HeadRow, schedule
from foreword.heads import head_names
from foreword.models import Base
from foreword.tasks import TASKS, read

TASK, BATCH = TASKS["classification"], 16
Data = dict[str, list[HeadRow]]


def examples(base: Base, rows: list[HeadRow]) -> list[Any]:
    return TASK.encode(rows, base.tokenizer, TASK.about(base.model, base.tokenizer), 512)[0]


@torch.no_grad()
def accuracy_of(base: Base, rows: list[HeadRow]) -> float:
    """Accuracy of a model without a prefix."""
    made, right, about = examples(base, rows), 0, TASK.about(base.model, base.tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(made[i].input_ids))
    for first in range(0, len(rows), 64):
        chosen = order[first : first + 64]
        found = decode(base.model, [made[i] for i in chosen], [rows[i] for i in chosen], about)
        right += sum(label == rows[i].answer for label, i in zip(found, chosen, strict=True))
    return 100 * right / len(rows)


def tuned(base: Base, data: Data, rate: float, seed: int, steps: int) -> Base:
    """Train what requires a gradient with AdamW and a linear schedule."""
    rows = examples(base, data["train"])
    trained = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    epochs = range(1 + steps * BATCH // len(rows))
    batches = [b for epoch in epochs for b in schedule([len(e.input_ids) for e in rows], BATCH, seed, epoch)]
    torch.manual_seed(seed)
    base.model.train()
    for step, batch in enumerate(batches[:steps]):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (TASK.loss(base.model, [[rows[i] for i in batch]]).sum() / len(batch)).backward()
        optimizer.step()
    base.model.eval()
    return base


def load(options: Any, data: Data, seed: int) -> Base:
    return load_base(options.model, task="classification", labels=labels(data["train"]), seed=seed, precision="float32")


Result = tuple[Callable[[str], float], int]  # accuracy on a part of the data, and how many parameters were trained


def fine_tuning(options: Any, data: Data, rate: float, seed: int) -> Result:
    base = load(options, data, seed)
    base.model.requires_grad_(True)
    tuned(base, data, rate, seed, options.steps)
    return lambda part: accuracy_of(base, data[part]), base.model.num_parameters()


def linear_probe(options: Any, data: Data, rate: float, seed: int) -> Result:
    base = load(options, data, seed)
    for name in head_names(base.model):
        base.model.get_parameter(name).requires_grad_(True)
    trained = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
    tuned(base, data, rate, seed, options.steps)
    return lambda part: accuracy_of(base, data[part]), trained


def sentence_probe(options: Any, data: Data, rate: float, seed: int) -> Result:
    """Logistic regression on the mean of the last hidden states, which is what MiniLM was trained to give sentences."""
    base = load(options, data, seed)

    @torch.no_grad()
    def embedded(part: str) -> torch.Tensor:
        made = []
        for example in examples(base, data[part]):
            ids = torch.tensor([example.input_ids], device=base.model.device)
            made.append(base.model.base_model(ids).last_hidden_state[0].mean(0))
        return torch.stack(made).double()  # in which a line search does not overflow

    def numbers(part: str) -> torch.Tensor:
        known = labels(data["train"])
        return torch.tensor([known.index(str(row.answer)) for row in data[part]], device=base.model.device)

    texts, right = embedded("train"), numbers("train")
    center, spread = texts.mean(0), texts.std(0)
    probe = torch.nn.Linear(texts.shape[1], 2, device=texts.device, dtype=texts.dtype)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = cross_entropy(probe((texts - center) / spread), right) + rate * probe.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)

    def accuracy(part: str) -> float:
        said = probe((embedded(part) - center) / spread).argmax(-1)
        return 100 * float((said == numbers(part)).float().mean())

    return accuracy, sum(parameter.numel() for parameter in probe.parameters())


def prefix(options: Any, data: Data, rate: float, seed: int) -> Result:
    base = load(options, data, seed)
    config = TrainConfig(
        task="classification",
        steps=options.prefix_steps,
        batch_size=options.prefix_batch,
        learning_rate=rate,
        held_out_fraction=0.0,  # what the last steps come to is kept
        seed=seed,
    )
    shape = PrefixConfig(num_virtual_tokens=options.virtual_tokens)
    made = train(base.model, base.tokenizer, data["train"], shape, config)

    def accuracy(part: str) -> float:
        return evaluate(base.model, base.tokenizer, data[part], made).metrics["prefix"]["accuracy"]

    return accuracy, made.num_parameters


METHODS = {
    "linear probe": (linear_probe, [3e-3, 1e-2, 3e-2, 1e-1]),  # of the model's own head
    "linear probe of the mean": (sentence_probe, [1e-2, 1e-1, 1.0, 10.0]),  # the rate is its weight decay
    "full fine-tuning": (fine_tuning, [2e-5, 5e-5, 1e-4, 2e-4]),
    "prefix": (prefix, [1e-2, 2e-2, 3e-2, 6e-2]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=1300, help="of 16 rows, for probe and fine-tuning")
    parser.add_argument("--prefix-steps", type=int, default=2600)
    parser.add_argument("--prefix-batch", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=64)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = {part: read(TASK, str(options.rows / f"{part}.jsonl"))[0] for part in ("train", "valid", "test")}
    table = []
    for name in options.methods:
        method, rates = METHODS[name]
        tries = []
        for rate in rates:
            began = time.perf_counter()
            accuracy, parameters = method(options, data, rate, 0)
            told = {"method": name, "rate": rate, "valid": round(accuracy("valid"), 2)}
            tries.append((told["valid"], rate, accuracy, parameters))
            seconds = round(time.perf_counter() - began)
            print(json.dumps(told | {"seconds": seconds}), file=sys.stderr, flush=True)
        valid, rate, accuracy, parameters = max(tries, key=lambda entry: entry[0])
        tests = []
        for seed in range(options.seeds):
            tests.append((method(options, data, rate, seed)[0] if seed else accuracy)("test"))
            print(
                json.dumps({"method": name, "rate": rate, "seed": seed, "test": tests[-1]}), file=sys.stderr, flush=True
            )
        shown = " ".join(f"{test:.1f}" for test in tests)
        table.append(f"| {name} | {parameters:,} | {rate} | {valid:.1f} | {shown} |")
    print("| method | trained parameters | learning rate | validation | test |\n|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
