"""Tiny random models of four families, a byte-level tokenizer, and a few rows."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_ROTARY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_FAMILIES = {
    "gpt2": ("GPT2", {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama": ("Llama", _ROTARY),
    "qwen3": ("Qwen3", _ROTARY),
    "gemma3": (
        "Gemma3",
        _ROTARY | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
FAMILIES = list(_FAMILIES)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model in evaluation mode and float64, with weights large enough that attention matters."""
    name, fields = _FAMILIES[family]
    config_name = f"{name}TextConfig" if family == "gemma3" else f"{name}Config"
    model_name = f"{name}LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(
        **(fields | changes), bos_token_id=257, eos_token_id=258, pad_token_id=259
    )
    model = getattr(transformers, model_name)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


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


def gradients_of(module: nn.Module) -> list[Tensor]:
    """A copy of the gradient of each parameter; all have one."""
    gradients = [parameter.grad for parameter in module.parameters()]
    assert not any(gradient is None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


ROWS = [
    {"prompt": f"say {word} twice", "completion": f"{word} {word}"}
    for word in ["owl", "fox", "elk", "bee", "ant", "cat", "dog", "hen"] * 3
]
