"""What depends on the task, as a table: how a row is checked and encoded, what its loss is, how it is answered and measured.

A prefix file names its task; `completion` where it names none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import classification, completion, question_answering, token_classification
from .data import Data, Example, read_checked
from .encoding import answer_with_head
from .errors import ConfigError
from .prefix import Prefix

__all__ = ["TASKS", "Task", "check_model", "find_labels", "read", "task_of"]


@dataclass(frozen=True)
class Task:
    """One entry of the table.

    Args:
        has_head: whether a head is trained with the prefix.
        model_class: how the classes of its models are named: Transformers' auto class is `AutoModel` and this.
        encoder_decoder_class: the same for encoder-decoders.
        initialization: where a prefix starts unless told otherwise.
        compare: what a prefix can be compared with.
        metrics: its figures, and their titles.
        answer_name: the field of an answer in output.
        prompt: a raw row from a bare prompt.
        row: checks a raw row, given its place and whether it must have an answer.
        labels: all labels of some rows, where the head has one output a label.
        about: what a prefix keeps in its file, from model and tokenizer, to encode and answer rows later.
        encode: rows to token ids with labels, given `about`.
        collate: the rows of each run that shares a batch, as `loss` takes them; a task with a head has one run.
        loss: the summed loss of each run's rows.
        options: how to answer when measuring.
        answer: the answers to rows.
        measure: figures of answers to rows, and details; of completions those of the `metrics` given.
    """

    has_head: bool
    model_class: str
    encoder_decoder_class: str
    initialization: str
    compare: tuple[str, ...]
    metrics: dict[str, str]
    answer_name: str
    prompt: Callable[[str], dict[str, Any]]
    row: Callable[[Any, str, bool], Any]
    labels: Callable[[Sequence[Any]], list[str]] | None
    about: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]
    encode: Callable[..., tuple[list[Example], list[str]]]
    collate: Callable[[PreTrainedModel, Sequence[Sequence[Example]]], Any]
    loss: Callable[[PreTrainedModel, Any], Tensor]
    options: Callable[[Sequence[Any], PreTrainedTokenizerBase, Prefix, int | None], dict[str, Any]]
    answer: Callable[..., list[Any]]
    measure: Callable[..., tuple[dict[str, float], dict[str, Any]]]


def _no_prompt(prompt: str) -> dict[str, Any]:
    raise ConfigError("A question needs a context: give rows with --rows FILE.")


def _model_labels(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    names: Any = model.config.id2label or {}
    return {"labels": [names[i] for i in sorted(names)]}


def _head(module: Any, model_class: str, **own: Any) -> Task:
    """What the tasks with a head have in common."""
    return Task(
        has_head=True,
        model_class=model_class,
        encoder_decoder_class=model_class,
        initialization="random",
        compare=(),
        row=module.row,
        encode=module.encode,
        collate=lambda model, groups: groups,
        loss=lambda model, groups: torch.stack([module.loss(model, examples) for examples in groups]),
        options=lambda rows, tokenizer, prefix, max_new_tokens: {"max_new_tokens": max_new_tokens},
        answer=partial(answer_with_head, module.encode, module.decode),
        measure=module.measure,
        **own,
    )


TASKS = {
    "completion": Task(
        has_head=False,
        model_class="ForCausalLM",
        encoder_decoder_class="ForSeq2SeqLM",
        initialization="demonstrations",
        compare=("base", "demonstrations"),
        metrics=completion.METRICS,
        answer_name="completion",
        prompt=lambda prompt: {"prompt": prompt},
        row=completion.row,
        labels=None,
        about=completion.about,
        encode=completion.encode,
        collate=completion.collate,
        loss=completion.loss,
        options=completion.options,
        answer=completion.answer,
        measure=lambda answers, rows, **chosen: (completion.measure(answers, rows, **chosen), {}),
    ),
    "classification": _head(
        classification,
        model_class="ForSequenceClassification",
        metrics={"accuracy": "accuracy %", "f1": "macro F1"},
        answer_name="label",
        prompt=lambda prompt: {"text": prompt},
        labels=classification.labels,
        about=_model_labels,
    ),
    "token_classification": _head(
        token_classification,
        model_class="ForTokenClassification",
        metrics={"accuracy": "accuracy %", "f1": "F1"},
        answer_name="labels",
        prompt=lambda prompt: {"tokens": prompt.split()},
        labels=token_classification.labels,
        about=_model_labels,
    ),
    "question_answering": _head(
        question_answering,
        model_class="ForQuestionAnswering",
        metrics={"exact_match": "exact match %", "f1": "F1"},
        answer_name="answer",
        prompt=_no_prompt,
        labels=None,
        about=lambda model, tokenizer: {},
    ),
}


def task_of(prefix: Prefix | None) -> Task:
    """The task that a prefix was trained for.

    Raises:
        ConfigError: this version does not know it.
    """
    name = "completion" if prefix is None else prefix.metadata.get("task", "completion")
    if name not in TASKS:
        raise ConfigError(
            f"The prefix was trained for the task {name!r}; this version knows {', '.join(TASKS)}. Update Foreword."
        )
    return TASKS[name]


def read(task: Task, data: Data, *, answers: bool = True, skip_bad: bool = False) -> tuple[list[Any], list[str]]:
    """The task's rows, and the reason for each row left out. Raises as `data.read_rows`."""
    return read_checked(data, lambda raw, source: task.row(raw, source, answers), skip_bad)


def find_labels(task: Task, data: Data, skip_bad: bool = False) -> list[str] | None:
    """All labels of the data, to load a base with; `None` where the task has none."""
    return None if task.labels is None else task.labels(read(task, data, skip_bad=skip_bad)[0])


def check_model(name: str, model: PreTrainedModel) -> None:
    """Raise `ConfigError` for a model without the head of the task."""
    task, kind = TASKS[name], type(model).__name__
    if task.has_head and task.model_class not in kind:
        raise ConfigError(
            f"The task {name} needs a model with its head (...{task.model_class}), got {kind}. Load the base with "
            f"foreword.load_base(..., task={name!r}, labels=[...])."
        )
