"""Turn SST-2 or RTE into rows: python benchmarks/label_rows.py {sst2,rte} FOLDER OUT [--head].

SST-2: FOLDER holds sentences_{train,dev,test}.tsv, lines of `label<TAB>text`. RTE: train.tsv and dev.tsv of GLUE, whose test
labels are not public: the dev rows are the test here, and a tenth of the training rows, drawn with a fixed seed, validates.
The rows are prompts with the label's word as completion, for language models, whose accuracy is the exact match; with --head
they are texts and labels, for models with a head.
"""

import argparse
import json
import random
from pathlib import Path

Row = dict[str, str]  # text, perhaps text_pair, and label
WORDS = {
    "sst2": {"0": "negative", "1": "positive"},
    "rte": {"entailment": "yes", "not_entailment": "no"},
}
PROMPTS = {
    "sst2": "Is this review positive or negative?\n{text}",
    "rte": "{text}\nDoes it follow that: {text_pair}\nyes or no?",
}


def lines(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text("utf-8").splitlines()]


def sst2(folder: Path) -> dict[str, list[Row]]:
    names = {"train": "train", "valid": "dev", "test": "test"}
    return {
        part: [{"text": text, "label": label} for label, text in lines(folder / f"sentences_{name}.tsv")]
        for part, name in names.items()
    }


def rte(folder: Path) -> dict[str, list[Row]]:
    train, dev = (
        [{"text": text, "text_pair": pair, "label": label} for _, text, pair, label in lines(folder / name)[1:]]
        for name in ("train.tsv", "dev.tsv")
    )
    rows = random.Random(0).sample(train, len(train))
    aside = len(rows) // 10
    return {"train": rows[aside:], "valid": rows[:aside], "test": dev}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(WORDS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", action="store_true", help="texts and labels, for models with a head")
    options = parser.parse_args()
    words, prompt = WORDS[options.task], PROMPTS[options.task]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (sst2 if options.task == "sst2" else rte)(options.folder).items():
        told = [row | {"label": words[row["label"]]} for row in rows]
        if not options.head:
            told = [{"prompt": prompt.format(**row), "completion": row["label"]} for row in told]
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told), "utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
