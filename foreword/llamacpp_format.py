"""llama.cpp's sequence-state files (`ggsq`), which llama-server restores into a slot: `POST /slots/0?action=restore`.

Nothing about a build is looked up. A *sample*, a state file that the build itself saved after it had read a text, shows the file's
version, whether values lie transposed (without flash attention), and the number formats. The base model in Transformers
reads the same tokens, and the two must have the same keys and values: that tells how the heads' dimensions are ordered for
rotary embedding, and that it is the same base at all.

Little-endian: u32 magic, u32 version, u32 count, i32 tokens; u32 streams, and for each u32 cells; per cell i32 position,
u32 1, i32 sequence; u32 transposed, u32 layers, in version 4 two u32 zeros; then the keys of each layer and the values of
each layer: i32 type, u64 bytes a row, rows; or, transposed, i32 type, u32 bytes a number, u32 rows, rows. L layers, P virtual
tokens, S tokens of the sample, G key/value heads, D head dim.
"""

import hashlib
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import EngineError, ModelMismatchError, PrefixFileError
from .fingerprint import check_fingerprint
from .initialization import text_prefix
from .prefix import Prefix

__all__ = ["LlamaCppExport", "check_used", "export_llamacpp", "placeholders"]

_MAGIC = 0x67677371
_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's numbers
_FIELDS_AFTER_LAYERS = {3: 0, 4: 2}  # by version; zeros as far as they are known
_PACKED = -1  # llama-server puts a header before its tokens: this, a version, their number; and a count of media behind
_SAMPLE_TOKENS = 16
_SAME, _OTHER_ORDER = 0.35, 0.7  # relative error: a quantized base stays well below, another base or order well above


class LlamaCppExport(NamedTuple):
    """What was written, and what a request has to begin with to use it."""

    path: Path
    placeholders: list[int]  # P token ids that stand for the prefix, before the real ones
    version: int
    precision: str
    difference: float  # how far the build's keys and values are from the base's, on the sample: 0.01 is one percent


@dataclass(frozen=True)
class _Layout:
    version: int
    streams: int
    transposed: bool
    key_types: list[int]
    value_types: list[int]


class _Sample(NamedTuple):
    layout: _Layout
    tokens: list[int]
    keys: list[Tensor]  # of each layer [S, G * D]
    values: list[Tensor]


def export_llamacpp(prefix: Prefix, path: str | Path, sample: str | Path, model: PreTrainedModel) -> LlamaCppExport:
    """Write a state file that llama.cpp restores as if it had read the prefix.

    Args:
        prefix: of a decoder.
        path: the file to write.
        sample: a state that the target build saved, with the same GGUF file and options, after reading 16 tokens or
            more of any text: `POST /slots/0?action=save`, or `llama_state_seq_save_file`.
        model: the base in Transformers.

    Raises:
        EngineError: llama.cpp cannot hold the prefix, or the build keeps its cache in a way that no prefix can be
            written into: quantized, with sliding windows, with positions of several dimensions (M-RoPE), of an unknown version.
        ModelMismatchError: the prefix was made for another base, or the build runs another one.
        PrefixFileError: the sample is damaged.

    Example:
        >>> export_llamacpp(prefix, "slots/tickets.bin", "slots/sample.bin", model)  # doctest: +SKIP
    """
    layers = prefix.cached_layers("llama.cpp")
    if "fingerprint" in prefix.base:
        check_fingerprint(prefix.base["fingerprint"], model, prefix.base.get("name", "another model"))
    seen = _read(Path(sample))
    own = text_prefix(model, seen.tokens[: len(seen.keys[0])])
    order, difference = _compare(seen, own)
    ids = placeholders(prefix)
    keys = [order(entry.key.detach().float().cpu()).flatten(1) for entry in layers]
    values = [entry.value.detach().float().cpu().flatten(1) for entry in layers]
    path = Path(path)
    path.write_bytes(_written(seen.layout, ids, keys, values))
    precision = str(_TYPES[seen.layout.key_types[0]]).removeprefix("torch.")
    return LlamaCppExport(path, ids, seen.layout.version, precision, difference)


def placeholders(prefix: Prefix) -> list[int]:
    """P token ids that stand for the prefix in a request: others for each content, so that none is taken for another.

    llama.cpp knows what a slot holds by its token ids alone.
    """
    content = hashlib.sha256()
    for tensor in prefix.parameters():
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    vocabulary: Any = prefix.base.get("fingerprint", {}).get("architecture", {}).get("vocab_size", 256)
    return random.Random(content.digest()).choices(range(vocabulary), k=prefix.num_virtual_tokens)


