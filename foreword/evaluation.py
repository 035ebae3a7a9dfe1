"""Measure a prefix beside what it is compared to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Data
from .errors import ConfigError
from .initialization import text_prefix
from .metrics import TEXT_METRICS, check_text_metrics
from .prefix import Prefix
from .tasks import read, task_of

__all__ = ["Evaluation", "check_metrics", "contestants", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Answers and figures, by contestant: `prefix`, `base`, `demonstrations`.

    `details`: of classifications `labels` with precision, recall and F1 of each label, and `confusion`.
    """

    rows: list[Any]
    answers: dict[str, list[Any]]
    metrics: dict[str, dict[str, float]]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, answers included."""
        return {
            "metrics": self.metrics,
            "rows": [
                row.shown | {"references": row.answers} | {name: answers[i] for name, answers in self.answers.items()}
                for i, row in enumerate(self.rows)
            ],
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    prefix: Prefix,
    *,
    compare: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    skip_bad_rows: bool = False,
    metrics: Sequence[str] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every row with the prefix, and with what it is compared to; measure the answers.

    Completions are generated greedily, and a prefix with a head answers with the likeliest label or stretch of text.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        data: rows with right answers; a file, a data set's name, or dictionaries (see `data.read_rows`).
        prefix: the prefix to measure.
        compare: `base`: the model alone; `demonstrations`: the model with the demonstrations that the prefix started
            from in front of every prompt (few-shot prompting). By default all there are; none for a prefix with a head.
        batch_size: rows answered at a time.
        max_new_tokens: where an answer is cut; by default half as long again as the longest right answer.
        skip_bad_rows: leave bad rows out.
        metrics: figures of generated answers, by their names in `metrics.TEXT_METRICS`; by default exact match, ROUGE-L and
            BLEU.
        on_rows: called with the number of rows just answered, after each batch.

    Raises:
        ConfigError: `metrics` names one that is not known, needs what is not installed, or does not measure this task;
            `compare` names something else, or the prefix did not start from demonstrations.
        DataError: a row cannot be used.
    """
    task, names = task_of(prefix), contestants(prefix, compare)
    check_metrics(prefix, metrics)
    rows, _ = read(task, data, skip_bad=skip_bad_rows)
    prefixes: dict[str, Prefix | None] = {"prefix": prefix}
    for name in names:
        # The prefix made of a text equals having the text in front of every prompt, and is quicker.
        shown = prefix.metadata["demonstrations"] if name == "demonstrations" else None
        prefixes[name] = None if shown is None else text_prefix(model, shown)
    asked = rows * len(prefixes)
    found = task.answer(
        model,
        tokenizer,
        asked,
        [contestant for contestant in prefixes.values() for _ in rows],
        batch_size=batch_size,
        on_rows=on_rows,
        **task.options(asked, tokenizer, prefix, max_new_tokens),
    )
    answers = {name: found[i * len(rows) : (i + 1) * len(rows)] for i, name in enumerate(prefixes)}
    chosen = {} if metrics is None else {"metrics": metrics}
    figures = {name: task.measure(own, rows, **chosen) for name, own in answers.items()}
    return Evaluation(
        rows,
        answers,
        {name: metrics for name, (metrics, _) in figures.items()},
        {name: details for name, (_, details) in figures.items()},
    )


def check_metrics(prefix: Prefix, metrics: Sequence[str] | None) -> dict[str, str]:
    """The titles of the metrics, or of those of the prefix's task.

    Raises:
        ConfigError: one of them is not known, or cannot be measured here.
    """
    task = task_of(prefix)
    if metrics is None:
        return task.metrics
    if task.has_head:
        raise ConfigError(
            f"metrics are for generated answers; this prefix has a head, measured by {', '.join(task.metrics)}."
        )
    check_text_metrics(metrics)
    return {name: TEXT_METRICS[name].title for name in metrics}


def contestants(prefix: Prefix, compare: Sequence[str] | None = None) -> list[str]:
    """What to compare the prefix with: as asked, or all there are.

    Raises:
        ConfigError: something else was asked for.
    """
    known, started = task_of(prefix).compare, bool(prefix.metadata.get("demonstrations"))
    if compare is None:
        return [name for name in known if name != "demonstrations" or started]
    if unknown := sorted(set(compare) - set(known)):
        told = f"compare with {' or '.join(known)}" if known else "a prefix with a head is compared with nothing"
        raise ConfigError(f"{told}, got {', '.join(unknown)}.")
    if "demonstrations" in compare and not started:
        raise ConfigError("This prefix did not start from demonstrations: compare with base only.")
    return [name for name in known if name in compare]
