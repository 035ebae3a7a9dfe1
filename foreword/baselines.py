"""The other ways to adapt a model to rows of prompt and completion: what a prefix is compared with.

Full fine-tuning, LoRA, prompt tuning and prefix tuning as PEFT has it, and bottleneck adapters. Each works on a copy of the
model's structure that shares its weights (full fine-tuning: on a copy of the weights too), so the base itself never changes.
Their loop is the prefix's own: its batches, loss, optimizer, decay and early stopping, with every trained number in float32.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapted, make_adapters
from .anatomy import attention_sites, input_device, stacks
from .averaging import Average
from .config import TrainConfig
from .data import IGNORED, Example, collate, schedule
from .errors import ConfigError
from .initialization import embedding_prefix
from .losses import cross_entropy
from .memory import StepMemory
from .prefix import Prefix, SiteTensors

_copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]  # one call for many tensors

__all__ = ["BASELINES", "Baseline", "Fit", "Subject", "fit", "held_out_loss", "restore", "synchronize"]


class Subject(NamedTuple):
    """A model with a method on it.

    Args:
        model: what is called, and generates.
        parameters: what is trained.
        kept: how many numbers the file of one task holds.
        skipped: how many columns of the model's logits stand before those of the batch.
        fold: the prefix that equals what was trained, for the methods that have one; the base then answers with it.
    """

    model: Any
    parameters: list[nn.Parameter]
    kept: int
    skipped: int = 0
    fold: Callable[[], Prefix] | None = None


class Fit(NamedTuple):
    """What a training run came to. `state`: what was best. `curve`: step and held-out loss, in nats a token."""

    state: Any
    curve: list[tuple[int, float]]
    loss: float
    best_step: int
    steps: int
    seconds: float  # without evaluations
    tokens_per_second: float
    trained: int  # numbers that the optimizer changes
    kept: int  # numbers that the file of one task holds
    peak_bytes: int | None  # weights, what is trained with AdamW's two moments, and what a step adds at its peak


@dataclass(frozen=True)
class Baseline:
    """One method. `rate`: the learning rate from which the search starts. `size` is told in `unit`."""

    title: str
    rate: float
    size: int | None
    unit: str
    open: Callable[[PreTrainedModel, int | None, int], AbstractContextManager[Subject]]


# ---------------------------------------------------------------------------------------------------------- methods


def _sharing(model: PreTrainedModel) -> Any:
    """A copy of the structure whose parameters and buffers are the model's own."""
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, own).eval().requires_grad_(False)


@contextmanager
def _full(model: PreTrainedModel, size: int | None, seed: int) -> Iterator[Subject]:
    own = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = list(own.parameters())
    yield Subject(own, parameters, sum(p.numel() for p in parameters))


@contextmanager
def _adapter(model: PreTrainedModel, size: int | None, seed: int) -> Iterator[Subject]:
    own = _sharing(model)
    adapters = make_adapters(own, size or 1, seed)
    parameters = list(adapters.parameters())
    with adapted(own, adapters):
        yield Subject(own, parameters, sum(p.numel() for p in parameters))


def _peft(kind: str, settings: Callable[[Any, int], dict[str, Any]]) -> Callable[..., AbstractContextManager[Subject]]:
    @contextmanager
    def open_(model: PreTrainedModel, size: int | None, seed: int) -> Iterator[Subject]:
        try:
            peft: Any = import_module("peft")
        except ImportError:
            raise ConfigError(
                "PEFT is not installed: LoRA, prompt tuning and its prefix tuning are its own. pip install 'foreword[compare]', "
                "or compare with full, adapter, few-shot and base."
            ) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks Transformers for what has another name by now
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings(model, size or 1))
                wrapped = peft.get_peft_model(_sharing(model), config).eval()
            parameters = [p for p in wrapped.parameters() if p.requires_grad]
            kept = sum(p.numel() for p in parameters)
            fold = _FOLDS.get(kind)
            yield Subject(
                wrapped.get_base_model() if kind == "LoraConfig" else wrapped,  # LoRA's layers are in the model itself
                parameters,
                kept,
                config.num_virtual_tokens if kind == "PromptTuningConfig" else 0,
                None if fold is None else partial(fold, model, wrapped),
            )

    return open_


# Generation with these two goes wrong silently where PEFT and Transformers disagree about the cache's name.


@torch.no_grad()
def _cached_prefix(model: PreTrainedModel, wrapped: Any) -> Prefix:
    """PEFT's prefix: keys and values that it puts into the cache, behind rotary embedding as ours."""
    layers = wrapped.get_prompt(batch_size=1).layers
    tensors = [SiteTensors(*(t[0].transpose(0, 1).float() for t in (layer.keys, layer.values))) for layer in layers]
    length = len(tensors[0].key)
    return Prefix(attention_sites(model), tensors, position_offset=length if stacks(model)[0].takes_positions else 0)


@torch.no_grad()
def _prompt_prefix(model: PreTrainedModel, wrapped: Any) -> Prefix:
    return embedding_prefix(model, wrapped.get_prompt(batch_size=1)[0])


_FOLDS = {"PrefixTuningConfig": _cached_prefix, "PromptTuningConfig": _prompt_prefix}


def _sampled(model: Any, size: int) -> dict[str, Any]:
    """From the embeddings of words, which Lester et al. 2021 found better than random numbers."""
    name = model.config._name_or_path
    return {"num_virtual_tokens": size, "prompt_tuning_init": "SAMPLE_VOCAB", "tokenizer_name_or_path": name}


