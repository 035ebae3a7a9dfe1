"""Tiny random models of many families, a byte-level tokenizer, and a few rows."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

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
_MOE = _ROTARY | {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_LINEAR = {f"linear_{name}": 2 if "num" in name else 8 for name in
           ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
_FURTHER = {
    "opt": ("OPT", {"vocab_size": 260, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 256}),
    "gpt_neox": ("GPTNeoX", _ROTARY),
    "mistral": ("Mistral", _ROTARY | {"sliding_window": 24}),
    "mixtral": ("Mixtral", _ROTARY | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": ("Qwen2", _ROTARY),
    "qwen3_moe": ("Qwen3Moe", _MOE | {"num_experts": 2}),
    "phi3": ("Phi3", _ROTARY),
    "gemma2": ("Gemma2", _ROTARY | {"sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOss", _ROTARY | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 24}),
    "olmo2": ("Olmo2", _ROTARY),
    "granite": ("Granite", _ROTARY),
    "starcoder2": ("Starcoder2", _ROTARY),
    "deepseek_v3": ("DeepseekV3", _MOE | _LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                                                    "num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "roberta": ("Roberta", {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "max_position_embeddings": 400, "is_decoder": True}),
}  # fmt: skip
_HYBRIDS = {  # the layers without attention, by name
    "qwen3_next": ("Qwen3Next", _MOE | _LINEAR | {"num_experts": 2, "shared_expert_intermediate_size": 16,
                   "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "lfm2": ("Lfm2", _ROTARY | {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": ("FalconH1", _ROTARY | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
}  # fmt: skip
ENCODERS = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "ModernBert": {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
    "Electra": {"embedding_size": 32},
}
FAMILIES, FURTHER, HYBRIDS = list(_FAMILIES), list(_FURTHER), list(_HYBRIDS)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(family: str, seed: int = 0, head: str | None = None, **changes: object) -> Any:
    """A tiny random model in evaluation mode and float64, with weights large enough that attention matters.

    `head`: how its class is named after the family; by default one with a language-model head.
    """
    name, fields = (_FAMILIES | _FURTHER | _HYBRIDS)[family]
    config_name = f"{name}TextConfig" if family == "gemma3" else f"{name}Config"
    model_name = name + (head or ("LMHeadModel" if family == "gpt2" else "ForCausalLM"))
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(
        **(fields | changes), bos_token_id=257, eos_token_id=258, pad_token_id=259
    )
    model = getattr(transformers, model_name)(config).double().eval()
    if "experts" in str(config):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def make_encoder(family: str, head: str = "Model", seed: int = 0, **changes: object) -> Any:
    """A tiny random encoder, as `make_model` makes decoders."""
    fields = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if family == "DistilBert":
        fields = {name: fields[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(fields | ENCODERS[family] | changes))
    model = getattr(transformers, family + head)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


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


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


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