def check_used(reply: dict[str, Any], placeholders: Sequence[int]) -> None:
    """Raise an `EngineError` unless llama-server's reply to `/completion` says that it used the restored prefix.

    To be called on every reply: llama-server answers a request whose slot was cleared meanwhile all the same, with status
    200, after reading the placeholders as if they were text.

    Args:
        reply: the JSON of the reply; the last one of a stream.
        placeholders: as `export_llamacpp` returned them. The request's `prompt` began with them.
    """
    if "timings" not in reply:
        raise EngineError(f"llama-server gave no answer with timings, but {reply}.")
    kept = reply["timings"].get("cache_n", 0)
    if kept < len(placeholders):
        raise EngineError(
            f"llama-server did not use the prefix: {kept} tokens of its cache were kept, {len(placeholders)} hold the prefix. Its "
            "slot was cleared or taken over. Start the server with --no-cache-idle-slots, restore the slot again, and name "
            "it in each request (id_slot, cache_prompt: true)."
        )


# ------------------------------------------------------------------------------------------------- reading a sample


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.content, self.at = path, path.read_bytes(), 0

    def numbers(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + form)
        return struct.unpack("<" + form, self.bytes(size))

    def bytes(self, size: int) -> bytes:
        part = self.content[self.at : self.at + size]
        if size < 0 or len(part) < size:
            raise PrefixFileError(f"{self.path}: ends after {len(self.content):,} bytes, in the middle. Save it again.")
        self.at += size
        return part

    def rows(self, number: int, kind: int, what: str) -> Tensor:
        """`number` rows of equal length, the bytes of a row told in the file."""
        [size] = self.numbers("Q")
        return torch.frombuffer(bytearray(self.bytes(number * size)), dtype=self.type(kind, what)).view(number, -1)

    def type(self, kind: int, what: str) -> torch.dtype:
        if kind not in _TYPES:
            raise EngineError(
                f"{self.path}: llama.cpp keeps its {what} quantized (ggml type {kind}), which would round the prefix. Start it "
                "with --cache-type-k f16 --cache-type-v f16, or f32."
            )
        return _TYPES[kind]


def _read(path: Path) -> _Sample:
    if not path.is_file():
        raise PrefixFileError(f"{path}: no such file. Expected a state that llama.cpp saved.")
    file = _Reader(path)
    if len(file.content) < 12 or file.numbers("I")[0] != _MAGIC:
        raise PrefixFileError(f"{path}: not a sequence state of llama.cpp, which begins with 'qsgg'.")
    version, count = file.numbers("II")
    if version not in _FIELDS_AFTER_LAYERS:
        raise EngineError(
            f"{path}: sequence state of version {version}; this Foreword writes {' and '.join(map(str, _FIELDS_AFTER_LAYERS))}. "
            "Update Foreword, or take another build of llama.cpp."
        )
    tokens = list(file.numbers(f"{count}i"))
    if tokens[:1] == [_PACKED]:
        tokens = tokens[3 : 3 + tokens[2]]
    [streams] = file.numbers("I")
    sizes = []
    for _ in range(min(streams, 4096)):
        sizes += file.numbers("I")
        if sizes[-1]:
            break  # those behind it are empty, as one sequence lies in one stream
    cells = max(sizes, default=0)
    if cells < _SAMPLE_TOKENS or cells > len(tokens):
        raise EngineError(
            f"{path}: holds {cells} tokens. Expected a state saved after {_SAMPLE_TOKENS} tokens or more."
        )
    places = [file.numbers("iIi")[:2] for _ in range(cells)]
    if places != [(position, 1) for position in range(cells)]:
        raise EngineError(
            f"{path}: its cells do not hold the positions 0 to {cells - 1}, one after the other. The model's positions have "
            "several dimensions (M-RoPE), or a part of its cache slid away: no prefix can be written into it."
        )
    transposed, layers, *more = file.numbers("II" + "I" * _FIELDS_AFTER_LAYERS[version])
    if any(more) or transposed > 1 or not 0 < layers < 4096:
        raise EngineError(f"{path}: a layout of version {version} that this Foreword does not know ({more}).")
    kinds: tuple[list[int], list[int]] = ([], [])
    keys, values = [], []
    for _ in range(layers):
        kinds[0].extend(file.numbers("i"))
        keys.append(file.rows(cells, kinds[0][-1], "keys"))
    for _ in range(layers):
        kinds[1].extend(file.numbers("i"))
        if transposed:
            kind = file.type(kinds[1][-1], "values")
            size, width = file.numbers("II")
            content = torch.frombuffer(bytearray(file.bytes(size * width * cells)), dtype=kind)
            values.append(content.view(width, cells).transpose(0, 1))
        else:
            values.append(file.rows(cells, kinds[1][-1], "values"))
    if any(file.content[file.at :]):  # but for empty streams
        raise EngineError(
            f"{path}: {len(file.content) - file.at:,} bytes follow the keys and values. The model keeps a second cache (sliding "
            "windows, recurrent layers), into which no prefix can be written. Use it with foreword.attach."
        )
    return _Sample(_Layout(version, streams, bool(transposed), *kinds), tokens, keys, values)


