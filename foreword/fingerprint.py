"""What makes a base model this model and no other: its architecture fields and a digest of sampled weights."""

import hashlib
from math import isclose, isfinite, prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import nn

from .errors import ModelMismatchError
from .heads import LENT, head_names, own_parameters

__all__ = [
    "check_fingerprint",
    "checkpoint_fingerprint",
    "compare_fingerprints",
    "digest",
    "fingerprint",
    "remember_fingerprint",
]

_PARAMETERS, _VALUES, _MATCH = 32, 8, 0.9
_VOLATILE = {  # fields that say how a model is run or stored, not what it computes
    "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "id2label", "is_llama_config",
    "label2id", "name_or_path", "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "rope_interleaved", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

_remembered: "WeakKeyDictionary[nn.Module, dict[str, Any]]" = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Architecture fields of the model's config, and a few hundred of its weights rounded to bfloat16.

    Weights that are quantized, sharded or not in memory are left out, and so are the matrices of a model that was dequantized
    while it was loaded, as from GGUF. So the sample survives a change of precision; a fine-tuned copy of the model does
    not match.

    The head is left out: a task's is random at each load. So a base matches itself loaded with any auto class that names
    its weights alike. All classes with a head do in most families (`bert.encoder...` for each task), but not a bare
    `AutoModel` (`encoder...`), and few classes keep their base under another name, such as `LlamaForQuestionAnswering`.
    """
    if model in _remembered:
        return _remembered[model]
    config: Any = model.config
    return {"architecture": _architecture(config.to_dict()), "weights": _sample(model)}


def remember_fingerprint(model: nn.Module) -> None:
    """Take the model's fingerprint now, before its weights go where they cannot be read."""
    _remembered[model] = fingerprint(model)


def _architecture(value: Any) -> Any:
    """What of a config says how the model is built, as JSON holds it: the configs inside it too."""
    if isinstance(value, dict):
        return {
            str(key): _architecture(inner)
            for key, inner in value.items()
            if not str(key).endswith("_token_id") and str(key).lstrip("_") not in _VOLATILE and inner is not None
        }
    if isinstance(value, (list, tuple)):
        return [_architecture(inner) for inner in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def checkpoint_fingerprint(config: Any, folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """As `fingerprint`, of a model that another engine runs: from its config and the safetensors files in its folder.

    Only the weights that `expected` has are looked up; those of files in other formats are left out.
    """
    sample = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in expected["weights"].keys() & set(file.keys()):
                rows = file.get_slice(name)
                width = prod(rows.get_shape()[1:])
                index = [i * width * rows.get_shape()[0] // _VALUES for i in range(_VALUES)]
                values = torch.stack([rows[i // width : i // width + 1].reshape(-1)[i % width] for i in index])
                sample[name] = values.to(torch.bfloat16).view(torch.int16).tolist()
    return {"architecture": _architecture(config.to_dict()), "weights": sample}


def check_fingerprint(expected: dict[str, Any], model: nn.Module, name: str) -> None:
    """Raise `ModelMismatchError` that names what differs, when `expected` was taken from another model."""
    compare_fingerprints(expected, fingerprint(model), name)


def compare_fingerprints(expected: dict[str, Any], found: dict[str, Any], name: str) -> None:
    """As `check_fingerprint`, for a model's fingerprint."""
    old, new = expected["architecture"], found["architecture"]
    different = {key for key in old.keys() & new.keys() if not _same(old[key], new[key])}
    if different:
        lines = "; ".join(f"{key}: prefix {old[key]!r}, model {new[key]!r}" for key in sorted(different))
        raise ModelMismatchError(
            f"The prefix was trained for {name}, this model is built differently: {lines}. Load the base it was trained on."
        )
    pairs = [
        (a, b)
        for parameter, values in expected["weights"].items()
        for a, b in zip(values, found["weights"].get(parameter, ()), strict=False)
    ]
    equal = sum(a == b for a, b in pairs)
    if pairs and equal < _MATCH * len(pairs):
        raise ModelMismatchError(
            f"The prefix was trained for {name}; this model has the same architecture but other weights "
            f"({equal} of {len(pairs)} sampled weights agree). Load the base it was trained on."
        )


def _same(old: Any, new: Any) -> bool:
    """Whether two fields say the same; GGUF keeps numbers in float32."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, float) and isinstance(new, float):
        return isclose(old, new, rel_tol=1e-6)
    return old == new


def digest(model: nn.Module) -> str:
    """SHA-256 over the bytes of every weight of the model."""
    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(f"{LENT}."):
            continue
        sha.update(name.encode())
        sha.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _sample(model: nn.Module) -> dict[str, list[int]]:
    """Per parameter name, some of its values as the bits of a bfloat16."""
    head, config = set(head_names(model)), getattr(model, "config", None)
    own = [(name, parameter) for name, parameter in own_parameters(model) if name not in head]
    # A quantized or a sharded weight is of another class.
    plain = [(n, p) for n, p in own if type(p) in (nn.Parameter, torch.Tensor) and p.is_floating_point()]
    if getattr(config, "quantization_config", None) is not None and len(plain) == len(own):  # dequantized
        plain = [(name, parameter) for name, parameter in plain if parameter.dim() < 2]
    named = sorted((name, parameter) for name, parameter in plain if not parameter.is_meta)
    chosen = named[:: max(1, len(named) // _PARAMETERS)][:_PARAMETERS]
    sample = {}
    for name, parameter in chosen:
        flat = parameter.detach().reshape(-1)
        index = torch.arange(_VALUES, device=flat.device) * len(flat) // _VALUES
        sample[name] = flat[index].to("cpu", torch.bfloat16).view(torch.int16).tolist()
    return sample
