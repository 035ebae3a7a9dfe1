"""How much memory one training step takes, counted alike on every device: bytes of tensors, not of the process."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["StepMemory"]


class StepMemory:
    """Measures the second step of a run: what it allocates at its peak beyond what stood before it.

    Use it around the run, and call it after each step. On a GPU the allocator's own peak is read; on a CPU every tensor
    that an operation returns is counted from its making to its end (what a kernel takes for itself stays unseen).

    `peak` in bytes, `None` before the second step has ended.

    Example:
        >>> with StepMemory(torch.device("cpu")) as memory:
        ...     for step in range(2):
        ...         total = (torch.zeros(1000) + 1).sum()
        ...         memory()
        >>> memory.peak   # 1,000 zeros, and 1,000 sums beside them
        8000
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None
        self._steps = self._before = 0
        self._counter: _Counter | None = None

    def __enter__(self) -> "StepMemory":
        return self

    def __call__(self) -> None:
        """Say that a step has ended."""
        self._steps += 1
        cuda = self.device.type == "cuda"
        if self._steps == 1:
            if cuda:
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                self._before = torch.cuda.memory_allocated(self.device)
            elif self.device.type == "cpu":
                self._counter = _Counter()
                self._counter.__enter__()
        elif self._steps == 2:
            if cuda:
                self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            elif self._counter is not None:
                self.peak = self._counter.peak
                self._leave()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None


class _Counter(TorchDispatchMode):
    """Counts the bytes of storages from the operation that first returned them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()  # storages, also those that stood before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._known[tensor.untyped_storage()] = True
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return output

    def _free(self, count: int) -> None:
        self.now -= count


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
