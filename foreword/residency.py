"""Where prefixes are while a model serves them: on its device, in host memory, or on the disk alone.

Each of the two memories has a budget in bytes; the least recently used prefixes make room, from the device to the host, from
the host to nothing but their files. A prefix that a request holds stays on the device. Files are read and checked by
threads of their own, so that a slow disk holds up nobody else.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch

from .engine import PrefixVersion
from .errors import ConfigError, ForewordError, PrefixChangedError, PrefixFileError
from .prefix import Prefix
from .store import load_bytes

__all__ = ["Residency"]

Ready = Callable[[Prefix | ForewordError], None]


class _Held(NamedTuple):
    prefix: Prefix
    num_bytes: int


class Residency:
    """Prefixes in memory, by version.

    Args:
        device: where the model is, and in which precision.
        dtype: of the model.
        check: raises a `ForewordError` if the model cannot use a prefix.
        device_bytes: the budget on the device.
        host_bytes: the budget in host memory, for what has left the device.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        check: Callable[[Prefix], None],
        *,
        device_bytes: int,
        host_bytes: int,
    ) -> None:
        self._device, self._dtype, self._check = device, dtype, check
        self._budget = {"device": device_bytes, "host": host_bytes}
        self._held = {place: OrderedDict[str, _Held]() for place in ("device", "host")}  # least recently used first
        self._bytes = {"device": 0, "host": 0}
        self._pins: dict[str, int] = {}
        self._loading: dict[str, list[Ready]] = {}
        self._reserved = 0  # bytes on the device for what is loading
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="foreword-prefix")
        self.hits_total = 0
        self.loads_total = {"host": 0, "disk": 0}

    @property
    def num_bytes(self) -> dict[str, int]:
        """What is held, by place."""
        return dict(self._bytes)

    def acquire(self, wanted: PrefixVersion, ready: Ready) -> Prefix | Literal["loading", "no room"]:
        """Hold a prefix on the device until `release`.

        Returns:
            The prefix, if it is there. `loading`: `ready` will be called by another thread, with the prefix, or with the
            reason why it cannot be used; then nothing is held. `no room`: requests hold so much of the budget that this
            prefix does not fit; try again when one has ended.

        Raises:
            ConfigError: it is larger than the whole budget.
        """
        with self._lock:
            held = self._held["device"].get(wanted.version)
            if held is not None:
                self._held["device"].move_to_end(wanted.version)
                self._pins[wanted.version] = self._pins.get(wanted.version, 0) + 1
                self.hits_total += 1
                return held.prefix
            if wanted.version in self._loading:
                self._loading[wanted.version].append(ready)
                return "loading"
            size, budget = self._expected_bytes(wanted), self._budget["device"]
            if size > budget:
                raise ConfigError(
                    f"Prefix {wanted.name!r} takes {size:,} bytes, more than the whole budget of {budget:,} bytes for "
                    "prefixes on the device."
                )
            if not self._make_room("device", size + self._reserved):
                return "no room"
            self._loading[wanted.version] = [ready]
            self._reserved += size
        self._threads.submit(self._load, wanted, size)
        return "loading"

    def release(self, version: str) -> None:
        """One holder less."""
        with self._lock:
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]

    def close(self) -> None:
        """Read no more files."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, wanted: PrefixVersion, size: int) -> None:
        try:
            found, origin = self._fetch(wanted)
        except ForewordError as error:
            found, origin = error, None
        except Exception as error:  # noqa: BLE001  # whatever it was, those who wait for it are told
            found, origin = PrefixFileError(f"{wanted.path.name}: {type(error).__name__}: {error}"), None
        with self._lock:
            waiting = self._loading.pop(wanted.version)
            self._reserved -= size
            if isinstance(found, Prefix) and origin is not None:
                self.loads_total[origin] += 1
                self._pins[wanted.version] = len(waiting)
                self._keep("device", wanted.version, found)
        for ready in waiting:
            ready(found)

    def _fetch(self, wanted: PrefixVersion) -> tuple[Prefix, Literal["host", "disk"]]:
        with self._lock:
            held = self._held["host"].pop(wanted.version, None)
            if held is not None:
                self._bytes["host"] -= held.num_bytes
        if held is not None:
            return held.prefix.to(self._device), "host"
        try:
            content = wanted.path.read_bytes()
        except FileNotFoundError:
            raise PrefixChangedError(f"Prefix {wanted.name!r} was deleted.") from None
        except OSError as error:
            raise PrefixFileError(f"Prefix {wanted.name!r}: its file cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != wanted.version:
            raise PrefixChangedError(f"Prefix {wanted.name!r} was replaced.")
        prefix = load_bytes(content, wanted.path.name).requires_grad_(False)
        self._check(prefix)
        for parameter in (*prefix.keys, *prefix.values):  # gates stay as exact as they are
            parameter.data = parameter.data.to(self._device, self._dtype)
        return prefix.to(self._device), "disk"

    def _expected_bytes(self, wanted: PrefixVersion) -> int:
        held = self._held["host"].get(wanted.version)
        if held is not None:
            return held.num_bytes
        try:
            return wanted.path.stat().st_size  # in float32, and with a header: no less than it will take
        except OSError:
            return 0  # it is gone, as the thread that reads it will tell

    def _make_room(self, place: Literal["device", "host"], size: int) -> bool:
        """Whether there is room for `size` bytes once those that nobody holds have made way."""
        held, free = self._held[place], self._budget[place] - self._bytes[place]
        leaving = []
        for version, entry in held.items():
            if free >= size:
                break
            if version not in self._pins:
                leaving.append(version)
                free += entry.num_bytes
        if free < size:
            return False
        for version in leaving:
            entry = held.pop(version)
            self._bytes[place] -= entry.num_bytes
            if place == "device" and self._make_room("host", entry.num_bytes):
                self._keep("host", version, entry.prefix.to("cpu"))
        return True

    def _keep(self, place: Literal["device", "host"], version: str, prefix: Prefix) -> None:
        entry = _Held(prefix, prefix.num_bytes)
        self._held[place][version] = entry
        self._bytes[place] += entry.num_bytes
