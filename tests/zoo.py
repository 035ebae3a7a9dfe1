"""Tiny random models of every family that is tested, made from configs, and inputs for them."""

from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor

Kind = Literal["decoder", "hybrid", "encoder", "encoder-decoder", "speech", "vision", "contrastive"]


class Family(NamedTuple):
    title: str
    kind: Kind
    stem: str  # of the names of its classes
    fields: dict[str, Any]
    config: str | None = None  # where it is not the stem and "Config"


_IDS = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 259}
_LOW = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
_HIDDEN = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_ROTARY = _HIDDEN | _IDS | {"vocab_size": 260, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}
_TOWER = _HIDDEN | {"num_hidden_layers": 2}
_TEXT = _TOWER | _LOW | {"vocab_size": 260, "max_position_embeddings": 128}
_IMAGE = _TOWER | {"image_size": 8, "patch_size": 4}
_MOE = _ROTARY | {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
           "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
           "num_experts_per_tok": 2, "first_k_dense_replace": 1}  # fmt: skip
_LINEAR = {f"linear_{name}": 2 if "num" in name else 8 for name in
           ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
_SLIDING = {"sliding_window": 24}
_PAIR = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 260, "decoder_start_token_id": 2,
         "forced_eos_token_id": None} | _LOW  # fmt: skip
_BART = _PAIR | {"max_position_embeddings": 128}
_T5 = {"vocab_size": 260, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 1,
       "eos_token_id": 3, "decoder_start_token_id": 2}  # fmt: skip
_SOUND = _PAIR | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40, "suppress_tokens": None,
                  "begin_suppress_tokens": None}  # fmt: skip

