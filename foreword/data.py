"""Rows to token ids: checking each row, rendering the chat template, batching by length."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .sources import raw_rows

__all__ = [
    "IGNORED",
    "Batch",
    "Data",
    "Example",
    "HeadRow",
    "Row",
    "collate",
    "completion_row",
    "encode",
    "encode_each",
    "prompt_ids",
    "read_checked",
    "read_rows",
    "row_fields",
    "row_text",
    "schedule",
]

AnyRow = TypeVar("AnyRow")
IGNORED = -100  # the label of a token that carries no loss
_BUCKET_BATCHES = 16  # rows are sorted by length within this many batches
_SMALLEST = 64  # to multiples of so many tokens, or of a sixteenth, packed batches are filled up


@dataclass(frozen=True)
class Row:
    """One row: chat messages, of which the last assistant message is the completion.

    `source` says where the row comes from, for messages. `references` are further right answers. `prefix` names the
    prefix to answer with, for `generate`.
    """

    messages: tuple[dict[str, str], ...]
    completion: str | None
    source: str
    references: tuple[str, ...] = ()
    prefix: str | None = None

    @property
    def prompt(self) -> str:
        """What the last user message says."""
        return self.messages[-1]["content"]

    @property
    def shown(self) -> dict[str, Any]:
        """The question, for output."""
        return {"prompt": self.prompt}

    @property
    def answers(self) -> list[str]:
        """All right answers: the references if there are any, else the completion."""
        return list(self.references) or [self.completion or ""]


@dataclass(frozen=True)
class HeadRow:
    """One row of a task with a head.

    `inputs` are its fields: `text` and perhaps `text_pair`; `tokens`; `question` and `context`. `answer` is right: a
    label, a label for each token, a text that starts at character `start` of the context. The rest as in `Row`.
    """

    inputs: dict[str, Any]
    answer: Any
    source: str
    start: int | None = None
    references: tuple[str, ...] = ()
    prefix: str | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """The question, for output."""
        return self.inputs

    @property
    def answers(self) -> list[Any]:
        """All right answers: the references if there are any, else the answer."""
        return list(self.references) or [self.answer]


@dataclass(frozen=True)
class Example:
    """A row as token ids: prompt, then completion with the token that ends it.

    For a task with a head all of it is input, and `labels` holds what the head should say: for the row, for each token
    (`IGNORED` where it says nothing), or the first and last token of the answer. `token_types` tells first text from second
    where the tokenizer does; `spans` are the characters of the context behind each of its tokens.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    source: str = field(default="", compare=False)
    labels: tuple[int, ...] | None = None
    token_types: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int] | None, ...] | None = field(default=None, compare=False)

    @property
    def units(self) -> int:
        """How many labels carry loss: a row's loss is the sum over them."""
        if self.labels is None:
            return len(self.input_ids) - self.prompt_length
        return sum(label != IGNORED for label in self.labels)


Data = str | Path | Iterable[dict[str, Any] | Row | HeadRow | Example]  # rows encoded before are taken as they are


@dataclass(frozen=True)
class Batch:
    """Rows of one run, or of several that train together, as tensors.

    Padded: one row of tokens for each row of data, filled up on the right; causal attention never looks right, so no mask
    is needed. Packed: one row of tokens for each run, its rows of data end to end.
    """

    input_ids: Tensor  # [B, T]
    places: Tensor  # [M], where in the flattened tokens a label is predicted
    labels: Tensor  # [M], the token that is right there; IGNORED where M was filled up
    columns: Tensor  # [C], sorted: the columns in which any row has a label
    owners: tuple[int, ...]  # B, the run that each row of tokens belongs to
    runs: int
    position_ids: Tensor | None = None  # [B, T] of packed rows
    starts: Tensor | None = None  # [N], int32: where packed rows of data start, flattened, and the end of the last
    longest: int = 0  # no row of data has more tokens; 0 where the model is to find out from its inputs

    def to(self, device: torch.device) -> "Batch":
        """The same on another device; to a GPU without waiting for it."""
        return Batch(**{name: _to(value, device) for name, value in vars(self).items()})

    @property
    def shape(self) -> tuple[Any, ...]:
        """Batches of one shape can be computed by one CUDA graph."""
        return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in vars(self).values())


