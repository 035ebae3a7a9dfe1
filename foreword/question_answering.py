"""Extractive question answering: the stretch of a context that answers a question."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import input_device
from .data import IGNORED, Example, HeadRow, encode_each, row_fields, row_text
from .encoding import encode_text, run_head
from .errors import DataError
from .scores import squad_figures

__all__ = ["decode", "encode", "loss", "measure", "row"]


def row(raw: Any, source: str, answers: bool) -> HeadRow:
    """Check a row `{"question", "context", "answer"}`, with or without `answer_start`, in characters of the context."""
    if isinstance(raw, HeadRow):
        return raw
    prefix, references = row_fields(raw, source)
    inputs = {name: row_text(raw, name, source) for name in ("question", "context")}
    if raw.get("answer") is None:
        if answers:
            raise DataError(f'{source}: no "answer"; the row has {", ".join(map(str, raw))}.')
        return HeadRow(inputs, None, source, prefix=prefix)
    answer, start = row_text(raw, "answer", source), raw.get("answer_start")
    if start is None:
        start = inputs["context"].find(answer)
        if start < 0:
            raise DataError(
                f'{source}: the answer {answer!r} does not stand in the context. "answer" must be copied from it.'
            )
    elif not isinstance(start, int | str) or not str(start).isdecimal():
        raise DataError(f'{source}: "answer_start" must be a whole number, 0 or more, got {start!r}.')
    elif (there := inputs["context"][int(start) : int(start) + len(answer)]) != answer:
        raise DataError(f'{source}: "answer_start" {start} points at {there!r}, expected the answer {answer!r}.')
    return HeadRow(inputs, answer, source, int(start), references, prefix)


def encode(
    rows: Sequence[HeadRow],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    max_length: int,
    skip_bad: bool = False,
) -> tuple[list[Example], list[str]]:
    """Question and context as token ids; the labels are the first and the last token of the answer."""

    def one(row: HeadRow) -> Example:
        text = encode_text(tokenizer, row.inputs["question"], row.inputs["context"])
        ends = IGNORED, IGNORED
        if row.answer is not None and row.start is not None:
            first, end = row.start, row.start + len(row.answer)
            inside = [k for k, span in enumerate(text.spans) if span is not None and span[0] < end and span[1] > first]
            if not inside:
                raise DataError(
                    f"{row.source}: the tokenizer makes no token of the answer {row.answer!r}. Choose another answer."
                )
            ends = inside[0], inside[-1]
        return Example(text.input_ids, 0, row.source, ends, text.token_types, text.spans)

    return encode_each(rows, one, max_length, skip_bad)


def _logits(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Scores `[B, T]` for the first and the last token of the answer; none for padding."""
    output, real = run_head(model, examples)
    first, last = (s.float().masked_fill(~real, -torch.inf) for s in (output.start_logits, output.end_logits))
    return first, last


def loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The summed cross-entropy of first and last token, in nats."""
    right = torch.tensor([example.labels or () for example in examples], device=input_device(model))
    first, last = _logits(model, examples)
    return cross_entropy(first, right[:, 0], reduction="sum") + cross_entropy(last, right[:, 1], reduction="sum")


def decode(
    model: PreTrainedModel, examples: Sequence[Example], rows: Sequence[HeadRow], about: dict[str, Any]
) -> list[str]:
    """For each row the likeliest stretch of the context that begins before it ends."""
    answers = []
    for own, other, example, row in zip(*_logits(model, examples), examples, rows, strict=True):
        spans = [(k, span) for k, span in enumerate(example.spans or ()) if span is not None]
        inside = [k for k, _ in spans]
        if not inside:
            raise DataError(f"{row.source}: the tokenizer makes no token of the context.")
        pairs = own[inside][:, None] + other[inside][None]
        best = int(pairs.masked_fill(torch.ones_like(pairs).tril(-1).bool(), -torch.inf).argmax())
        (_, first), (_, last) = spans[best // len(spans)], spans[best % len(spans)]
        answers.append(row.inputs["context"][first[0] : last[1]].strip())
    return answers


def measure(answers: Sequence[str], rows: Sequence[HeadRow]) -> tuple[dict[str, float], dict[str, Any]]:
    """Exact match and token F1 as SQuAD defines them, in percent."""
    return squad_figures(answers, [row.answers for row in rows]), {}