BASELINES = {
    "full": Baseline("full fine-tuning", 1e-4, None, "", _full),
    "lora": Baseline("LoRA", 1e-3, 8, "rank {}", _peft("LoraConfig", lambda model, size: {"r": size})),
    "adapter": Baseline("adapter", 1e-3, 2, "width {}", _adapter),
    "prompt": Baseline("prompt tuning", 3e-2, 20, "{} virtual tokens", _peft("PromptTuningConfig", _sampled)),
    "peft-prefix": Baseline(
        "PEFT prefix", 1e-2, 16, "{} virtual tokens",
        _peft("PrefixTuningConfig", lambda model, size: {"num_virtual_tokens": size}),
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the loop


def fit(
    subject: Subject,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    on_step: Callable[[int], None] | None = None,
    watch: bool = True,
) -> Fit:
    """Train what `subject` trains, as `training.train` trains a prefix. `watch`: count the memory of a step.

    A loss that is no longer finite ends the run; its own is infinite then, unless an earlier evaluation was better.
    """
    device = input_device(subject.model)
    masters = [_master(parameter) for parameter in subject.parameters]
    fused = device.type in ("cpu", "cuda")  # without temporary copies of everything
    optimizer = torch.optim.AdamW(masters, lr=config.learning_rate, weight_decay=0.0, fused=fused)
    state = [master.detach().clone() for master in masters]
    average = Average(masters, config.averaging)
    best, best_step, curve, waited = math.inf, 0, list[tuple[int, float]](), 0
    seconds, tokens, began, step = 0.0, 0, time.perf_counter(), 0
    with StepMemory(device) as memory:
        for step, batch in enumerate(_batches(rows, config), 1):
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - (step - 1) / config.steps)
            units = sum(example.units for example in batch)
            for part in (batch[i :: config.micro_batches] for i in range(config.micro_batches)):
                if part:
                    (_loss(subject.model, part, subject.skipped) / units).backward()
            _update(subject.parameters, masters, optimizer)
            average.add(step)
            tokens += sum(len(example.input_ids) for example in batch)
            if watch and step <= 2:
                memory()
            if step % config.evaluate_every == 0 or step == config.steps:
                synchronize(device)
                seconds += time.perf_counter() - began
                with average.shown():
                    restore(subject, masters)
                    loss = held_out_loss(subject.model, held_out, config.batch_size, subject.skipped)
                    if loss < best:
                        _copy_all(state, [master.detach() for master in masters])
                restore(subject, masters)
                curve.append((step, loss))
                waited += 1
                if loss < best:
                    best, best_step, waited = loss, step, 0
                began = time.perf_counter()
                if waited >= config.patience or not math.isfinite(loss):
                    break
            if on_step is not None:
                on_step(step)
    trained = sum(master.numel() for master in masters)
    weights = {
        id(t): t.numel() * t.element_size() for t in (*subject.model.parameters(), *masters, *subject.parameters)
    }
    held = sum(weights.values()) + (3 if average.values else 2) * 4 * trained
    peak = None if memory.peak is None else held + memory.peak
    return Fit(state, curve, best, best_step, step, seconds, tokens / seconds, trained, subject.kept, peak)


def _loss(model: Any, examples: Sequence[Example], skipped: int) -> Tensor:
    """The summed cross-entropy of the completion tokens, in nats, of a padded batch; logits are made where labels are."""
    batch = collate([examples]).to(input_device(model))
    logits = model(input_ids=batch.input_ids, logits_to_keep=batch.columns + skipped, use_cache=False).logits
    width, kept = batch.input_ids.shape[1], len(batch.columns)
    place = torch.searchsorted(batch.columns, batch.places % width) + batch.places // width * kept
    return cross_entropy(logits.flatten(0, 1).index_select(0, place), batch.labels, IGNORED).sum()


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Example], batch_size: int, skipped: int = 0) -> float:
    """Mean loss a completion token, in nats."""
    by_length = sorted(rows, key=lambda example: len(example.input_ids))
    total = torch.zeros((), device=input_device(model))
    for first in range(0, len(by_length), batch_size):
        total += _loss(model, by_length[first : first + batch_size], skipped)
    return float(total) / sum(example.units for example in rows)


@torch.no_grad()
def restore(subject: Subject, state: Sequence[Tensor]) -> None:
    """Put numbers, such as what a run found best, into the subject."""
    for parameter, tensor in zip(subject.parameters, state, strict=True):
        parameter.copy_(tensor)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that time is that of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batches(rows: Sequence[Example], config: TrainConfig) -> Iterator[list[Example]]:
    lengths = [len(example.input_ids) for example in rows]
    left, epoch = config.steps, 0
    while left > 0:
        for batch in schedule(lengths, config.batch_size, config.seed, epoch)[:left]:
            yield [rows[i] for i in batch]
            left -= 1
        epoch += 1


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The number in float32: steps smaller than bfloat16 can tell apart would otherwise be lost."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())


@torch.no_grad()
def _update(
    parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """An optimizer step on the masters, and their rounding back to what the model computes with."""
    apart = []
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter is not master and (gradient := parameter.grad) is not None:
            if master.grad is None:
                master.grad = torch.empty_like(master)
            master.grad.copy_(gradient)  # into the same memory each time
            parameter.grad = None
            apart.append((parameter, master))
    optimizer.step()
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter is master:
            parameter.grad = None
    if apart:
        _copy_all([p for p, _ in apart], [m for _, m in apart])
