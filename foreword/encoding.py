"""What the tasks with a head share: texts to token ids with their characters, padded batches, answers in batches."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import input_device, text_room
from .attachment import attach
from .data import Example, HeadRow
from .errors import ConfigError, DataError
from .prefix import Prefix

__all__ = ["Encoded", "Encoder", "answer_with_head", "encode_text", "label_number", "row_label", "run_head"]


class Encoded(NamedTuple):
    """One text, or two, as token ids. `spans`: the characters of the last text behind each of its tokens."""

    input_ids: tuple[int, ...]
    token_types: tuple[int, ...] | None
    spans: tuple[tuple[int, int] | None, ...]


Encoder = Callable[..., tuple[list[Example], list[str]]]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None = None) -> Encoded:
    """A text, or two, with the tokenizer's own special tokens; with a line between where it has none for two texts."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for. Load a fast tokenizer."
        )
    ahead = 0
    if pair is not None and tokenizer.num_special_tokens_to_add(True) <= tokenizer.num_special_tokens_to_add(False):
        text, pair, ahead = f"{text}\n{pair}", None, len(text) + 1
    encoded: Any = tokenizer(text, pair, return_offsets_mapping=True)
    last = 0 if pair is None else 1
    spans = [
        (max(0, start - ahead), end - ahead) if owner == last and end > max(start, ahead) else None
        for owner, (start, end) in zip(encoded.sequence_ids(0), encoded["offset_mapping"], strict=True)
    ]
    types = encoded.get("token_type_ids")
    return Encoded(tuple(encoded["input_ids"]), tuple(types) if types and any(types) else None, tuple(spans))


def row_label(label: Any, source: str) -> str:
    """A label as text; whole numbers and truth values are written as in JSON."""
    if isinstance(label, bool):
        return str(label).lower()
    if not isinstance(label, str | int) or not str(label).strip():
        raise DataError(f"{source}: a label must be a text or a whole number, got {label!r}.")
    return str(label)


def label_number(label: str, labels: Sequence[str], source: str) -> int:
    """Where a label stands among those of the model."""
    if label not in labels:
        raise DataError(
            f"{source}: label {label!r} is none of the model's: {', '.join(labels)}. Mend it, load the base with all "
            "labels (load_base(..., labels=[...]))."
        )
    return list(labels).index(label)


def run_head(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[Any, Tensor]:
    """The model's output for the rows, padded on the right, and which tokens are real `[B, T]`."""
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        raise ConfigError(
            f"{type(model).__name__} has no padding token, so rows of several lengths cannot be told apart. Set "
            "model.config.pad_token_id = tokenizer.pad_token_id, or load the base with foreword.load_base."
        )

    def stack(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(
            input_device(model)
        )

    ids = [example.input_ids for example in examples]
    mask = stack([[1] * len(row) for row in ids], 0)
    inputs: dict[str, Any] = {"input_ids": stack(ids, pad), "attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    if any(example.token_types for example in examples) and "token_type_ids" in taken:
        inputs["token_type_ids"] = stack([e.token_types or [0] * len(e.input_ids) for e in examples], 0)
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return model(**inputs), mask.bool()


def answer_with_head(
    encode: Encoder,
    decode: Callable[[PreTrainedModel, Sequence[Example], Sequence[HeadRow], dict[str, Any]], list[Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[HeadRow],
    prefixes: Sequence[Prefix | None],
    *,
    batch_size: int = 32,
    on_rows: Callable[[int], None] | None = None,
    **generation: Any,
) -> list[Any]:
    """Each row's answer with its own prefix and that prefix's head.

    Raises:
        ConfigError: a row has no prefix with a head, or an option belongs to generated answers.
    """
    if given := [name for name, value in generation.items() if value is not None]:
        raise ConfigError(f"A head generates no text: leave out {', '.join(given)}.")
    answers: list[Any] = [None] * len(rows)
    for prefix in {id(prefix): prefix for prefix in prefixes}.values():
        if prefix is None or prefix.head is None:
            raise ConfigError(
                "A base alone has no trained head to answer with. Give a prefix that was trained for the task."
            )
        own = [i for i, other in enumerate(prefixes) if other is prefix]
        room = text_room(model, prefix.position_offset) or 10**9
        asked = [replace(rows[i], answer=None) for i in own]
        examples, _ = encode(asked, tokenizer, prefix.metadata, 10**9)
        for example in examples:
            if len(example.input_ids) > room:
                raise DataError(
                    f"{example.source}: {len(example.input_ids)} tokens, but {type(model).__name__} reads at most {room}. "
                    "Shorten the row."
                )
        order = sorted(range(len(own)), key=lambda k: len(examples[k].input_ids))
        with attach(model, prefix), torch.inference_mode():
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                batch = [rows[own[k]] for k in chosen]
                found = decode(model, [examples[k] for k in chosen], batch, prefix.metadata)
                for k, answer in zip(chosen, found, strict=True):
                    answers[own[k]] = answer
                if on_rows is not None:
                    on_rows(len(chosen))
    return answers
