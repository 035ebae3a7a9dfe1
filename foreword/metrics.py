"""Figures for generated texts with one or more right answers each, matched to the official scorers.

`sacrebleu` and `rouge-score` come with Foreword. METEOR, CIDEr and the ROUGE-L of image captioning are pycocoevalcap's, as
the E2E challenge used them; they need `pip install 'foreword[coco]'` and Java, and say so where either is missing.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from .errors import ConfigError

__all__ = ["TEXT_METRICS", "check_text_metrics", "nist", "text_figures"]

Answers = Sequence[str]
References = Sequence[Sequence[str]]  # at least one for each answer


class _Metric(NamedTuple):
    title: str
    figure: Callable[[Answers, References], float]
    java: bool = False


def text_figures(names: Sequence[str], answers: Answers, references: References) -> dict[str, float]:
    """The named figures of the whole set of answers, rounded to two digits; NIST and CIDEr to four.

    Raises:
        ConfigError: a name is none of `TEXT_METRICS`, or what it needs is not installed.

    Example:
        >>> text_figures(["exact_match", "bleu"], ["a b c d e"], [["a b c d e", "f"]])
        {'exact_match': 100.0, 'bleu': 100.0}
    """
    check_text_metrics(names)
    if len(answers) != len(references) or not answers or not all(references):
        raise ConfigError(f"{len(answers)} answers for {len(references)} rows: each needs a right answer.")
    digits = {"nist": 4, "cider": 4}
    return {name: round(TEXT_METRICS[name].figure(answers, references), digits.get(name, 2)) for name in names}


def check_text_metrics(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is none of `TEXT_METRICS`, and where what it needs is not installed."""
    if unknown := [name for name in names if name not in TEXT_METRICS]:
        raise ConfigError(f"No such metric: {', '.join(unknown)}. Known: {', '.join(TEXT_METRICS)}.")
    if not (asked := [name for name in names if TEXT_METRICS[name].java]):
        return
    told = f"{', '.join(asked)} cannot be measured here"
    if shutil.which("java") is None:
        raise ConfigError(f"{told}: there is no `java` on this machine. Install a Java runtime, or leave them out.")
    if find_spec("pycocoevalcap") is None:
        raise ConfigError(f"{told}: pycocoevalcap is not installed. pip install 'foreword[coco]', or leave them out.")


def exact_match(answers: Answers, references: References) -> float:
    """Percent of the answers that equal one of their references, white space aside."""

    def squeezed(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    pairs = zip(answers, references, strict=True)
    right = [any(squeezed(answer) == squeezed(reference) for reference in own) for answer, own in pairs]
    return 100 * sum(right) / len(right)


def bleu(answers: Answers, references: References) -> float:
    """Corpus BLEU of all references, lowercased: sacrebleu with `lowercase=True`, which equals E2E's official figure."""
    import sacrebleu

    most = max(map(len, references))
    columns = [[own[k] if k < len(own) else None for own in references] for k in range(most)]
    return sacrebleu.corpus_bleu(list(answers), columns, lowercase=True, force=True).score  # pyright: ignore[reportArgumentType]


def _rouge(kind: str) -> Callable[[Answers, References], float]:
    def figure(answers: Answers, references: References) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        pairs = zip(answers, references, strict=True)
        best = [max(scorer.score(right, answer)[kind].fmeasure for right in own) for answer, own in pairs]
        return 100 * sum(best) / len(best)

    return figure


# ------------------------------------------------------------------------------------------------------------ NIST


def nist(answers: Answers, references: References, order: int = 5) -> float:
    """NIST score (Doddington 2002) of a corpus, lowercased, as the E2E challenge's scorer computes it.

    For n = 1..5 the information, log2 of how often an n-gram's first n-1 words occur in all references over how often
    the n-gram itself does, of the answers' n-grams that their references have, over the number of the answers' n-grams;
    summed over n; times a penalty that is 0.5 where all answers together have two thirds of the words of the references.
    Counts are clipped per answer by the reference with the most; reference length is the mean of an answer's references.

    Example:
        >>> round(nist(["the cat sat"], [["the cat sat", "a cat sat"]]), 4)
        1.9183
    """
    known: Counter[tuple[str, ...]] = Counter()  # over the references of all rows
    found = [_words(answer) for answer in answers]
    right = [[_words(reference) for reference in own] for own in references]
    for own in right:
        for words in own:
            known[()] += len(words)
            for n in range(1, order + 1):
                known.update(_ngrams(words, n))
    gained, asked, ours, theirs = [0.0] * order, [0] * order, 0, 0.0
    for words, own in zip(found, right, strict=True):
        ours += len(words)
        theirs += sum(map(len, own)) / len(own)
        for n in range(1, order + 1):
            counts, limit = _ngrams(words, n), Counter[tuple[str, ...]]()
            for reference in own:
                limit |= _ngrams(reference, n)
            asked[n - 1] += counts.total()
            for ngram, hits in (counts & limit).items():
                gained[n - 1] += hits * math.log2(known[ngram[:-1]] / known[ngram])
    if not ours:
        return 0.0
    strength = math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(strength * math.log(min(1.0, ours / theirs)) ** 2)
    return penalty * sum(gain / count for gain, count in zip(gained, asked, strict=True) if count)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    """Tokens of the scorer mteval-v13a, lowercased."""
    text = f" {text.strip()} "
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)  # a dot or comma, unless a digit is before it
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)  # or behind it
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.lower().split()


# ------------------------------------------------------------------------------------------------- pycocoevalcap


def _coco(module: str, kind: str, scale: float) -> Callable[[Answers, References], float]:
    def figure(answers: Answers, references: References) -> float:
        scorer = getattr(import_module(f"pycocoevalcap.{module}"), kind)()
        tokenizer = import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
        found = tokenizer.tokenize({i: [{"caption": answer}] for i, answer in enumerate(answers)})
        right = tokenizer.tokenize({i: [{"caption": text} for text in own] for i, own in enumerate(references)})
        return scale * float(scorer.compute_score(right, found)[0])

    return figure


TEXT_METRICS = {
    "exact_match": _Metric("exact match %", exact_match),
    "bleu": _Metric("BLEU", bleu),
    "nist": _Metric("NIST", nist),
    "rouge_1": _Metric("ROUGE-1", _rouge("rouge1")),
    "rouge_2": _Metric("ROUGE-2", _rouge("rouge2")),
    "rouge_l": _Metric("ROUGE-L", _rouge("rougeL")),
    "meteor": _Metric("METEOR", _coco("meteor.meteor", "Meteor", 100.0), java=True),
    "coco_rouge_l": _Metric("ROUGE-L (coco)", _coco("rouge.rouge", "Rouge", 100.0), java=True),
    "cider": _Metric("CIDEr", _coco("cider.cider", "Cider", 1.0), java=True),
}
