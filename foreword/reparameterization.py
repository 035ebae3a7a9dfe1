"""What the optimizer sees: parameters that yield a prefix's tensors once a step, and fold into a prefix at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import PrefixConfig
from .prefix import Prefix, SiteTensors

__all__ = ["Reparameterization"]

_SMALLEST_GATE = 1e-30


class Reparameterization(nn.Module):
    """A prefix in training. Attach it like a prefix.

    All tensors of a prefix side by side are one matrix `[P, F]`: a row for each virtual token, F the numbers that one
    virtual token has at all sites. The trained rows are one parameter, or what the MLP adds to the start.

    Args:
        start: the prefix to start from; step 0 yields it exactly.
        config: `freezes_first` keeps row 0 as it is; `reparameterization` chooses the parameters.
        seed: for the random numbers that an MLP starts from.
    """

    start: Float[Tensor, "P F"]

    def __init__(self, start: Prefix, config: PrefixConfig, seed: int = 0) -> None:
        super().__init__()
        self.sites, self.position_offset, self.base = start.sites, start.position_offset, start.base
        head = {name: tensor.detach().float().clone() for name, tensor in (start.head or {}).items()}
        self._head_names = tuple(head)
        self.head_parameters = nn.ParameterList(head.values())
        self.metadata = start.metadata
        self._shapes = [[None if t is None else t.shape[1:] for t in entry] for entry in start.tensors()]
        flat = [t.detach().float().flatten(1) for entry in start.tensors() for t in entry if t is not None]
        self.register_buffer("start", torch.cat(flat, 1))
        self.first = int(config.freezes_first)
        self._leaf: Tensor | None = None
        trained = self.start[self.first :]
        self.mlp: nn.Sequential | None = None
        if config.reparameterization == "mlp":
            width = config.mlp_width
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                self.embedding = nn.Parameter(torch.randn(len(trained), width) * 0.02)
                hidden, last = nn.Linear(width, width), nn.Linear(width, trained.shape[1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(hidden, nn.Tanh(), last)
        else:
            self.rows = nn.Parameter(trained.clone())

    def matrix(self) -> Float[Tensor, "P F"]:
        """The prefix as one matrix, differentiable with respect to the parameters."""
        trained = self.rows if self.mlp is None else self.start[self.first :] + self.mlp(self.embedding)
        return torch.cat([self.start[: self.first], trained])

    @property
    def head(self) -> dict[str, Tensor] | None:
        """The head's parameters by name, if a head is trained as well."""
        return dict(zip(self._head_names, self.head_parameters, strict=True)) or None

    @contextmanager
    def once(self, reduce: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """One optimizer step: run the reparameterization once, however many forward and backward passes follow inside.

        Their gradients gather in one matrix `[P, F]`. On leaving, what `reduce` makes of it flows back to the parameters;
        so does what it makes of the head's gradients.
        """
        matrix = self.matrix()
        self._leaf = matrix.detach().requires_grad_()
        try:
            yield
            gradient = torch.zeros_like(self._leaf) if self._leaf.grad is None else self._leaf.grad
        finally:
            self._leaf = None
        matrix.backward(reduce(gradient))
        for parameter in self.head_parameters:
            parameter.grad = reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def tensors(self) -> list[SiteTensors]:
        """For each site keys `[P, G, D]`, values `[P, G, E]` and gates `[P, G]` or `None`."""
        return self._split(self.matrix() if self._leaf is None else self._leaf)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """A copy of what is trained as `fold` takes it: the matrix, then the head's tensors."""
        return [tensor.detach().clone() for tensor in (self.matrix(), *self.head_parameters)]

    def fold(self, snapshot: Sequence[Tensor] | None = None) -> Prefix:
        """The plain prefix that the parameters, or a snapshot of them, stand for."""
        with torch.no_grad():
            matrix, *head = [t.cpu().clone() for t in (self.snapshot() if snapshot is None else snapshot)]
            tensors = self._split(matrix)
            return Prefix(
                self.sites,
                [entry.map(Tensor.contiguous) for entry in tensors],
                position_offset=self.position_offset,
                base=self.base,
                metadata=self.metadata,
                head=dict(zip(self._head_names, head, strict=True)),
            )

    def _split(self, matrix: Tensor) -> list[SiteTensors]:
        tensors, column = [], 0
        for shapes in self._shapes:
            entry: list[Any] = []
            for shape in shapes:
                if shape is None:
                    entry.append(None)
                    continue
                width = shape.numel()
                entry.append(matrix[:, column : column + width].unflatten(1, shape))
                column += width
            key, value, gate = entry
            # Symmetric around zero, so that a gate that crosses it goes on learning; never zero, as its log is taken.
            tensors.append(SiteTensors(key, value, None if gate is None else gate.abs().clamp_min(_SMALLEST_GATE)))
        return tensors
