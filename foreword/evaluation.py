"""Answer rows in batches, each with its own prefix, and measure the answers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .attachment import attach
from .data import Data, Row, prompt_ids, read_rows
from .errors import ConfigError
from .initialization import text_prefix
from .prefix import Prefix

__all__ = ["METRICS", "Evaluation", "answer", "evaluate", "measure"]

METRICS = {"exact_match": "exact match %", "rouge_l": "ROUGE-L", "bleu": "BLEU"}


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


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prefixes: Sequence[Prefix | None],
    *,
    templates: Sequence[str | None] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    on_rows: Callable[[int], None] | None = None,
    **generation: Any,
) -> list[str]:
    """Each row's answer with its own prefix, or without one; one batch may hold rows of many prefixes.

    Args:
        templates: each row's chat template; by default that of its prefix, else the tokenizer's.
        generation: further options of `generate`, for example `do_sample=True, temperature=0.7`. Greedy by default.
    """
    if templates is None:
        own: Any = tokenizer.chat_template
        templates = [own if p is None else p.metadata.get("template", own) for p in prefixes]
    prompts = [prompt_ids(r, tokenizer, t) for r, t in zip(rows, templates, strict=True)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"do_sample": False, "num_beams": 1} | generation
    # The checkpoint's own sampling settings do not apply to a measurement.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **options
    )
    answers = [""] * len(rows)
    # Rows of one prefix side by side, as they tend to end together; then by length, for little padding.
    first_seen = {id(prefix): i for i, prefix in reversed(list(enumerate(prefixes)))}
    order = sorted(range(len(rows)), key=lambda i: (first_seen[id(prefixes[i])], len(prompts[i])))
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]).to(ids.device)
        with attach(model, [prefixes[i] for i in chosen]), torch.inference_mode():
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        if on_rows is not None:
            on_rows(len(chosen))
    return answers


def measure(answers: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Exact match in percent of the rows, ROUGE-L F1 (best reference, mean over rows), lowercased BLEU of the corpus.

    ROUGE-L: rouge-score with stemming off. BLEU: sacrebleu with `lowercase=True` and all references.

    Example:
        >>> rows, _ = read_rows([{"prompt": "?", "completion": "The cat sat down here."}])
        >>> measure(["the cat sat down here."], rows)["bleu"]
        100.0
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(answers, (row.answers for row in rows), strict=True))
    exact = [any(_squeezed(text) == _squeezed(right) for right in rights) for text, rights in pairs]
    rouge = [max(scorer.score(right, text)["rougeL"].fmeasure for right in rights) for text, rights in pairs]
    most = max(len(row.answers) for row in rows)
    references: Any = [[row.answers[k] if k < len(row.answers) else None for row in rows] for k in range(most)]
    bleu = sacrebleu.corpus_bleu(list(answers), references, lowercase=True, force=True).score
    return {
        "exact_match": round(100 * sum(exact) / len(rows), 2),
        "rouge_l": round(100 * sum(rouge) / len(rows), 2),
        "bleu": round(bleu, 2),
    }


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