def _to(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


# ----------------------------------------------------------------------------------------------------------- reading


def read_rows(data: Data, *, completions: bool = True, skip_bad: bool = False) -> tuple[list[Row], list[str]]:
    """Read and check rows.

    Args:
        data: a `.jsonl`, `.csv` or `.parquet` file, the name of a data set for `datasets.load_dataset` (with an
            optional `:split`, default `train`), or dictionaries or rows. A row has `prompt` and `completion`, or `messages` in
            OpenAI's form ending with an assistant message, and optionally `references`.
        completions: whether a row without a completion is bad.
        skip_bad: leave bad rows out instead of raising.

    Returns:
        The rows, and for each row left out the reason.

    Raises:
        DataError: the file cannot be read, has no rows, or (unless `skip_bad`) has a bad row; with file and line.

    Example:
        >>> rows, skipped = read_rows([{"prompt": "2 + 2", "completion": "4"}, {"prompt": "3 + 3"}], skip_bad=True)
        >>> len(rows), skipped
        (1, ['row 2: no "completion" and no "messages"; the row has prompt.'])
    """
    return read_checked(data, lambda raw, source: completion_row(raw, source, completions), skip_bad)


def read_checked(
    data: Data, check: Callable[[Any, str], AnyRow], skip_bad: bool = False
) -> tuple[list[AnyRow], list[str]]:
    """Rows of any kind, and the reasons for those left out; `check` makes a row of a raw one and its place."""
    rows, bad = [], []
    for source, raw in raw_rows(data):
        try:
            if isinstance(raw, DataError):
                raise raw
            rows.append(raw if isinstance(raw, Example) else check(raw, source))
        except DataError as error:
            if not skip_bad:
                raise DataError(
                    f"{error} Mend the row, or take it out, as train and evaluate do with --skip-bad-rows."
                ) from None
            bad.append(str(error))
    if not rows:
        where = data if isinstance(data, str | Path) else "the data"
        raise DataError(f"{where}: no usable rows. Expected at least one" + (f"; {len(bad)} were bad." if bad else "."))
    return rows, bad


def completion_row(raw: Any, source: str, completions: bool) -> Row:
    """Check a row of prompt and completion, or of messages."""
    if isinstance(raw, Row):
        return raw
    prefix, references = row_fields(raw, source)
    if raw.get("messages") is not None:
        messages = _messages(raw["messages"], source)
        completion = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    else:
        if "prompt" not in raw:
            raise DataError(f'{source}: no "prompt" and no "messages"; the row has {_fields(raw)}.')
        messages = [{"role": "user", "content": row_text(raw, "prompt", source)}]
        completion = row_text(raw, "completion", source) if raw.get("completion") is not None else None
    if completions and completion is None and not references:
        raise DataError(f'{source}: no "completion" and no "messages"; the row has {_fields(raw)}.')
    return Row(tuple(messages), completion or (references[0] if references else None), source, references, prefix)


def row_fields(raw: Any, source: str) -> tuple[str | None, tuple[str, ...]]:
    """What any row may have besides: the name of its prefix, and references."""
    if not isinstance(raw, dict):
        raise DataError(f"{source}: expected an object with fields, got {type(raw).__name__}.")
    prefix, references = raw.get("prefix"), raw.get("references") or []
    if prefix is not None and not isinstance(prefix, str):
        raise DataError(f'{source}: "prefix" must be a string, got {type(prefix).__name__}.')
    if isinstance(references, str):  # a CSV cell
        references = [references]
    if not isinstance(references, list) or not all(isinstance(r, str) and r.strip() for r in references):
        raise DataError(f'{source}: "references" must be a list of non-empty strings.')
    return prefix, tuple(references)


def _messages(messages: Any, source: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{source}: "messages" must be a non-empty list, got {type(messages).__name__}.')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{source}: message {i + 1} must be an object with "role" and "content".')
        row_text(message, "content", f"{source}, message {i + 1}")
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        raise DataError(f'{source}: "messages" has a completion but nothing before it.')
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def row_text(raw: dict[str, Any], name: str, source: str) -> str:
    """A field that must be a text with something in it."""
    if name not in raw:
        raise DataError(f'{source}: no "{name}"; the row has {_fields(raw)}.')
    value = raw.get(name)
    if not isinstance(value, str):
        raise DataError(f'{source}: "{name}" must be a string, got {type(value).__name__}.')
    if not value.strip():
        raise DataError(f'{source}: "{name}" is empty.')
    return value


def _fields(raw: dict[str, Any]) -> str:
    return ", ".join(map(str, raw)) or "no fields"


# --------------------------------------------------------------------------------------------------------- rendering


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None, encoder: bool = False) -> list[int]:
    """The prompt as the model sees it. `template` is a chat template, or `None` for plain text.

    `encoder`: an encoder reads it, as a text of its own that ends.
    """
    text = _prompt_text(row, tokenizer, template)
    if encoder:
        return list(tokenizer(text, add_special_tokens=template is None)["input_ids"])
    return _tokenize(tokenizer, text, special=template is None)


def encode(
    rows: Sequence[Row | Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    max_length: int,
    skip_bad: bool = False,
    encoder: bool = False,
) -> tuple[list[Example], list[str]]:
    """Rows as token ids; the completion ends with the token that ends a turn. Rows encoded before stay as they are.

    Prompt and completion are tokenized apart, because generation starts from the prompt's own tokens; with `encoder`,
    an encoder reads the prompt, and the completion is what the tokenizer makes of a target.

    Raises:
        DataError: a row has more than `max_length` tokens (unless `skip_bad`), or the tokenizer cannot end a text.
    """
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"{type(tokenizer).__name__} has no end-of-sequence token, so no completion could ever end.")

    def one(row: Row) -> Example:
        prompt, completion = prompt_ids(row, tokenizer, template, encoder), _completion_text(row, tokenizer, template)
        if encoder:
            ids = [*prompt, *tokenizer(text_target=completion)["input_ids"]]
        else:
            ids = prompt + _tokenize(tokenizer, completion, special=False)
        return Example(tuple(ids if ids[-1] == end else [*ids, end]), len(prompt), row.source)

    return encode_each(rows, one, max_length, skip_bad)


