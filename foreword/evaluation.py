"""Measure a prefix beside what it is compared to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .completion import answer, measure
from .data import Data, Row, read_rows
from .errors import ConfigError
from .initialization import text_prefix
from .prefix import Prefix

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Answers and figures, by contestant: `prefix`, `base`, `demonstrations`."""

    rows: list[Row]
    answers: dict[str, list[str]]
    metrics: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, answers included."""
        return {
            "metrics": self.metrics,
            "rows": [
                {"prompt": row.prompt, "references": row.answers}
                | {name: answers[i] for name, answers in self.answers.items()}
                for i, row in enumerate(self.rows)
            ],
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    prefix: Prefix,
    *,
    compare: Sequence[str] = ("base", "demonstrations"),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    skip_bad_rows: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every row greedily with the prefix, and with what it is compared to; measure the answers.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        data: rows with completions or references; a file, a data set's name, or dictionaries (see `data.read_rows`).
        prefix: the prefix to measure.
        compare: `base`: the model alone; `demonstrations`: the model with the demonstrations that the prefix started
            from in front of every prompt (few-shot prompting).
        batch_size: rows answered at a time.
        max_new_tokens: where an answer is cut; by default half as long again as the longest right answer.
        skip_bad_rows: leave bad rows out.
        on_rows: called with the number of rows just answered, after each batch.

    Raises:
        ConfigError: `compare` names something else, or the prefix did not start from demonstrations.
        DataError: a row cannot be used.
    """
    if unknown := set(compare) - {"base", "demonstrations"}:
        raise ConfigError(f"compare with base or demonstrations, got {', '.join(sorted(unknown))}.")
    rows, _ = read_rows(data, skip_bad=skip_bad_rows)
    if max_new_tokens is None:
        longest = max(len(tokenizer(text)["input_ids"]) for row in rows for text in row.answers)
        max_new_tokens = longest + longest // 2
    contestants: dict[str, Prefix | None] = {"prefix": prefix}
    if "base" in compare:
        contestants["base"] = None
    if "demonstrations" in compare:
        shown = prefix.metadata.get("demonstrations")
        if not shown:
            raise ConfigError("This prefix did not start from demonstrations: compare with base only.")
        # The prefix made of a text equals having the text in front of every prompt, and is quicker.
        contestants["demonstrations"] = text_prefix(model, shown)
    texts = answer(
        model,
        tokenizer,
        rows * len(contestants),
        [contestant for contestant in contestants.values() for _ in rows],
        templates=[prefix.metadata.get("template", tokenizer.chat_template)] * len(rows) * len(contestants),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        on_rows=on_rows,
    )
    answers = {name: texts[i * len(rows) : (i + 1) * len(rows)] for i, name in enumerate(contestants)}
    return Evaluation(rows, answers, {name: measure(texts, rows) for name, texts in answers.items()})
