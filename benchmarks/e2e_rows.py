"""Turn the E2E NLG files (`slots||reference` lines) into rows: python benchmarks/e2e_rows.py FOLDER OUT [--train 500].

Writes OUT/train.jsonl with `--train` pairs drawn with a fixed seed (0: all of them, 42,061), OUT/valid.jsonl with all
validation pairs, and OUT/test.jsonl with every distinct test input and all of its references.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path


def read(path: Path) -> dict[str, list[str]]:
    """Each distinct input with its references."""
    inputs: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        prompt, _, reference = line.partition("||")
        inputs.setdefault(prompt.strip(), []).append(reference.strip())
    return inputs


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds src1_train.txt, src1_valid.txt and src1_test.txt")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=500, help="training rows (default 500; 0: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        pairs = [(prompt, ref) for prompt, refs in read(options.folder / f"src1_{part}.txt").items() for ref in refs]
        if part == "train":
            pairs = random.Random(options.seed).sample(pairs, options.train or len(pairs))
        write(options.out / f"{part}.jsonl", [{"prompt": prompt, "completion": ref} for prompt, ref in pairs])
    test = read(options.folder / "src1_test.txt")
    rows = [{"prompt": prompt, "completion": refs[0], "references": refs} for prompt, refs in test.items()]
    write(options.out / "test.jsonl", rows)


if __name__ == "__main__":
    main()
