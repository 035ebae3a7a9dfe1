"""Byte-level tokenizers, a few rows, and what differs between versions of Transformers."""

import inspect
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte between the special tokens of an encoder, with a token between two texts and types for each."""
    special = {"<unk>": 0, "<pad>": 1, "<cls>": 2, "<sep>": 3}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(special | {byte: i + 4 for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 2), ("<sep>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<cls>",
        sep_token="<sep>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    wrapped.chat_template = template
    return wrapped


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor held that was made inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def gradients_of(module: nn.Module) -> list[Tensor]:
    """A copy of the gradient of each parameter; all have one."""
    gradients = [parameter.grad for parameter in module.parameters()]
    assert not any(gradient is None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


_WORDS = ["owl", "fox", "elk", "bee", "ant", "cat", "dog", "hen"]
HEAD_ROWS: dict[str, list[dict[str, Any]]] = {  # rows of the tasks with a head, of several lengths
    "classification": [
        {"text": f"{'so ' * (i % 3)}{word} {mood}", "label": label}
        for i, word in enumerate(_WORDS)
        for mood, label in (("hahahaha", "good"), ("oh no", "bad"))
    ],
    "token_classification": [
        {"tokens": [*["so"] * (i % 3), "see", word, word], "labels": [*["O"] * (i % 3), "O", "B-PET", "I-PET"]}
        for i, word in enumerate(_WORDS)
    ],
    "question_answering": [
        {"question": "who?", "context": f"{'so ' * (i % 3)}the {word} ran by", "answer": word}
        for i, word in enumerate(_WORDS)
    ],
}

ROWS = [
    {"prompt": f"say {word} twice", "completion": f"{word} {word}"}
    for word in ["owl", "fox", "elk", "bee", "ant", "cat", "dog", "hen"] * 3
]


# Transformers 5.24 gave a few things new names, and warns of the old ones.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def cache_of(output: Any) -> dict[str, Any]:
    """The cache that a forward or `generate` returned, as an argument for the next."""
    return {CACHE: output[CACHE]}


def checkpoint_activations(model: Any, *, reentrant: bool) -> None:
    """Switch on checkpointing of either kind."""
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
