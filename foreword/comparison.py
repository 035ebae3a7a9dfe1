"""Every method on the same rows: one tokenization, one loss, one metric, and as many tries at a learning rate for each.

A *run* is one method, trained on one draw of rows with one seed, answered and measured. Runs are JSON values.
"""

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .anatomy import attention_sites, input_device
from .attachment import attach
from .baselines import BASELINES, Fit, fit, held_out_loss, restore, synchronize
from .completion import about, answer, measure
from .config import PrefixConfig, TrainConfig
from .data import Example, Row
from .errors import ConfigError
from .initialization import demonstrate, text_prefix
from .memory import StepMemory
from .models import Base
from .prefix import Prefix
from .reparameterization import Reparameterization
from .training import train

__all__ = [
    "ABLATIONS",
    "METHODS",
    "Bench",
    "Entry",
    "ablation",
    "compare",
    "draw",
    "entries",
    "run_once",
    "search",
    "tune",
]

_FACTOR = 3.0  # between two learning rates that are tried
METHODS = {  # titles; what the number behind a name (`prefix:32`) is, and by default
    "prefix": ("prefix", "{} virtual tokens", 16),
    "prefix-mlp": ("prefix, MLP", "{} virtual tokens", 16),
    **{name: (baseline.title, baseline.unit, baseline.size) for name, baseline in BASELINES.items()},
    "few-shot": ("few-shot prompt", "{} demonstrations", 3),
    "base": ("base alone", "", None),
}
_RATES = {"prefix": 3e-2, "prefix-mlp": 1e-3} | {name: baseline.rate for name, baseline in BASELINES.items()}


@dataclass(frozen=True)
class Entry:
    """One thing to compare: a method of `METHODS`, its size, for the prefixes how they are made, and a name for it all."""

    label: str
    method: str
    size: int | None
    prefix: PrefixConfig | None = None


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Args:
        base: a frozen decoder and its tokenizer.
        held_out: rows on which learning rates and steps are chosen, by the loss of a completion token.
        test: rows to answer at the end, and never before.
        config: how everything is trained; its learning rate is not used.
        tries: learning rates for each method, on the first draw of rows: three times as high or low, towards the better.
            For few-shot prompts: draws of demonstrations.
        tuning_steps: steps of such a try; by default as many as of a run, and the best try is the first run.
        metrics: names in `metrics.TEXT_METRICS`, the first one being the one to look at.
        num_beams: 1 is greedy.
        max_new_tokens: where an answer is cut; by default half as long again as the longest right answer.
        answer_batch: rows answered at a time.
    """

    base: Base
    held_out: Sequence[Example]
    test: Sequence[Row]
    config: TrainConfig
    tries: int = 3
    tuning_steps: int | None = None
    metrics: tuple[str, ...] = ("bleu", "rouge_l", "exact_match")
    num_beams: int = 1
    max_new_tokens: int | None = None
    answer_batch: int = 32


# --------------------------------------------------------------------------------------------------- what to compare


def entries(methods: str, prefix: PrefixConfig | None = None) -> list[Entry]:
    """What a list of names such as `full,prefix:32,lora:4,base` stands for. `prefix`: how prefixes are made.

    Raises:
        ConfigError: a name is none of `METHODS`, or has a size that it cannot have.
    """
    prefix, found = prefix or PrefixConfig(), []
    for told in methods.split(","):
        name, _, size = told.strip().partition(":")
        if name not in METHODS:
            raise ConfigError(f"No such method: {name!r}. Known: {', '.join(METHODS)}.")
        title, unit, usual = METHODS[name]
        if size and (not unit or not size.isdecimal() or int(size) < 1):
            expected = (
                f"a whole number behind the colon ({unit.format('N')})" if unit else f"{name} alone, it has no size"
            )
            raise ConfigError(f"{told.strip()!r}: expected {expected}.")
        count = int(size) if size else prefix.num_virtual_tokens if name.startswith("prefix") else usual
        made = None
        if name.startswith("prefix"):
            kind = "mlp" if name == "prefix-mlp" else prefix.reparameterization
            made = replace(prefix, num_virtual_tokens=count or 1, reparameterization=kind)
        label = title if count is None else f"{title}, {unit.format(count)}"
        found.append(Entry(label, name, count, made))
    if len({entry.label for entry in found}) < len(found):
        raise ConfigError(f"{methods!r} names a method twice.")
    return found


def _lengths(base: Base, rows: Sequence[Example], prefix: PrefixConfig) -> dict[str, PrefixConfig]:
    return {f"{n} virtual tokens": replace(prefix, num_virtual_tokens=n) for n in (2, 4, 8, 16, 32, 64)}


def _layers(base: Base, rows: Sequence[Example], prefix: PrefixConfig) -> dict[str, PrefixConfig]:
    most = len(attention_sites(base.model))
    counts = sorted({max(1, round(most * part)) for part in (0.125, 0.25, 0.5, 0.75, 1)})
    return {f"first {n} of {most} layers": replace(prefix, num_layers=n) for n in counts}


def _starts(base: Base, rows: Sequence[Example], prefix: PrefixConfig) -> dict[str, PrefixConfig]:
    whole = len(demonstrate(rows, prefix.num_demonstrations))
    words = "Answer the message as in the examples before it, in the same words, the same form and the same style. " * 9
    text = base.tokenizer.decode(base.tokenizer(words)["input_ids"][: prefix.num_virtual_tokens + 4])
    shape = replace(prefix, initialization=None, init_text=None)
    return {
        "random": replace(shape, initialization="random"),
        "words": replace(shape, initialization="text", init_text=text),
        f"demonstrations, all {whole} tokens": replace(
            shape, initialization="demonstrations", num_virtual_tokens=whole
        ),
        "demonstrations, compacted": replace(shape, initialization="demonstrations"),
    }


ABLATIONS: dict[str, Callable[[Base, Sequence[Example], PrefixConfig], dict[str, PrefixConfig]]] = {
    "length": _lengths,
    "layers": _layers,
    "initialization": _starts,
    "sink": lambda base, rows, prefix: {
        "first token frozen": replace(prefix, freeze_first=True),
        "first token trained": replace(prefix, freeze_first=False),
    },
    "mlp": lambda base, rows, prefix: {
        "no MLP": replace(prefix, reparameterization="none"),
        "MLP": replace(prefix, reparameterization="mlp"),
    },
}


def ablation(name: str, base: Base, rows: Sequence[Example], prefix: PrefixConfig | None = None) -> list[Entry]:
    """The prefixes that differ in one thing only; for `layers` beside prompt tuning, which changes the embeddings alone.

    Raises:
        ConfigError: there is no such ablation.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"No such ablation: {name!r}. Known: {', '.join(ABLATIONS)}.")
    found = [
        Entry(label, "prefix-mlp" if made.reparameterization == "mlp" else "prefix", made.num_virtual_tokens, made)
        for label, made in ABLATIONS[name](base, rows, prefix or PrefixConfig()).items()
    ]
    if name == "layers":
        tokens = (prefix or PrefixConfig()).num_virtual_tokens
        found.insert(0, Entry(f"embeddings only (prompt tuning, {tokens} tokens)", "prompt", tokens))
    return found