# ------------------------------------------------------------------------------------------- comparing with the base

_Order = Callable[[Tensor], Tensor]


def _halves(heads: Tensor) -> Tensor:
    """As in Transformers: the dimensions `i` and `i + D/2` turn together."""
    return heads


def _interleaved(heads: Tensor) -> Tensor:
    """The dimensions `2i` and `2i + 1` turn together, as llama.cpp's converter orders the weights of Llama."""
    return heads.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _compare(seen: _Sample, own: Prefix) -> tuple[_Order, float]:
    """How the build orders the dimensions of its keys, and how far its keys and values are from the base's."""
    theirs = [(key.float(), value.float()) for key, value in zip(seen.keys, seen.values, strict=True)]
    ours = [(entry.key.detach().float(), entry.value.detach().float()) for entry in own.tensors()]
    shapes = [[tuple(t.flatten(1).shape) for pair in pairs for t in pair] for pairs in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ModelMismatchError(
            f"The sample has keys and values of {len(theirs)} layers, {shapes[0][0]} in the first, and the base "
            f"{len(ours)} layers, {shapes[1][0]} in the first. Take a sample of the base that the prefix was trained on."
        )
    errors = {
        order: _error([(theirs[i][0], order(ours[i][0]).flatten(1)) for i in range(len(ours))])
        for order in (_halves, _interleaved)
    }
    order = min(errors, key=lambda candidate: errors[candidate])
    of_values = _error([(theirs[i][1], ours[i][1].flatten(1)) for i in range(len(ours))])
    if max(errors[order], of_values) > _SAME or max(errors.values()) < _OTHER_ORDER:
        told = ", ".join(f"{error:.0%}" for error in errors.values())
        raise ModelMismatchError(
            f"The build's keys and values for the sample are not those of the base: they differ by {told} (keys, in the two "
            f"known orders of dimensions) and {of_values:.0%} (values). It runs another model, scales its rotary embedding "
            "otherwise, or orders dimensions in a way that is not known. Take a sample of the base that the prefix was trained on."
        )
    return order, max(errors[order], of_values)


def _error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The middle of the layers' relative errors."""
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(errors.median())


# ---------------------------------------------------------------------------------------------------------- writing


def _written(layout: _Layout, ids: list[int], keys: list[Tensor], values: list[Tensor]) -> bytes:
    length = len(ids)
    parts = [struct.pack(f"<III{length}i", _MAGIC, layout.version, length, *ids), struct.pack("<I", layout.streams)]
    parts += [struct.pack("<I", length), *(struct.pack("<iIi", i, 1, 0) for i in range(length))]
    more = [0] * _FIELDS_AFTER_LAYERS[layout.version]
    parts.append(struct.pack(f"<II{len(more)}I", int(layout.transposed), len(keys), *more))
    for kind, tensor in zip(layout.key_types, keys, strict=True):
        content = _bytes(tensor, kind)
        parts += [struct.pack("<iQ", kind, len(content) // length), content]
    for kind, tensor in zip(layout.value_types, values, strict=True):
        if layout.transposed:
            width = tensor.shape[1]
            parts += [struct.pack("<iII", kind, _TYPES[kind].itemsize, width), _bytes(tensor.transpose(0, 1), kind)]
        else:
            content = _bytes(tensor, kind)
            parts += [struct.pack("<iQ", kind, len(content) // length), content]
    parts.append(struct.pack("<I", 0) * (layout.streams - 1))
    return b"".join(parts)


def _bytes(tensor: Tensor, kind: int) -> bytes:
    rounded = tensor.to(_TYPES[kind])
    if not torch.isfinite(rounded).all():
        raise EngineError(
            f"The prefix has numbers up to {tensor.abs().max():.3g}, more than {_TYPES[kind]} holds. Start llama.cpp with "
            "--cache-type-k f32 --cache-type-v f32, and take the sample again."
        )
    return rounded.contiguous().view(torch.uint8).numpy().tobytes()
