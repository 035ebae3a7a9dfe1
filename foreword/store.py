"""The file format: one safetensors file a prefix, everything about it as JSON in its header.

Tensors: `{site number}.key` `[P, G, D]`, `{site number}.value` `[P, G, E]`, where there are gates
`{site number}.gate` `[P, G]`, and where there is a trained head `head.{name in the model's state dict}`. The header's `foreword` entry: format version, base name and fingerprint, sites, position
offset, and the prefix's metadata (task, labels, chat template, demonstrations, how it was trained).
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import ConfigError, PrefixFileError
from .hub import FILE, local_file, parse, upload
from .prefix import AttentionSite, Prefix, SiteTensors

__all__ = [
    "FORMAT_VERSION",
    "PrefixStore",
    "check_place",
    "check_writable",
    "load",
    "load_bytes",
    "read_header",
    "save",
    "to_content",
]

FORMAT_VERSION = 1
_ENTRY = "foreword"
_SUFFIX, _HEAD = ".safetensors", "head."
_FIELDS = {"base": dict, "virtual_tokens": int, "position_offset": int, "sites": list, "metadata": dict}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DAMAGED = (
    "{}: not a whole safetensors file ({:,} bytes; {}). It was truncated, or is something else. Copy or train it again."
)


def save(prefix: Prefix, path: str | Path) -> Path:
    """Write a prefix to `path`: whole, or not at all.

    Args:
        prefix: what to write.
        path: a file named `*.safetensors`; or the string `hf://user/name`, which uploads the prefix alone to the Hugging Face
            Hub. `foreword push` uploads it with a model card.

    Raises:
        ConfigError: the name does not end in `.safetensors`.
        PrefixFileError: the prefix holds NaN or infinity; nothing is written.
        HubError: the Hub refuses, or cannot be reached.

    Example:
        >>> import foreword
        >>> foreword.save(prefix, "tickets.safetensors")  # doctest: +SKIP
    """
    if (
        isinstance(path, str) and (reference := parse(path)) is not None
    ):  # only ever asked for by a user, in so many words
        if reference.revision is not None:
            raise ConfigError(
                f"{path}: a prefix is uploaded to the main revision. Leave the @{reference.revision} out."
            )
        upload(reference.repo, {FILE: to_content(prefix, path)}, "Prefix")
        return Path(path)
    path = check_writable(path)
    content = to_content(prefix, path)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def to_content(prefix: Prefix, path: str | Path) -> bytes:
    """What the file of a prefix holds. `path` is what errors call it.

    Raises:
        PrefixFileError: the prefix holds NaN or infinity.
    """
    tensors = {
        f"{i}.{name}": tensor.detach().cpu().contiguous()
        for i, site in enumerate(prefix.tensors())
        for name, tensor in site._asdict().items()
        if tensor is not None
    }
    tensors |= {_HEAD + name: tensor.detach().cpu().contiguous() for name, tensor in (prefix.head or {}).items()}
    _check_finite(tensors, path)
    header = {
        "version": FORMAT_VERSION,
        "base": prefix.base,
        "virtual_tokens": prefix.num_virtual_tokens,
        "position_offset": prefix.position_offset,
        "sites": [asdict(site) for site in prefix.sites],
        "metadata": prefix.metadata,
    }
    return to_bytes(tensors, {_ENTRY: json.dumps(header, allow_nan=False)})  # one entry: the order of several is random


def check_writable(path: str | Path) -> Path:
    """The path, if a prefix can be written there; better asked before training than after.

    Raises:
        ConfigError: the name does not end in `.safetensors`, or its folder cannot be written to.
    """
    if parse(path) is not None:
        raise ConfigError(
            f"{path}: nothing is uploaded on the side. Write to a file, then: foreword push FILE user/name."
        )
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ConfigError(f"{path}: a prefix file is named *{_SUFFIX}. Use {path.with_suffix(_SUFFIX)}.")
    check_place(path)
    return path


def check_place(path: Path) -> None:
    """Raise `ConfigError` where no file can be written at this path."""
    folder = path.parent
    if not os.access(folder, os.W_OK) or path.is_dir():
        state = (
            "is a folder"
            if path.is_dir()
            else f"cannot be written: {folder} " + ("is read-only" if folder.exists() else "does not exist")
        )
        raise ConfigError(f"{path} {state}. Choose another file, or make the folder.")


def load(path: str | Path) -> Prefix:
    """Read a prefix and check all of it: format, version, shapes, numbers. `attach` checks it against the model.

    Args:
        path: a file; or `hf://user/name`, or `hf://user/name@revision`, on the Hugging Face Hub or in its local cache.

    Raises:
        HubError: the Hub has no such prefix, or cannot be reached.
        PrefixFileError: no such file, truncated, no prefix, an unknown version, a tensor missing or of the wrong shape,
            NaN or infinity.
    """
    path = local_file(path)
    header = read_header(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _prefix(header, tensors, path)


def load_bytes(content: bytes, source: str | Path) -> Prefix:
    """`load`, for a file's content in memory. `source` is what errors call it.

    Raises:
        PrefixFileError: as `load`.
    """
    source = Path(source)
    try:
        tensors = from_bytes(content)
        length = int.from_bytes(content[:8], "little")
        text = (json.loads(content[8 : 8 + length]).get("__metadata__") or {}).get(_ENTRY)
    except (SafetensorError, ValueError) as error:
        raise PrefixFileError(_DAMAGED.format(source, len(content), error)) from None
    return _prefix(_header(text, source), tensors, source)


def _prefix(header: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Prefix:
    _check_finite(tensors, path)
    try:
        sites = [AttentionSite(**site) for site in header["sites"]]
        gated = "0.gate" in tensors
        entries = [
            SiteTensors(tensors.pop(f"{i}.key"), tensors.pop(f"{i}.value"), tensors.pop(f"{i}.gate") if gated else None)
            for i in range(len(sites))
        ]
        head = {name.removeprefix(_HEAD): tensors.pop(name) for name in list(tensors) if name.startswith(_HEAD)}
        prefix = Prefix(
            sites,
            entries,
            position_offset=header["position_offset"],
            base=header["base"],
            metadata=header["metadata"],
            head=head,
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise PrefixFileError(f"{path}: damaged prefix file: {error}. Train or copy it again.") from error
    if tensors:
        raise PrefixFileError(f"{path}: tensors that belong to no site: {', '.join(sorted(tensors))}.")
    return prefix


def read_header(path: str | Path) -> dict[str, Any]:
    """What the file says about itself, without reading its tensors.

    Raises:
        PrefixFileError: as `load`, for what the header can show.
    """
    path = local_file(path)
    if path.is_dir():
        raise PrefixFileError(f"{path}: a folder. Expected a prefix file (*{_SUFFIX}).")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_ENTRY)
    except FileNotFoundError:
        raise PrefixFileError(f"{path}: no such file.") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise PrefixFileError(_DAMAGED.format(path, size, error)) from None
    return _header(text, path)


def _header(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        raise PrefixFileError(f"{path}: a safetensors file, but not a prefix: its header has no {_ENTRY!r} entry.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PrefixFileError(f"{path}: damaged prefix file: its header is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise PrefixFileError(f"{path}: damaged prefix file: its header holds {type(header).__name__}.")
    if header.get("version") != FORMAT_VERSION:
        raise PrefixFileError(
            f"{path}: format version {header.get('version')!r}; this Foreword reads version {FORMAT_VERSION}. "
            "Update Foreword with pip install -U foreword."
        )
    for name, kind in _FIELDS.items():
        if type(header.get(name)) is not kind:
            raise PrefixFileError(f"{path}: damaged prefix file: {name!r} of its header should be {kind.__name__}.")
    return header


class PrefixStore(Mapping[str, Prefix]):
    """A folder of prefix files as a mapping from name to prefix; the file's stem is the name. Loads on access.

    Example:
        >>> store = PrefixStore("prefixes")  # doctest: +SKIP
        >>> with foreword.attach(model, [store["tickets"], store["products"]]): ...  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            hint = " It is a file: foreword show tells of one." if self.folder.exists() else ""
            raise PrefixFileError(f"{self.folder}: no such folder.{hint}")

    def path(self, name: str) -> Path:
        """Where the prefix of this name is, or would be."""
        return self.folder / f"{name}{_SUFFIX}"

    def __getitem__(self, name: str) -> Prefix:
        if name not in self:
            raise KeyError(name)
        return load(self.path(name))

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.folder.glob(f"*{_SUFFIX}")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __setitem__(self, name: str, prefix: Prefix) -> None:
        save(prefix, self.path(name))


def _check_finite(tensors: dict[str, Tensor], path: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise PrefixFileError(f"{path}: tensor {name!r} holds {tensor.dtype}; expected floating-point numbers.")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise PrefixFileError(
                f"{path}: {bad} of {math.prod(tensor.shape)} numbers of tensor {name!r} are NaN or infinite. "
                "Train again with a lower learning rate, or copy the file again."
            )
