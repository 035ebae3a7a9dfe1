"""Completions: the loss of a prompt's completion, answers generated in batches, and figures for them.

An encoder-decoder reads the prompt in its encoder, and its decoder says the completion.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import input_device
from .attachment import attach
from .data import IGNORED, Batch, Example, Row, completion_row, prompt_ids
from .data import collate as gather
from .data import encode as encode_completions
from .losses import cross_entropy, head_cross_entropy, is_plain_head
from .metrics import TEXT_METRICS, text_figures
from .packing import can_pack, packed_inputs
from .prefix import Prefix

__all__ = [
    "METRICS",
    "about",
    "answer",
    "collate",
    "completion_loss",
    "encode",
    "loss",
    "measure",
    "options",
    "row",
]

METRICS = {name: TEXT_METRICS[name].title for name in ("exact_match", "rouge_l", "bleu")}  # unless others are asked for


row = completion_row


def encode(
    rows: Sequence[Row | Example],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    max_length: int,
    skip_bad: bool = False,
) -> tuple[list[Example], list[str]]:
    """Rows as token ids, rendered by the chat template in `about`."""
    encoder = about.get("encoder", False)
    return encode_completions(rows, tokenizer, about["template"], max_length, skip_bad, encoder)


def about(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The chat template, and whether an encoder reads the prompt."""
    encoder = {"encoder": True} if model.config.is_encoder_decoder else {}
    return {"template": tokenizer.chat_template} | encoder


def collate(model: PreTrainedModel, groups: Sequence[Sequence[Example]]) -> Batch | Sequence[Sequence[Example]]:
    """The rows of each run as `loss` takes them."""
    if model.config.is_encoder_decoder:
        return groups
    device = input_device(model)
    lengths = {len(example.input_ids) for group in groups for example in group}
    maskless = device.type == "cuda" and can_pack(model)
    return gather(groups, packed=maskless and len(lengths) > 1, maskless=maskless).to(device)


def loss(model: PreTrainedModel, batch: Batch | Sequence[Sequence[Example]]) -> Float[Tensor, " K"]:
    """The summed loss of each run's rows, in nats."""
    if not isinstance(batch, Batch):
        return torch.stack([_target_loss(model, examples) for examples in batch])
    return completion_loss(model, batch)


def _target_loss(model: Any, examples: Sequence[Example]) -> Tensor:
    """The summed cross-entropy of what the decoder says after the encoder has read the prompts."""
    prompts = [torch.tensor(e.input_ids[: e.prompt_length]) for e in examples]
    targets = [torch.tensor(e.input_ids[e.prompt_length :]) for e in examples]
    mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True).to(input_device(model))
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(input_device(model))
    logits = model(
        input_ids=pad_sequence(prompts, batch_first=True).to(input_device(model)),
        attention_mask=mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), IGNORED).sum()


def completion_loss(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " K"]:
    """For each run the summed cross-entropy of its completion tokens, in nats. Logits are made of labelled tokens only."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.longest:
        inputs |= packed_inputs(batch.starts, batch.longest, batch.input_ids.device)
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    head: Any = model.get_output_embeddings()
    width = batch.input_ids.shape[1]
    hidden = _hidden(model, head, inputs) if is_plain_head(head) else None
    if hidden is not None:
        losses = head_cross_entropy(hidden.flatten(0, 1), head, batch.places, batch.labels, IGNORED)
    else:
        logits = model(**inputs, logits_to_keep=batch.columns).logits.flatten(0, 1)
        place = torch.searchsorted(batch.columns, batch.places % width) + batch.places // width * len(batch.columns)
        losses = cross_entropy(logits.index_select(0, place), batch.labels, IGNORED)
    if batch.runs == 1:
        return losses.sum()[None]
    owners = torch.tensor(batch.owners, device=losses.device) if len(batch.owners) != batch.runs else None
    rows = batch.places // width  # of tokens; a packed batch has one for each run
    return losses.new_zeros(batch.runs).index_add(0, rows if owners is None else owners[rows], losses)


_finishes: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()  # whether a model changes what its head puts out


def _hidden(model: PreTrainedModel, head: nn.Linear, inputs: dict[str, Any]) -> Float[Tensor, "B T D"] | None:
    """The hidden states that the head is called with, unless the model does something with what it puts out."""
    if _finishes.get(model):
        return None
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    head.__dict__["forward"] = forward
    try:
        output = model(**inputs).logits
    finally:
        del head.__dict__["forward"]
    _finishes[model] = not seen or output is not seen[-1]
    return None if _finishes[model] else output


def options(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prefix: Prefix, max_new_tokens: int | None
) -> dict[str, Any]:
    """How to answer when measuring: with the prefix's template, half as long again as the longest right answer."""
    if max_new_tokens is None:
        longest = max(len(tokenizer(text)["input_ids"]) for row in rows for text in row.answers)
        max_new_tokens = longest + longest // 2
    template = prefix.metadata.get("template", tokenizer.chat_template)
    return {"templates": [template] * len(rows), "max_new_tokens": max_new_tokens}


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prefixes: Sequence[Prefix | None],
    *,
    templates: Sequence[str | None] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    on_rows: Callable[[int], None] | None = None,
    **generation: Any,
) -> list[str]:
    """Each row's answer with its own prefix, or without one; one batch may hold rows of many prefixes.

    Args:
        templates: each row's chat template; by default that of its prefix, else the tokenizer's.
        max_new_tokens: where an answer is cut, by default at 256.
        generation: further options of `generate`, for example `do_sample=True, temperature=0.7`. Greedy by default.
    """
    if templates is None:
        own: Any = tokenizer.chat_template
        templates = [own if p is None else p.metadata.get("template", own) for p in prefixes]
    encoder: bool = model.config.is_encoder_decoder
    prompts = [prompt_ids(r, tokenizer, t, encoder) for r, t in zip(rows, templates, strict=True)]
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {"do_sample": False, "num_beams": 1} | generation
    # The checkpoint's own sampling settings do not apply to a measurement.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens or 256, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **options
    )
    answers = [""] * len(rows)
    # Rows of one prefix side by side, as they tend to end together; then by length, for little padding.
    first_seen = {id(prefix): i for i, prefix in reversed(list(enumerate(prefixes)))}
    order = sorted(range(len(rows)), key=lambda i: (first_seen[id(prefixes[i])], len(prompts[i])))
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        side = "right" if encoder else "left"  # an answer follows its prompt, but an encoder reads from the start
        own = [torch.tensor(prompts[i]) for i in chosen]
        ids = pad_sequence(own, True, pad, side).to(input_device(model))
        mask = pad_sequence([torch.ones_like(row) for row in own], True, 0, side).to(input_device(model))
        seen = [prefixes[i] for i in chosen]
        shared = seen[0] if seen[0] is not None and all(prefix is seen[0] for prefix in seen) else None
        with attach(model, shared or seen), torch.inference_mode():
            output = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        texts = tokenizer.batch_decode(output if encoder else output[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        if on_rows is not None:
            on_rows(len(chosen))
    return answers


def measure(answers: Sequence[str], rows: Sequence[Row], metrics: Sequence[str] = tuple(METRICS)) -> dict[str, float]:
    """Figures of the answers, each compared with all of its row's right answers: see `metrics.TEXT_METRICS`.

    Example:
        >>> from foreword.data import read_rows
        >>> rows, _ = read_rows([{"prompt": "?", "completion": "The cat sat down here."}])
        >>> measure(["the cat sat down here."], rows, ["bleu"])
        {'bleu': 100.0}
    """
    return text_figures(metrics, answers, [row.answers for row in rows])