# ------------------------------------------------------------------------------------------------------------ running


def compare(
    bench: Bench,
    chosen: Sequence[Entry],
    rows: Sequence[Example],
    *,
    counts: Sequence[int] | None = None,
    seeds: int = 3,
    on_step: Callable[[str, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train, answer and measure everything; yields each run as soon as it is done.

    Args:
        rows: training rows, encoded.
        counts: how many of them to train on; by default all. For each seed they are drawn anew.
        seeds: runs of each method and count: seeds 0, 1, ...
        on_step: called with what runs now and each of its steps.

    Raises:
        ConfigError: there are fewer rows than asked for, or what a method needs is not installed.
    """
    counts = counts or [len(rows)]
    if max(counts) > len(rows):
        raise ConfigError(f"{max(counts)} training rows were asked for, but there are {len(rows)}.")
    for entry in chosen:
        for count in counts:
            rate, tries, fitted = tune(bench, entry, rows, count, on_step)
            for seed in range(1 if entry.method == "base" else seeds):  # it answers the same each time
                run = run_once(bench, entry, rows, count, rate, seed, None if seed else fitted, on_step)
                peak = tries[0]["peak_bytes"] if tries else None  # the first try alone is watched
                yield run | {"peak_bytes": run["peak_bytes"] or peak} | ({} if seed else {"tries": tries})


def tune(
    bench: Bench,
    entry: Entry,
    rows: Sequence[Example],
    count: int,
    on_step: Callable[[str, int], None] | None = None,
) -> tuple[float, list[dict[str, Any]], Fit | None]:
    """The best learning rate on the first draw, every try, and the best try if it is as long as a run."""
    if entry.method not in _RATES:
        return 0.0, [], None
    tried: dict[float, Fit] = {}
    best: Fit | None = None
    drawn = draw(rows, count, 0)

    def attempt(rate: float) -> float:
        nonlocal best
        told = f"{entry.label}, {count} rows, learning rate {rate:g}"
        fitted = _fit(bench, entry, drawn, rate, 0, bench.tuning_steps, _telling(on_step, told), watch=not tried)
        if best is None or fitted.loss < best.loss:
            best = fitted
        tried[rate] = fitted._replace(state=None)
        return fitted.loss

    rate = search(_RATES[entry.method], bench.tries, attempt)
    tries = [
        {
            "learning_rate": r,
            "steps": f.steps,
            "held_out_loss": finite(f.loss),
            "peak_bytes": f.peak_bytes,
            "curve": [[step, finite(loss)] for step, loss in f.curve],
        }
        for r, f in tried.items()
    ]
    return rate, tries, best if bench.tuning_steps is None else None


def draw(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The rows of a seed, in an order of its own."""
    return random.Random(f"rows {seed}").sample(list(rows), count)


def _telling(on_step: Callable[[str, int], None] | None, told: str) -> Callable[[int], None] | None:
    return None if on_step is None else lambda step: on_step(told, step)


def finite(number: float) -> float | None:
    """JSON knows no infinity."""
    return number if math.isfinite(number) else None


def search(start: float, tries: int, loss_of: Callable[[float], float]) -> float:
    """The learning rate with the lowest loss, of `tries`: from `start` in steps of a factor 3 towards the better, then closer.

    Example:
        >>> search(1e-2, 4, lambda rate: abs(rate - 0.09))
        0.09
    """
    found: dict[float, float] = {}  # by power of the factor
    for _ in range(tries):
        best = min(found, key=lambda power: found[power], default=None)
        near = [0.0] if best is None else [best + 1, best - 1, best + 0.5, best - 0.5]
        power = next((p for p in near if p not in found), None)
        if power is None:
            break
        found[power] = loss_of(_rate(start, power))
    return _rate(start, min(found, key=lambda power: found[power]))


def _rate(start: float, power: float) -> float:
    return float(f"{start * _FACTOR**power:.2g}")


def run_once(
    bench: Bench,
    entry: Entry,
    rows: Sequence[Example],
    count: int,
    rate: float,
    seed: int,
    fitted: Fit | None = None,
    on_step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """One run as JSON values: trained, unless `fitted` is its result already; answered, measured."""
    if fitted is None:
        told = f"{entry.label}, {count} rows, seed {seed}"
        fitted = _fit(bench, entry, draw(rows, count, seed), rate, seed, None, _telling(on_step, told))
    if fitted.state is None and entry.method in _RATES:
        raise ConfigError(
            f"{entry.label}, seed {seed}: the loss did not stay finite at learning rate {rate:g}. "
            "Raise tries, load the base in float32, or leave the method out."
        )
    began = time.perf_counter()
    answers = _answer(bench, entry, fitted, seed)
    synchronize(input_device(bench.base.model))
    seconds = time.perf_counter() - began
    model = bench.base.model
    return {
        "label": entry.label,
        "method": entry.method,
        "size": entry.size,
        "prefix": None if entry.prefix is None else asdict(entry.prefix),
        "rows": count,
        "seed": seed,
        "learning_rate": rate or None,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "held_out_loss": finite(fitted.loss),
        "curve": [[step, finite(round(loss, 5))] for step, loss in fitted.curve],
        "metrics": measure(answers, bench.test, bench.metrics),
        "trained": fitted.trained,
        "percent": 100 * fitted.trained / model.num_parameters(),
        "bytes": 4 * fitted.kept,
        "peak_bytes": fitted.peak_bytes,
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.tokens_per_second, 1),
        "answer_seconds": round(seconds, 2),
        "answers": answers,
    }


def _fit(
    bench: Bench,
    entry: Entry,
    rows: Sequence[Example],
    rate: float,
    seed: int,
    steps: int | None,
    on_step: Callable[[int], None] | None,
    watch: bool = False,
) -> Fit:
    """`watch`: count memory, which takes a while on a CPU."""
    watch = watch or input_device(bench.base.model).type == "cuda"
    config = replace(bench.config, learning_rate=rate or 1.0, seed=seed, steps=steps or bench.config.steps)
    if entry.prefix is not None:
        return _fit_prefix(bench, entry.prefix, rows, config, on_step, watch)
    if entry.method in BASELINES:
        with BASELINES[entry.method].open(bench.base.model, entry.size, seed) as subject:
            return fit(subject, rows, bench.held_out, config, on_step, watch)
    return _prompt(bench, rows, entry.size, seed)


def _fit_prefix(
    bench: Bench,
    prefix: PrefixConfig,
    rows: Sequence[Example],
    config: TrainConfig,
    on_step: Callable[[int], None] | None,
    watch: bool,
) -> Fit:
    model = bench.base.model
    curve: list[tuple[int, float]] = []
    gaps: list[float] = []
    speeds: list[float] = []
    last = 0.0
    with StepMemory(input_device(model)) as memory:

        def note(progress: Any) -> None:
            nonlocal last
            now = time.perf_counter()
            if progress.held_out_loss is not None:
                curve.append((progress.step, progress.held_out_loss))
            elif progress.step > 2:  # the second step is watched, and an evaluation is no part of a step
                gaps.append(now - last)
                speeds.append(progress.tokens_per_second)
            if watch and progress.step <= 2:
                memory()
            if on_step is not None:
                on_step(progress.step)
            last = time.perf_counter()

        try:
            made = train(model, bench.base.tokenizer, rows, prefix, config, held_out=bench.held_out, on_step=note)
        except ConfigError:
            if not curve and not last:
                raise
            made = None  # the loss became infinite
    if made is None:
        return Fit(None, curve, math.inf, 0, config.steps, 0.0, 0.0, 0, 0, None)
    training = made.metadata["training"]
    trained = sum(p.numel() for p in Reparameterization(made, prefix, config.seed).parameters())
    seconds = statistics.mean(gaps) * training["steps"] if gaps else training["seconds"]
    speed = 1 / statistics.mean(1 / s for s in speeds) if speeds else 0.0
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 4 if config.averaging else 3  # the parameters, two of the optimizer, the average
    peak = None if memory.peak is None else weights + copies * 4 * trained + memory.peak
    loss, best = training["held_out_loss"], training["best_step"]
    kept = made.num_parameters
    return Fit(made, curve, loss, best, training["steps"], seconds, speed, trained, kept, peak)


def _prompt(bench: Bench, rows: Sequence[Example], shots: int | None, seed: int) -> Fit:
    """The base alone, or behind the demonstrations, of several draws, that lower the held-out loss most."""
    model, size = bench.base.model, bench.config.batch_size
    if shots is None:
        return Fit(None, [], held_out_loss(model, bench.held_out, size), 0, 0, 0.0, 0.0, 0, 0, None)
    if shots > len(rows):
        raise ConfigError(f"{shots} demonstrations were asked for, but there are {len(rows)} training rows.")
    found = []
    for number in range(bench.tries):
        shown = random.Random(f"shots {seed} {number}").sample(list(rows), shots)
        ids = demonstrate(shown, shots)
        with attach(model, text_prefix(model, ids)):
            found.append((held_out_loss(model, bench.held_out, size), ids))
    loss, ids = min(found)
    return Fit(ids, [], loss, 0, 0, 0.0, 0.0, 0, len(ids), None)


def _answer(bench: Bench, entry: Entry, fitted: Fit, seed: int) -> list[str]:
    base = bench.base
    if isinstance(fitted.state, Prefix):
        return _generate(bench, base.model, fitted.state)
    if entry.method in BASELINES:
        with BASELINES[entry.method].open(base.model, entry.size, seed) as subject:
            restore(subject, fitted.state)
            if subject.fold is not None:
                return _generate(bench, base.model, subject.fold())
            return _generate(bench, subject.model, None)
    return _generate(bench, base.model, None if fitted.state is None else text_prefix(base.model, fitted.state))


def _generate(bench: Bench, model: Any, prefix: Prefix | None) -> list[str]:
    tokenizer, rows = bench.base.tokenizer, bench.test
    if prefix is not None:  # once to the device, rather than in every layer of every step
        prefix = copy.deepcopy(prefix).to(input_device(model))
    longest = max(len(tokenizer(text)["input_ids"]) for row in rows for text in row.answers)
    return answer(
        model,
        tokenizer,
        rows,
        [prefix] * len(rows),
        templates=[about(bench.base.model, tokenizer)["template"]] * len(rows),
        batch_size=bench.answer_batch,
        max_new_tokens=bench.max_new_tokens or longest + longest // 2,
        num_beams=bench.num_beams,
    )
