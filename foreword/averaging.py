"""The moving average of what is trained: what is evaluated and kept, as it is steadier than any one step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Average"]

_RISE = 5  # at this step the average keeps half of itself, if its decay allows


class Average:
    """The exponential moving average of tensors over the steps of training, after Polyak & Juditsky 1992.

    Args:
        tensors: what is trained.
        decay: how much of itself the average keeps in a step; at step t no more than t / (t + 5), so that the start is soon
            forgotten. 0: no average, each step as it is.

    Example:
        >>> trained = torch.zeros(2)
        >>> average = Average([trained], 0.5)
        >>> for step in (1, 2, 3):
        ...     _ = trained.fill_(step)
        ...     average.add(step)
        >>> with average.shown():
        ...     print(trained)
        tensor([2.5000, 2.5000])
        >>> trained
        tensor([3., 3.])
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors, self.decay = list(tensors), decay
        self.values = [tensor.detach().clone() for tensor in tensors] if decay else []

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in what the tensors are after `step`, counted from 1."""
        if self.values:
            share = 1 - min(self.decay, step / (step + _RISE))
            for value, tensor in zip(self.values, self.tensors, strict=True):
                value.lerp_(tensor, share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the tensors hold the average."""
        if not self.values:
            yield
            return
        kept = [tensor.detach().clone() for tensor in self.tensors]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)
