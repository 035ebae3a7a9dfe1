"""Sequence classification: one label for a text, or for two."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORED, Example, HeadRow, encode_each, row_fields, row_text
from .encoding import encode_text, label_number, row_label, run_head
from .errors import DataError
from .scores import label_figures

__all__ = ["decode", "encode", "labels", "loss", "measure", "row"]


def row(raw: Any, source: str, answers: bool) -> HeadRow:
    """Check a row `{"text", "label"}`, with or without `text_pair`."""
    if isinstance(raw, HeadRow):
        return raw
    prefix, _ = row_fields(raw, source)
    names = ["text"] if raw.get("text_pair") is None else ["text", "text_pair"]
    inputs = {name: row_text(raw, name, source) for name in names}
    label = None if raw.get("label") is None else row_label(raw["label"], source)
    if answers and label is None:
        raise DataError(f'{source}: no "label"; the row has {", ".join(map(str, raw))}.')
    return HeadRow(inputs, label, source, prefix=prefix)


def labels(rows: Sequence[HeadRow]) -> list[str]:
    """All labels of the rows, sorted."""
    return sorted({row.answer for row in rows})


def encode(
    rows: Sequence[HeadRow],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    max_length: int,
    skip_bad: bool = False,
) -> tuple[list[Example], list[str]]:
    """Rows as token ids, each with the number of its label among `about["labels"]`."""

    def one(row: HeadRow) -> Example:
        text = encode_text(tokenizer, row.inputs["text"], row.inputs.get("text_pair"))
        number = IGNORED if row.answer is None else label_number(row.answer, about["labels"], row.source)
        return Example(text.input_ids, 0, row.source, (number,), text.token_types)

    return encode_each(rows, one, max_length, skip_bad)


def loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The summed cross-entropy of the rows' labels, in nats."""
    output, _ = run_head(model, examples)
    right = torch.tensor([example.labels or () for example in examples], device=output.logits.device)
    return cross_entropy(output.logits.float(), right.squeeze(-1), reduction="sum")


def decode(
    model: PreTrainedModel, examples: Sequence[Example], rows: Sequence[HeadRow], about: dict[str, Any]
) -> list[str]:
    """The likeliest label of each row."""
    output, _ = run_head(model, examples)
    return [about["labels"][number] for number in output.logits.argmax(-1).tolist()]


def measure(answers: Sequence[str], rows: Sequence[HeadRow]) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy and macro F1 in percent; precision, recall and F1 of each label, and the confusion matrix."""
    return label_figures(answers, [row.answer for row in rows])