def encode_each(
    rows: Sequence[Any], one: Callable[[Any], Example], max_length: int, skip_bad: bool = False
) -> tuple[list[Example], list[str]]:
    """The rows that `one` can encode in at most `max_length` tokens, and the reasons for those left out."""
    examples, bad = [], []
    for row in rows:
        try:
            example = row if isinstance(row, Example) else one(row)
            if len(example.input_ids) > max_length:
                size = f"{len(example.input_ids)} tokens, more than max_length={max_length}"
                raise DataError(f"{example.source}: {size}. Raise --max-length, shorten the row.")
            examples.append(example)
        except DataError as error:
            if not skip_bad:
                raise DataError(
                    f"{str(error).removesuffix('.')}, or leave it out (in training: --skip-bad-rows)."
                ) from None
            bad.append(str(error))
    if not examples:
        raise DataError(f"No row has at most max_length={max_length} tokens. Raise --max-length.")
    return examples, bad


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """`special`: with the tokens that start a text; a chat template writes them itself. Never with those that end it."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return list(ids)


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, str]], reply: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=reply
            )
        )
    except TemplateError as error:
        raise DataError(f"The chat template refuses these messages: {error}") from error


def _prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    if template is None:
        return "\n".join(message["content"] for message in row.messages)
    return _render(tokenizer, template, row.messages, reply=True)


def _completion_text(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    completion = row.completion or ""
    if template is None:
        return completion
    prompt = _prompt_text(row, tokenizer, template)
    whole = _render(tokenizer, template, [*row.messages, {"role": "assistant", "content": completion}], reply=False)
    if not whole.startswith(prompt):  # a template that rewrites earlier turns: the completion as it is
        return completion
    end_token = str(tokenizer.eos_token)
    end = whole.find(end_token, len(prompt) + len(completion.rstrip()))
    return whole[len(prompt) :] if end < 0 else whole[len(prompt) : end + len(end_token)]


# ---------------------------------------------------------------------------------------------------------- batching


def schedule(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as row numbers: shuffled, sorted by length within buckets, the batches shuffled again.

    A function of its arguments alone, so that training resumes in the same order. The last batch may be smaller.
    """
    generator = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    bucket = batch_size * _BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), bucket):
        by_length = sorted(order[start : start + bucket], key=lambda i: lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    generator.shuffle(batches)
    return batches


def collate(groups: Sequence[Sequence[Example]], packed: bool = False, maskless: bool = False) -> Batch:
    """The rows of each run as one batch; labels are the completions. `maskless`: the model can be told how long rows are.

    Packed batches are filled up to sizes that come back, so that a CUDA graph serves many.
    """
    rows: list[list[Example]] = (
        [list(group) for group in groups] if packed else [[e] for group in groups for e in group]
    )
    owners = list(range(len(groups))) if packed else [k for k, group in enumerate(groups) for _ in group]
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    width = _round_up(max(lengths)) if packed else max(lengths)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions, starts, places, labels = torch.zeros_like(input_ids), [], [], []
    for i, row in enumerate(rows):
        end = 0
        for example in row:
            first, length = end, len(example.input_ids)
            end = first + length
            input_ids[i, first:end] = torch.tensor(example.input_ids)
            positions[i, first:end] = torch.arange(length)
            starts.append(i * width + first)
            places += range(i * width + first + example.prompt_length - 1, i * width + end - 1)
            labels += example.input_ids[example.prompt_length :]
        positions[i, end:] = torch.arange(width - end)
        starts.append(i * width + end)  # what fills the row up is a document of its own
    if not packed:
        columns = sorted({place % width for place in places})
        numbers = [torch.tensor(own) for own in (places, labels, columns)]
        return Batch(
            input_ids, numbers[0], numbers[1], numbers[2], tuple(owners), len(groups), longest=width if maskless else 0
        )
    places += [len(rows) * width - 1] * (_round_up(len(places)) - len(places))  # the last token predicts nothing
    labels += [IGNORED] * (len(places) - len(labels))
    columns = places if len(rows) == 1 else sorted(place % width for place in places)
    starts.append(len(rows) * width)
    longest = max(end - start for start, end in pairwise(starts))
    return Batch(
        input_ids,
        torch.tensor(places),
        torch.tensor(labels),
        torch.tensor(columns),
        tuple(owners),
        len(groups),
        positions,
        torch.tensor(starts, dtype=torch.int32),
        max(128, 1 << (longest - 1).bit_length()),
    )


def _round_up(number: int) -> int:
    multiple = max(_SMALLEST, 1 << max(0, number.bit_length() - 5))
    return -(-number // multiple) * multiple
