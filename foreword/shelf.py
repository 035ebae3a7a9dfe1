"""A folder of prefixes for an engine that is not ours: which it can use, and with what content. No vLLM here."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .errors import EngineError, PrefixFileError
from .fingerprint import checkpoint_fingerprint, compare_fingerprints
from .prefix import Prefix
from .store import PrefixStore, load_bytes

__all__ = ["CONNECTOR", "Shelf", "Shelved", "checkpoint_folder", "file_digest", "layer_number", "own_heads"]

CONNECTOR = "ForewordConnector"  # what vLLM calls `vllm_connector`


@dataclass(frozen=True)
class Shelved:
    """One content of a prefix file, checked."""

    path: Path
    digest: str  # SHA-256 of the file, in hexadecimal
    virtual_tokens: int

    def load(self) -> Prefix:
        """The prefix with this content; raises a `PrefixFileError` if the file has another by now."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise PrefixFileError(f"{self.path}: changed since the request was accepted. Send the request again.")
        return load_bytes(content, self.path)


class Shelf:
    """The prefixes of a folder, looked up by name and checked once for each content.

    Args:
        folder: with prefix files.
        config: the config of the model that the engine runs.
        weights: the folder of its weights, where there is one (`checkpoint_folder`).
    """

    def __init__(self, folder: Path, config: Any, weights: Path | None) -> None:
        self._store, self._config, self._weights = PrefixStore(folder), config, weights
        self._known: dict[str, tuple[tuple[int, int, int], Shelved]] = {}

    def find(self, name: str) -> Shelved:
        """The prefix of this name as its file is now.

        Raises:
            PrefixFileError: there is none of this name, or its file is damaged.
            ModelMismatchError: it was made for another model.
            EngineError: the engine's cache cannot hold it.
        """
        if name not in self._store:  # no path: a name of one of the folder's files
            raise PrefixFileError(
                f"No prefix {name!r} in {self._store.folder}. There are: {', '.join(self._store) or 'none'}."
            )
        path = self._store.path(name)
        state = path.stat()
        stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
        if (known := self._known.get(name)) is not None and known[0] == stamp:
            return known[1]
        content = path.read_bytes()  # once, so that what is checked is what the digest says
        found = Shelved(path, hashlib.sha256(content).hexdigest(), self.check(load_bytes(content, path)))
        self._known[name] = (stamp, found)
        return found

    def check(self, prefix: Prefix) -> int:
        """P, if the engine's model can use the prefix; else raises as `find`."""
        length = len(prefix.cached_layers("vLLM")[0].key)
        expected, name = prefix.base.get("fingerprint"), prefix.base.get("name", "another model")
        if expected is None:
            raise EngineError(
                "The prefix does not say which base it was made for, so vLLM cannot check it. Train it again."
            )
        found = checkpoint_fingerprint(self._config, self._weights or Path("/nonexistent"), expected)
        compare_fingerprints(expected, found, name)
        if expected["weights"] and not found["weights"]:
            raise EngineError(
                f"The prefix was trained for {name}, and none of the weights that its file names are in {self._weights or 'the local cache'}, "
                "so vLLM's model may be another. Give vLLM a folder with the base's safetensors files."
            )
        return length


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Where the files of a model are: its folder, or that of a Hugging Face id in a local cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", cache, revision)
    return Path(found).parent if isinstance(found, str) else None


def layer_number(name: str) -> int:
    """The number of the layer that a module belongs to, from its name: 3 of `model.layers.3.self_attn`."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        raise EngineError(
            f"The name of the attention layer {name!r} has no number, so its place in the model is unknown."
        )
    return int(found[1])


def own_heads(tensor: Float[Tensor, "P G D"], rank: int, ranks: int, heads: int) -> Float[Tensor, "P N D"]:
    """The `heads` key/value heads of one of several ranks: they are split, or, where there are fewer than ranks, repeated."""
    total = tensor.shape[1]
    if heads * ranks != total and not (heads == 1 and ranks % total == 0):
        raise EngineError(f"{total} key/value heads cannot be split into {ranks} ranks of {heads}.")
    start = rank * heads if heads * ranks == total else rank * total // ranks
    return tensor[:, start : start + heads]
