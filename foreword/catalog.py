"""The served store: names, versions and files of the prefixes in a folder that changes while it is served.

A name is one file. Uploads are checked whole beside it and renamed into place, so that a crash leaves the old file or the new
one, and files that are copied into the folder by other means are found as well. A version is the SHA-256 of a file.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .engine import PrefixVersion
from .errors import ConfigError, PrefixFileError
from .prefix import Prefix
from .store import load_bytes, read_header

__all__ = ["Catalog", "Entry", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX, _ASIDE = ".safetensors", ".upload-"


def check_name(name: str) -> str:
    """The name, if a prefix may have it.

    Raises:
        ConfigError: it may not.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} is no name for a prefix: up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit."
        )
    return name


class Entry(NamedTuple):
    """A prefix in the store, as its file's header tells."""

    name: str
    path: Path
    header: dict[str, Any]
    size: int
    modified: float
    stamp: tuple[int, int, int]  # inode, time and size: another stamp, another content


class Catalog:
    """The prefixes in a folder.

    Args:
        folder: where they are; made if needed.
        check: raises a `ForewordError` if the model cannot use a prefix.
        own_template: the tokenizer's chat template. Prefixes with another one are taken only where `any_template`.
        any_template: whether uploads may bring a chat template, a program that runs in this process (in a sandbox).
        reserved: a name that is the base's.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        check: Callable[[Prefix], None],
        *,
        own_template: str | None = None,
        any_template: bool = False,
        reserved: str = "",
    ) -> None:
        self.folder = Path(folder)
        self._check, self._own_template, self._any_template = check, own_template, any_template
        self._reserved = reserved
        self._entries: dict[str, Entry] = {}
        self._versions: dict[tuple[int, int, int], str] = {}
        self._lock = threading.Lock()  # of changes to the folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"{_ASIDE}*"):  # by a server that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be the store: {error}") from None
        if not os.access(self.folder, os.W_OK):
            raise ConfigError(f"{self.folder} cannot be the store: it is not writable.")

    def names(self) -> list[str]:
        """All names in the folder, sorted. Files that cannot be names are passed over."""
        found = (entry.name.removesuffix(_SUFFIX) for entry in os.scandir(self.folder) if entry.name.endswith(_SUFFIX))
        return sorted(name for name in found if _NAME.fullmatch(name) and name != self._reserved)

    def __contains__(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None and name != self._reserved and self._path(name).is_file()

    def __iter__(self) -> Iterator[Entry]:
        """Every prefix that can be read."""
        for name in self.names():
            try:
                yield self[name]
            except (KeyError, PrefixFileError):
                continue

    def __getitem__(self, name: str) -> Entry:
        """What the file of this name says about itself, now.

        Raises:
            KeyError: there is none.
            PrefixFileError: it is damaged.
        """
        if name not in self:
            self._entries.pop(name, None)
            raise KeyError(name)
        path = self._path(name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise KeyError(name) from None
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._entries.get(name)
        if known is None or known.stamp != stamp:
            known = Entry(name, path, read_header(path), stat.st_size, stat.st_mtime, stamp)
            self._entries[name] = known
        return known

    def version(self, entry: Entry) -> PrefixVersion:
        """The content of a prefix, to be asked of an engine. Reads the file the first time."""
        if entry.stamp not in self._versions:
            if len(self._versions) > 2 * len(self._entries) + 64:
                self._versions.clear()
            try:
                content = entry.path.read_bytes()
            except FileNotFoundError:
                raise KeyError(entry.name) from None
            self._versions[entry.stamp] = hashlib.sha256(content).hexdigest()
        return PrefixVersion(entry.name, self._versions[entry.stamp], entry.path, entry.header["position_offset"])

    def known_version(self, entry: Entry) -> str | None:
        """SHA-256 of the file, if it has been needed before."""
        return self._versions.get(entry.stamp)

    def put(self, name: str, content: bytes, allowed: Callable[[bool], None] | None = None) -> tuple[Entry, bool]:
        """Check a file's content whole, then give it this name; the old content goes.

        Args:
            name: of the prefix.
            content: of its file.
            allowed: called with whether the name is new just before the change; what it raises prevents it.

        Returns:
            The new entry, and whether the name is new.

        Raises:
            ConfigError: no such name is possible.
            ForewordError: the content is no whole prefix for this base.
        """
        path = self._path(check_name(name))
        if name == self._reserved:
            raise ConfigError(f"{name!r} is the name of the base. Choose another name.")
        prefix = load_bytes(content, f"{name}{_SUFFIX}")
        self._check(prefix)
        template = prefix.metadata.get("template")
        if template is not None and template != self._own_template and not self._any_template:
            raise PrefixFileError(
                f"{name}{_SUFFIX} brings a chat template of its own, which would run in the server. Start it with "
                "--allow-templates to take such prefixes, or put the file into the store's folder yourself."
            )
        aside = self.folder / f"{_ASIDE}{os.getpid()}-{threading.get_ident()}-{name}"
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with self._lock:
                new = name not in self
                if allowed is not None:
                    allowed(new)
                os.replace(aside, path)
                self._sync()
                return self[name], new
        finally:
            aside.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Forget a prefix, its file included.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            if name not in self:
                raise KeyError(name)
            self._path(name).unlink()
            self._entries.pop(name, None)
            self._sync()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _sync(self) -> None:
        """Let the folder itself reach the disk: renaming and deleting change it alone."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
