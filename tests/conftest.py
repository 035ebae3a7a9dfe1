"""Tiny random models of four families, a byte-level tokenizer, and shapes enforced in every annotated function."""

from jaxtyping import install_import_hook

install_import_hook("foreword", "beartype.beartype")

import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
transformers.logging.disable_progress_bar()

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


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


ROWS = [
    {"prompt": f"say {word} twice", "completion": f"{word} {word}"}
    for word in ["owl", "fox", "elk", "bee", "ant", "cat", "dog", "hen"] * 3
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer, to be loaded by name."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama").float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
