"""Figures for labels, entities and extracted answers, as plain functions, and the picture of a confusion matrix."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Entity", "confusion", "draw_confusion", "entities", "entity_f1", "label_figures", "squad_figures"]


class Entity(NamedTuple):
    """A run of tokens of one kind: from token `first` to token `last`."""

    kind: str
    first: int
    last: int


def confusion(found: Sequence[str], right: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """The labels that occur, sorted, and how often each right label (row) was answered with each label (column).

    Example:
        >>> confusion(["a", "b", "a"], ["a", "b", "b"])
        (['a', 'b'], [[1, 0], [1, 1]])
    """
    pairs = Counter(zip(right, found, strict=True))
    labels = sorted({*right, *found})
    return labels, [[pairs[row, column] for column in labels] for row in labels]


def label_figures(found: Sequence[str], right: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy and macro F1 in percent, and precision, recall and F1 of each label.

    Macro F1 is the mean over the labels that are right or were answered somewhere; what would divide by zero counts 0.
    """
    labels, counts = confusion(found, right)
    per_label = {}
    for i, label in enumerate(labels):
        hits, answered, real = counts[i][i], sum(row[i] for row in counts), sum(counts[i])
        per_label[label] = {
            "precision": _percent(hits, answered),
            "recall": _percent(hits, real),
            "f1": _percent(2 * hits, answered + real),
            "rows": real,
        }
    accuracy = _percent(sum(counts[i][i] for i in range(len(labels))), len(found))
    macro = round(sum(figures["f1"] for figures in per_label.values()) / len(labels), 2)
    return {"accuracy": accuracy, "f1": macro}, {"labels": per_label, "confusion": {"labels": labels, "counts": counts}}


def entities(labels: Sequence[str]) -> set[Entity]:
    """The entities that labels of the kind `O`, `B-PER`, `I-PER` mark.

    An `I-` that continues nothing of its kind begins an entity, as in the scorer of CoNLL 2003.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [Entity(kind='LOC', first=3, last=3), Entity(kind='LOC', first=4, last=4), Entity(kind='PER', first=0, last=1)]
    """
    found: list[Entity] = []
    before = "O"
    for i, label in enumerate(labels):
        place, _, kind = label.partition("-")
        if place == "I" and before != "O" and before.partition("-")[2] == kind:
            found[-1] = found[-1]._replace(last=i)
        elif place != "O":
            found.append(Entity(kind, i, i))
        before = label
    return set(found)


def entity_f1(found: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    """F1 in percent over the entities of all rows: an entity counts if its kind, first and last token are right."""
    hits = answered = real = 0
    for own, true in zip(map(entities, found), map(entities, right), strict=True):
        hits, answered, real = hits + len(own & true), answered + len(own), real + len(true)
    return _percent(2 * hits, answered + real)


def squad_figures(found: Sequence[str], right: Sequence[Iterable[str]]) -> dict[str, float]:
    """Exact match and token F1 in percent as SQuAD defines them: articles, punctuation and case do not count, and each
    answer is compared with the right one it is closest to.

    Example:
        >>> squad_figures(["The Eiffel Tower!"], [["eiffel tower", "tower"]])
        {'exact_match': 100.0, 'f1': 100.0}
    """
    exact = f1 = 0.0
    for text, rights in zip(found, right, strict=True):
        words = _words(text)
        exact += max(words == _words(true) for true in rights)
        f1 += max(_overlap(words, _words(true)) for true in rights)
    return {"exact_match": _percent(exact, len(found)), "f1": _percent(f1, len(found))}


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    return 2 * (Counter(found) & Counter(right)).total() / (len(found) + len(right))


def _percent(part: float | int, whole: float | int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def draw_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: str | Path) -> None:
    """Draw how often each right label was answered with each label, shaded by the share of the right label's rows."""
    from matplotlib.figure import Figure

    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = 2.4 + 0.55 * len(labels)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot(xlabel="answered", ylabel="right")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=45, ha="right")
    axes.set_yticks(places, labels)
    if len(labels) <= 25:
        for row in places:
            for column in places:
                ink = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, str(counts[row][column]), ha="center", va="center", color=ink, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)
