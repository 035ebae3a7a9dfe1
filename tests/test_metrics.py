"""Figures of generated texts against numbers worked out by hand, and against the official scorer's on its own data."""

import os
from math import exp, log, log2
from pathlib import Path

import pytest

from foreword.errors import ConfigError
from foreword.metrics import nist, text_figures

SCORED = os.environ.get("FOREWORD_E2E_SCORED")  # a folder with outputs.txt, and references.txt in blocks


def test_nist_by_hand():
    references = [["the cat sat .", "a cat sat down ."], ["the dog ran ."]]
    # Words of all references: 13 in all; the 2, cat 2, sat 2, . 3, a 1, down 1, dog 1, ran 1.
    one = log2(13 / 2) + log2(13 / 2) + log2(13 / 2) + log2(13 / 3)  # the cat sat .
    two = log2(2 / 1) + log2(2 / 2) + log2(2 / 1)  # the cat, cat sat, sat .
    three = log2(1 / 1) + log2(2 / 1)  # the cat sat; cat sat .
    found = nist(["The cat sat.", "a cow"], references)
    # The second answer has one right word, a, only in another row's reference: nothing is gained.
    short = exp(log(0.5) / log(1.5) ** 2 * log(6 / 8.5) ** 2)
    assert found == pytest.approx(short * (one / 6 + two / 4 + three / 2 + log2(1) / 1), abs=1e-9)


def test_nist_clips_repeated_words_and_knows_no_longer_than_the_reference():
    assert nist(["go go go go"], [["go on there now"]]) == pytest.approx(log2(4) / 4)
    assert nist([""], [["a"]]) == 0.0


def test_all_references_count_and_case_does_not():
    figures = text_figures(
        ["bleu", "exact_match", "rouge_1", "rouge_2", "rouge_l"],
        ["The cat  sat on the mat", "a dog"],
        [["No.", "the cat sat on the mat"], ["a dog"]],
    )
    assert figures == {"bleu": 100.0, "exact_match": 50.0, "rouge_1": 100.0, "rouge_2": 100.0, "rouge_l": 100.0}
    figures = text_figures(["rouge_1", "rouge_2", "rouge_l"], ["a b c d"], [["d a b"]])
    assert figures == {"rouge_1": 85.71, "rouge_2": 40.0, "rouge_l": 57.14}  # of 4 and 3: 3 words, 1 pair, 2 in order


def test_what_cannot_be_measured_is_told(monkeypatch):
    with pytest.raises(ConfigError, match="No such metric: blue. Known: exact_match, bleu, nist"):
        text_figures(["blue"], ["a"], [["a"]])
    with pytest.raises(ConfigError, match="1 answers for 2 rows"):
        text_figures(["bleu"], ["a"], [["a"], ["b"]])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="meteor, cider cannot be measured here: there is no `java`"):
        text_figures(["bleu", "meteor", "cider"], ["a"], [["a"]])


if SCORED:
    FOLDER = Path(SCORED)

    def scored() -> tuple[list[str], list[list[str]]]:
        blocks = (FOLDER / "references.txt").read_text("utf-8").strip("\n").split("\n\n")
        return (FOLDER / "outputs.txt").read_text("utf-8").splitlines(), [block.splitlines() for block in blocks]

    def test_figures_are_those_of_the_official_scorer():
        assert text_figures(["bleu", "nist"], *scored()) == {"bleu": 66.36, "nist": 8.6435}

    @pytest.mark.filterwarnings("ignore")  # it leaves pipes to Java open
    def test_figures_are_those_of_pycocoevalcap():
        pytest.importorskip("pycocoevalcap")
        figures = text_figures(["meteor", "coco_rouge_l", "cider"], *scored())
        assert figures == {"meteor": 44.72, "coco_rouge_l": 68.27, "cider": 2.2075}
