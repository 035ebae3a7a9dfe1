"""Turn the XML files of WebNLG 2017 into rows: python benchmarks/webnlg_rows.py FOLDER OUT.

FOLDER holds train/, dev/ and test/ of the challenge. Writes OUT/train.jsonl and OUT/valid.jsonl with one row for each
text, and OUT/test.jsonl with one row for each set of triples, its texts as references, and `group`: `seen` where its
category occurs in the training files, else `unseen`. Triples are written as Li & Liang 2021 do: ` | subject : property : object`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


class Entry(NamedTuple):
    category: str
    prompt: str
    texts: list[str]


def read(*files: Path) -> Iterator[Entry]:
    for file in sorted(files):
        for entry in ElementTree.parse(file).iter("entry"):
            triples = [triple.text or "" for triple in entry.iterfind("modifiedtripleset/mtriple")]
            prompt = "".join(" | " + " : ".join(part.strip() for part in t.split(" | ")) for t in triples).strip()
            texts = [text.strip() for lex in entry.iterfind("lex") if (text := lex.text or "").strip()]
            yield Entry(entry.attrib["category"], prompt, texts)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seen = set()
    for part, name in (("train", "train"), ("dev", "valid")):
        entries = list(read(*(options.folder / part).rglob("*.xml")))
        seen |= {entry.category for entry in entries}
        rows: list[dict[str, object]] = [
            {"prompt": entry.prompt, "completion": text} for entry in entries for text in entry.texts
        ]
        write(options.out / f"{name}.jsonl", rows)
    rows = [
        {
            "prompt": entry.prompt,
            "completion": entry.texts[0],
            "references": entry.texts,
            "group": "seen" if entry.category in seen else "unseen",
        }
        for entry in read(options.folder / "test" / "testdata_with_lex.xml")
    ]
    write(options.out / "test.jsonl", rows)


if __name__ == "__main__":
    main()
