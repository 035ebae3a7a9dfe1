"""Turn SST-2 or RTE into rows that a language model completes: python benchmarks/label_rows.py {sst2,rte} FOLDER OUT.

SST-2: FOLDER holds sentences_{train,dev,test}.tsv, lines of `label<TAB>text`. RTE: train.tsv and dev.tsv of GLUE, whose test
labels are not public: the dev rows are the test here, and a tenth of the training rows, drawn with a fixed seed, validates.
Accuracy is the exact match of the label's word.
"""

import argparse
import json
import random
from pathlib import Path

WORDS = {"0": "negative", "1": "positive"}


def sst2(folder: Path) -> dict[str, list[dict[str, str]]]:
    parts = {}
    for part, name in (("train", "train"), ("dev", "valid"), ("test", "test")):
        lines = (folder / f"sentences_{part}.tsv").read_text("utf-8").splitlines()
        pairs = [line.split("\t") for line in lines]
        parts[name] = [
            {"prompt": f"Is this review positive or negative?\n{text}", "completion": WORDS[label]}
            for label, text in pairs
        ]
    return parts


def rte(folder: Path) -> dict[str, list[dict[str, str]]]:
    parts = {}
    for part in ("train", "dev"):
        lines = (folder / f"{part}.tsv").read_text("utf-8").splitlines()[1:]
        cells = [line.split("\t") for line in lines]
        parts[part] = [
            {
                "prompt": f"{premise}\nDoes it follow that: {hypothesis}\nyes or no?",
                "completion": "yes" if label == "entailment" else "no",
            }
            for _, premise, hypothesis, label in cells
        ]
    rows = random.Random(0).sample(parts["train"], len(parts["train"]))
    aside = len(rows) // 10
    return {"train": rows[aside:], "valid": rows[:aside], "test": parts["dev"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sst2", "rte"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (sst2 if options.task == "sst2" else rte)(options.folder).items():
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
