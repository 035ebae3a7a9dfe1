"""Train and evaluate many settings: python benchmarks/sweep.py SETTINGS.jsonl --task e2e=FOLDER --workers 8 --seconds 500.

Each line of SETTINGS is one run: {"task": "e2e", "prefix": {...}, "train": {...}, "set": {"initialization._RIDGE": 1}},
fields of PrefixConfig and TrainConfig, and module constants to override. Prints one JSON line a run.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp


def work(queue, results, model_name: str, tasks: dict[str, str], stop: float) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    from foreword import PrefixConfig, TrainConfig, evaluate, train
    from foreword.models import load_base

    base = load_base(model_name)
    while time.time() < stop:
        setting = queue.get()
        if setting is None:
            break
        began = time.perf_counter()
        before = {}
        for name, value in setting.get("set", {}).items():
            module, _, attribute = name.rpartition(".")
            owner = importlib.import_module(f"foreword.{module}")
            before[name] = (owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, value)
        try:
            folder = Path(tasks[setting["task"]])
            prefix = train(
                base.model,
                base.tokenizer,
                folder / "train.jsonl",
                PrefixConfig(**setting.get("prefix", {})),
                TrainConfig(**setting.get("train", {})),
            )
            trained = time.perf_counter() - began
            compare = setting.get("compare", [])
            report = evaluate(
                base.model, base.tokenizer, folder / "test.jsonl", prefix, compare=compare, batch_size=630
            )
            training = prefix.metadata["training"]
            figures = {
                "held_out_loss": training["held_out_loss"] and round(training["held_out_loss"], 4),
                "best_step": training["best_step"],
                "train_s": round(trained, 1),
                "all_s": round(time.perf_counter() - began, 1),
            }
            results.put(setting | {"metrics": report.metrics} | figures)
        except (ValueError, RuntimeError) as error:
            results.put(setting | {"error": str(error)[:300]})
        for owner, attribute, value in before.values():
            setattr(owner, attribute, value)
    results.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", action="append", required=True, help="name=folder with train.jsonl and test.jsonl")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=500)
    options = parser.parse_args()
    mp.set_start_method("spawn")
    queue, results = mp.Queue(), mp.Queue()
    for line in options.settings.read_text("utf-8").splitlines():
        queue.put(json.loads(line))
    for _ in range(options.workers):
        queue.put(None)
    tasks = dict(entry.split("=", 1) for entry in options.task)
    arguments = (queue, results, options.model, tasks, time.time() + options.seconds)
    workers = [mp.Process(target=work, args=arguments, daemon=True) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        result = results.get()
        if result is None:
            running -= 1
        else:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
