"""PEFT's adapter folders, in and out: `PREFIX_TUNING` and `CARTRIDGE` (PEFT 0.21; any that has `prompt_embeddings`).

PEFT keeps a prefix in `past_key_values`, as one matrix `[P, L * 2 * G * D]` for L layers: of each layer the keys, after
rotary embedding, then the values. An MLP that trained it (`prefix_projection`) is folded when PEFT saves.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .composition import starts_with_sink
from .errors import EngineError, ModelMismatchError, PrefixFileError
from .initialization import random_prefix
from .prefix import Prefix, SiteTensors

__all__ = ["PeftType", "export_peft", "import_peft"]

PeftType = Literal["prefix_tuning", "cartridge"]
_CONFIG, _TENSORS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MATRIX, _TEMPLATE = "prompt_embeddings", "chat_template.jinja"
_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def export_peft(prefix: Prefix, folder: str | Path, peft_type: PeftType = "prefix_tuning") -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` loads. PEFT itself is not needed.

    The chat template goes beside it, as PEFT has no place for one; what else the prefix file says stays behind.

    Args:
        prefix: of a decoder.
        folder: where to; made if it does not exist.
        peft_type: `prefix_tuning`, which every PEFT knows, or `cartridge`, which can also keep the first token frozen when
            training goes on.

    Raises:
        EngineError: PEFT cannot hold the prefix, with the reasons: gates, cross or encoder attention, sliding windows,
            hybrid models, heads.
        PrefixFileError: the folder has an adapter already.

    Example:
        >>> export_peft(foreword.load("tickets.safetensors"), "tickets-peft")  # doctest: +SKIP
    """
    layers = prefix.cached_layers("PEFT")
    shapes = {tuple(tensor.shape) for entry in layers for tensor in entry[:2]}
    if len(shapes) > 1:
        raise EngineError(
            f"PEFT cannot hold this prefix: it has one shape for the keys and values of all layers, and these have "
            f"{', '.join(map(str, sorted(shapes)))}. Use it with foreword.attach."
        )
    folder = Path(folder)
    if (folder / _CONFIG).exists():
        raise PrefixFileError(f"{folder}: has a PEFT adapter already. Choose another folder, or delete it.")
    [(length, heads, dim)] = shapes
    config: dict[str, Any] = {
        "peft_type": peft_type.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": prefix.base.get("name"),
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(layers),
        "num_transformer_submodules": 1,
    }
    if peft_type == "cartridge":
        config["num_frozen_tokens"] = int(starts_with_sink(prefix))
    matrix = torch.stack([tensor.detach().cpu() for entry in layers for tensor in entry[:2]], 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({_MATRIX: matrix.flatten(1).contiguous()}, folder / _TENSORS, {"format": "pt"})
    if template := prefix.metadata.get("template"):
        (folder / _TEMPLATE).write_text(template, "utf-8")
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return folder


def import_peft(folder: str | Path, model: PreTrainedModel) -> Prefix:
    """The prefix of a PEFT adapter folder, which answers as PEFT does with it.

    Args:
        folder: what `PeftModel.save_pretrained` or `export_peft` wrote.
        model: the base model that the adapter was trained for. PEFT does not record which weights that were: whether it
            is the right one only the caller knows.

    Raises:
        PrefixFileError: no such adapter, or its tensors are damaged or do not fit its config.
        EngineError: it is of another kind, or Foreword would compute something else, with the reason.
        ModelMismatchError: the shapes of the adapter do not fit the model.

    Example:
        >>> prefix = import_peft("tickets-peft", model)  # doctest: +SKIP
    """
    folder = Path(folder)
    config, matrix = _read(folder)
    if config.get("num_transformer_submodules") == 2 or model.config.is_encoder_decoder:
        raise EngineError(
            f"{folder}: for an encoder-decoder. PEFT gives one prefix to two layers of the decoder at a time and none to "
            "the encoder; that is not imported. Train one: foreword train."
        )
    length = config.get("num_virtual_tokens")
    if matrix.dim() != 2 or len(matrix) != length:
        raise PrefixFileError(
            f"{folder}: {_MATRIX} has shape {tuple(matrix.shape)}, expected [{length}, ...] for the config's "
            f"{length} virtual tokens."
        )
    start = random_prefix(model, len(matrix))
    start.cached_layers(f"PEFT with {type(model).__name__}")  # what PEFT computes there is not what Foreword would
    site = start.sites[0]
    expected = (len(start.sites), 2, site.num_kv_heads, site.key_dim)
    if matrix.shape[1] != torch.Size(expected).numel():
        raise ModelMismatchError(
            f"{folder}: {matrix.shape[1]:,} numbers a virtual token, and {type(model).__name__} takes "
            f"{torch.Size(expected).numel():,}: {expected[0]} layers, keys and values, {expected[2]} heads of "
            f"{expected[3]}. Give the base that the adapter was trained for ({config.get('base_model_name_or_path')})."
        )
    tensors = [SiteTensors(pair[:, 0].clone(), pair[:, 1].clone()) for pair in matrix.view(-1, *expected).unbind(1)]
    about: dict[str, Any] = {"task": "completion", "peft": {k: v for k, v in config.items() if v is not None}}
    if (folder / _TEMPLATE).exists():
        about["template"] = (folder / _TEMPLATE).read_text("utf-8")
    return Prefix(start.sites, tensors, position_offset=start.position_offset, base=start.base, metadata=about)


def _read(folder: Path) -> tuple[dict[str, Any], Tensor]:
    """The adapter's config, and its matrix in float32 or better."""
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        if (folder / _TENSORS).exists():
            tensors = load_file(folder / _TENSORS)
        else:
            tensors = torch.load(folder / _PICKLED, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PrefixFileError(
            f"{folder}: no PEFT adapter: {Path(error.filename).name} is missing. Expected {_CONFIG} and {_TENSORS}."
        ) from None
    except (json.JSONDecodeError, SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise PrefixFileError(f"{folder}: damaged PEFT adapter: {error}. Copy it again.") from None
    if config.get("peft_type") not in _TYPES:
        raise EngineError(
            f"{folder}: an adapter of type {config.get('peft_type')}. What can be imported holds keys and values: "
            f"{', '.join(_TYPES)}."
        )
    matrix = tensors.pop(_MATRIX, None)
    if tensors or matrix is None:
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise EngineError(
            f"{folder}: expected the one tensor {_MATRIX}, got {found} beside it. Heads that PEFT trained with the prefix "
            "are not imported; an MLP is folded by PEFT's own save_pretrained."
        )
    if bad := int((~torch.isfinite(matrix)).sum()):
        raise PrefixFileError(f"{folder}: {bad} of {matrix.numel()} numbers of {_MATRIX} are NaN or infinite.")
    return config, matrix.to(torch.promote_types(torch.float32, matrix.dtype))