ZOO: dict[str, Family] = {
    "gpt2": Family("GPT-2", "decoder", "GPT2", _IDS | {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4,
                   "n_positions": 256}),
    "opt": Family("OPT", "decoder", "OPT", _IDS | {"vocab_size": 260, "hidden_size": 32, "ffn_dim": 48,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
                  "max_position_embeddings": 256}),
    "gpt_neox": Family("GPT-NeoX", "decoder", "GPTNeoX", _ROTARY),
    "llama": Family("Llama", "decoder", "Llama", _ROTARY),
    "mistral": Family("Mistral", "decoder", "Mistral", _ROTARY | _SLIDING),
    "mixtral": Family("Mixtral", "decoder", "Mixtral", _ROTARY | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": Family("Qwen2", "decoder", "Qwen2", _ROTARY),
    "qwen3": Family("Qwen3", "decoder", "Qwen3", _ROTARY),
    "qwen3_moe": Family("Qwen3-MoE", "decoder", "Qwen3Moe", _MOE | {"num_experts": 2}),
    "phi3": Family("Phi-3", "decoder", "Phi3", _ROTARY),
    "gemma2": Family("Gemma 2", "decoder", "Gemma2", _ROTARY | _SLIDING | {"query_pre_attn_scalar": 8}),
    "gemma3": Family("Gemma 3", "decoder", "Gemma3", _ROTARY | _SLIDING | {"layer_types": ["sliding_attention",
                     "full_attention", "sliding_attention"]}, "Gemma3TextConfig"),
    "gpt_oss": Family("GPT-OSS", "decoder", "GptOss", _ROTARY | _SLIDING | {"num_local_experts": 2,
                      "num_experts_per_tok": 1}),
    "olmo2": Family("OLMo 2", "decoder", "Olmo2", _ROTARY),
    "granite": Family("Granite", "decoder", "Granite", _ROTARY),
    "starcoder2": Family("StarCoder 2", "decoder", "Starcoder2", _ROTARY | {"num_key_value_heads": 1}),
    "deepseek_v3": Family("DeepSeek-V3", "decoder", "DeepseekV3", _MOE | _LATENT),
    "roberta_decoder": Family("RoBERTa as decoder", "decoder", "Roberta", _TEXT | {"is_decoder": True,
                              "max_position_embeddings": 400}),
    "qwen3_next": Family("Qwen3-Next", "hybrid", "Qwen3Next", _MOE | _LINEAR | {"num_experts": 2,
                         "shared_expert_intermediate_size": 16,
                         "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "lfm2": Family("LFM2", "hybrid", "Lfm2", _ROTARY | {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": Family("Falcon-H1", "hybrid", "FalconH1", _ROTARY | {"mamba_d_ssm": 32, "mamba_n_heads": 4,
                        "mamba_d_head": 8, "mamba_d_state": 8}),
    "bert": Family("BERT", "encoder", "Bert", _TEXT),
    "roberta": Family("RoBERTa", "encoder", "Roberta", _TEXT),
    "distilbert": Family("DistilBERT", "encoder", "DistilBert", {"dim": 32, "hidden_dim": 48, "n_layers": 2,
                         "n_heads": 4, "vocab_size": 260, "max_position_embeddings": 128, "pad_token_id": 1}),
    "modernbert": Family("ModernBERT", "encoder", "ModernBert", _TEXT | {"local_attention": 8, "cls_token_id": 2,
                         "sep_token_id": 3}),
    "electra": Family("ELECTRA", "encoder", "Electra", _TEXT | {"embedding_size": 32}),
    "t5": Family("T5", "encoder-decoder", "T5", _T5),
    "t5_wide": Family("T5, d_kv != d_model / heads", "encoder-decoder", "T5", _T5 | {"d_kv": 12,
                      "feed_forward_proj": "gated-gelu"}),
    "bart": Family("BART", "encoder-decoder", "Bart", _BART),
    "marian": Family("Marian", "encoder-decoder", "Marian", _BART),
    "whisper": Family("Whisper", "speech", "Whisper", _SOUND),
    "vit": Family("ViT", "vision", "ViT", _IMAGE),
    "clip": Family("CLIP", "contrastive", "CLIP", {"text_config": _TEXT, "vision_config": _IMAGE,
                   "projection_dim": 16}),
}  # fmt: skip
# These no line of the package was written for, and none is tried while it changes: they stand for families to come.
KEPT_OUT: dict[str, Family] = {
    "cohere2": Family("Cohere 2", "decoder", "Cohere2", _ROTARY | _SLIDING | {"layer_types": ["sliding_attention",
                      "full_attention", "sliding_attention"]}),
    "glm4": Family("GLM-4", "decoder", "Glm4", _ROTARY),
    "pegasus": Family("Pegasus", "encoder-decoder", "Pegasus", _BART),
}  # fmt: skip

FAMILIES = ["gpt2", "llama", "qwen3", "gemma3"]  # decoders that differ most: learned positions, grouped heads, windows
USUAL = [
    *FAMILIES,
    "mixtral",
    "deepseek_v3",
    "lfm2",
    "bert",
    "modernbert",
    "t5",
    "bart",
    "whisper",
    "vit",
]  # run each time
ENCODERS = [name for name, family in ZOO.items() if family.kind == "encoder"]
_HEADS: dict[Kind, str] = {
    "decoder": "ForCausalLM",
    "hybrid": "ForCausalLM",
    "encoder": "Model",
    "encoder-decoder": "ForConditionalGeneration",
    "speech": "ForConditionalGeneration",
    "vision": "ForImageClassification",
    "contrastive": "Model",
}
_NAMED = {"gpt2": "LMHeadModel", "marian": "MTModel"}


def named(*kinds: Kind) -> list[str]:
    """The families of these kinds; all without one."""
    return [name for name, family in (ZOO | KEPT_OUT).items() if not kinds or family.kind in kinds]


def make_model(name: str, seed: int = 0, head: str | None = None, **changes: object) -> Any:
    """A tiny random model in evaluation mode and float64, with weights large enough that attention matters.

    `head`: how its class is named after the family; by default one that generates, or that suits its kind.
    """
    family = (ZOO | KEPT_OUT)[name]
    torch.manual_seed(seed)
    config = getattr(transformers, family.config or f"{family.stem}Config")(**(family.fields | changes))
    cls = getattr(transformers, family.stem + (head or _NAMED.get(name) or _HEADS[family.kind]))
    model = cls(config).double().eval()
    if "experts" in str(config):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    larger = {"T5": 1, "Bart": 2, "Marian": 2, "Pegasus": 2, "Whisper": 2}.get(family.stem, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.requires_grad:
                parameter.mul_(larger)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(model: Any, rows: int, length: int = 9) -> dict[str, Tensor]:
    """Different rows of what the model reads, and what its decoder has said so far."""
    generator = torch.Generator().manual_seed(1)
    ids = tokens(rows, length) % 200 + 10
    config, given = model.config, {}
    if model.main_input_name == "pixel_values" or hasattr(config, "vision_config"):
        given["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator).to(model.dtype)
    if model.main_input_name == "input_features":
        given["input_features"] = torch.randn(rows, 8, 24, generator=generator).to(model.dtype)
    if model.main_input_name == "input_ids":
        given["input_ids"] = ids
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(rows, 6, seed=1) % 200 + 10
    return given


def said(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Everything the model says about each row, side by side."""
    output = model(**inputs)
    if hasattr(output, "image_embeds"):
        return torch.cat([output.image_embeds, output.text_embeds], 1)
    return output[0]


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in inputs.items()}
