"""Token classification: a label for each word, such as the name of a person or a part of speech."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORED, Example, HeadRow, encode_each, row_fields
from .encoding import encode_text, label_number, row_label, run_head
from .errors import DataError
from .scores import entity_f1, label_figures

__all__ = ["decode", "encode", "labels", "loss", "measure", "row"]


def row(raw: Any, source: str, answers: bool) -> HeadRow:
    """Check a row `{"tokens": [...], "labels": [...]}`."""
    if isinstance(raw, HeadRow):
        return raw
    prefix, _ = row_fields(raw, source)
    words, given = raw.get("tokens"), raw.get("labels")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f'{source}: "tokens" must be a list of words, got {_kind(words)}.')
    if given is None:
        if answers:
            raise DataError(f'{source}: no "labels"; the row has {", ".join(map(str, raw))}.')
        return HeadRow({"tokens": words}, None, source, prefix=prefix)
    if not isinstance(given, list) or len(given) != len(words):
        raise DataError(f'{source}: "labels" must be a list of {len(words)} labels, one a token, got {_kind(given)}.')
    return HeadRow({"tokens": words}, [row_label(label, source) for label in given], source, prefix=prefix)


def _kind(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else f"{type(value).__name__} {value!r}"


def labels(rows: Sequence[HeadRow]) -> list[str]:
    """All labels of the rows, sorted."""
    return sorted({label for row in rows for label in row.answer})


def encode(
    rows: Sequence[HeadRow],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    max_length: int,
    skip_bad: bool = False,
) -> tuple[list[Example], list[str]]:
    """Rows as token ids; the first token of each word carries the number of its label among `about["labels"]`.

    The words are joined with spaces, and a token belongs to the word that holds its last character.
    """

    def one(row: HeadRow) -> Example:
        words = row.inputs["tokens"]
        text = encode_text(tokenizer, " ".join(words))
        owners = list(
            chain.from_iterable([*[i] * len(word), None] for i, word in enumerate(words))
        )  # of each character
        first: dict[int, int] = {}
        for k, span in enumerate(text.spans):
            if span is not None and (owner := owners[span[1] - 1]) is not None:
                first.setdefault(owner, k)
        numbers = [IGNORED] * len(text.input_ids)
        for i, word in enumerate(words):
            if i not in first:
                raise DataError(
                    f"{row.source}: the tokenizer makes no token of its own of word {i + 1}, {word!r}. "
                    "Remove the word and its label."
                )
            answer = about["labels"][0] if row.answer is None else row.answer[i]  # any, only to mark the place
            numbers[first[i]] = label_number(answer, about["labels"], row.source)
        return Example(text.input_ids, 0, row.source, tuple(numbers), text.token_types)

    return encode_each(rows, one, max_length, skip_bad)


def loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The summed cross-entropy of the words' labels, in nats."""
    output, _ = run_head(model, examples)
    right = pad_sequence([torch.tensor(e.labels) for e in examples], batch_first=True, padding_value=IGNORED)
    logits = output.logits.float().flatten(0, 1)
    return cross_entropy(logits, right.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum")


def decode(
    model: PreTrainedModel, examples: Sequence[Example], rows: Sequence[HeadRow], about: dict[str, Any]
) -> list[list[str]]:
    """The likeliest label of each word of each row."""
    output, _ = run_head(model, examples)
    numbers = output.logits.argmax(-1).tolist()
    return [
        [about["labels"][n] for n, mark in zip(own, example.labels or (), strict=False) if mark != IGNORED]
        for own, example in zip(numbers, examples, strict=True)
    ]


def measure(answers: Sequence[list[str]], rows: Sequence[HeadRow]) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy over words and F1 in percent: of entities where the labels are `O`, `B-...` and `I-...`, else macro F1."""
    right = [row.answer for row in rows]
    figures, details = label_figures(list(chain.from_iterable(answers)), list(chain.from_iterable(right)))
    marks = {label.partition("-")[0] for label in details["labels"]}
    details["f1_of"] = "entities" if marks <= {"O", "B", "I"} and marks != {"O"} else "labels"
    if details["f1_of"] == "entities":
        figures["f1"] = entity_f1(answers, right)
    return figures, details
