"""API keys: a file of hashes, who may do what with which prefixes.

A key is 256 random bits, so a plain SHA-256 keeps it safe at rest; the key itself is shown once, when it is made.
"""

import fnmatch
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from .errors import ConfigError

__all__ = ["Key", "KeyFile", "Scope"]

Scope = Literal["infer", "manage"]


@dataclass(frozen=True)
class Key:
    """What one key may do.

    Args:
        name: who has it.
        digest: SHA-256 of the key, in hexadecimal.
        scopes: `infer`: ask for answers. `manage`: upload and delete prefixes, and read the metrics.
        prefixes: patterns of the prefixes that it can see, such as `acme-*`. The base can be used with every key.
        max_prefixes: how many prefixes may match these patterns before uploads with this key are refused.
        max_requests: how many of its requests may run or wait at a time.
    """

    name: str
    digest: str
    scopes: tuple[Scope, ...] = ("infer",)
    prefixes: tuple[str, ...] = ("*",)
    max_prefixes: int = 10_000
    max_requests: int = 64

    def sees(self, prefix: str) -> bool:
        """Whether a prefix of this name is among those that the key may use.

        Example:
            >>> Key("acme", "", prefixes=("acme-*",)).sees("acme-tickets"), Key("acme", "", prefixes=("acme-*",)).sees("bolt")
            (True, False)
        """
        return any(fnmatch.fnmatchcase(prefix, pattern) for pattern in self.prefixes)


@dataclass
class KeyFile:
    """The keys in a file, read again when it changes.

    Args:
        path: the file. That there is none means that there are no keys.

    Raises:
        ConfigError: it is damaged.
    """

    path: Path
    _stamp: tuple[int, int] | None = None
    _keys: tuple[Key, ...] = field(default=())
    _existed: bool = False

    @property
    def exist(self) -> bool:
        """Whether there is, or was, such a file: a server that has had keys is never open again."""
        self._existed = self._existed or self.path.exists()
        return self._existed

    def all(self) -> tuple[Key, ...]:
        """All keys, as the file has them now."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return ()
        stamp = (stat.st_ino, stat.st_mtime_ns)
        if stamp != self._stamp:
            self._keys, self._stamp = self._read(), stamp
        return self._keys

    def find(self, given: str) -> Key | None:
        """The key that was given, if it is one. Takes as long for each wrong key."""
        digest, found = _digest(given), None
        for key in self.all():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def add(
        self,
        name: str,
        scopes: Sequence[Scope] = ("infer",),
        prefixes: Sequence[str] = ("*",),
        max_prefixes: int = Key.max_prefixes,
        max_requests: int = Key.max_requests,
    ) -> str:
        """Make a key; the text to give to whoever is to have it, which is kept nowhere.

        Raises:
            ConfigError: there is a key of this name.
        """
        if any(key.name == name for key in self.all()):
            raise ConfigError(f"{self.path} has a key named {name!r} already. Remove it first, or choose another name.")
        text = f"fw-{secrets.token_urlsafe(32)}"
        key = Key(name, _digest(text), tuple(scopes), tuple(prefixes), max_prefixes, max_requests)
        self._write([*self.all(), key])
        return text

    def remove(self, name: str) -> None:
        """Make a key worthless; a running server forgets it at once.

        Raises:
            ConfigError: there is no key of this name.
        """
        left = [key for key in self.all() if key.name != name]
        if len(left) == len(self.all()):
            raise ConfigError(f"{self.path} has no key named {name!r}: {', '.join(k.name for k in left) or 'none'}.")
        self._write(left)

    def _read(self) -> tuple[Key, ...]:
        try:
            entries = json.loads(self.path.read_text("utf-8"))["keys"]
            return tuple(
                Key(**entry | {"scopes": tuple(entry["scopes"]), "prefixes": tuple(entry["prefixes"])})
                for entry in entries
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path}: not a file of keys ({type(error).__name__}: {error}).") from None

    def _write(self, keys: Sequence[Key]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=self.path.parent, prefix=".keys-")  # readable by its owner alone
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
