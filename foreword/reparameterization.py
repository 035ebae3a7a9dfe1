"""What the optimizer sees: parameters that yield a prefix's tensors once a step, and fold into a prefix at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import PrefixConfig
from .prefix import Prefix, SiteTensors

__all__ = ["Reparameterization"]

_SMALLEST_GATE = 1e-30


class Reparameterization(nn.Module):
    """A prefix in training. Attach it like a prefix.

    The tensors of all sites of one kind side by side are a matrix `[P, F]`: a row for each virtual token, F the numbers
    that one virtual token has at those sites. The trained rows are one parameter, or what an MLP adds to the start, of
    each kind. All matrices end to end are one vector `[N]`, which training sees.

    Args:
        start: the prefix to start from; step 0 yields it exactly.
        config: `freezes_first` keeps row 0 as it is; `reparameterization` chooses the parameters.
        seed: for the random numbers that an MLP starts from.
    """

    start: Float[Tensor, " N"]

    def __init__(self, start: Prefix, config: PrefixConfig, seed: int = 0) -> None:
        super().__init__()
        self.sites, self.position_offset, self.base = start.sites, start.position_offset, start.base
        head = {name: tensor.detach().float().clone() for name, tensor in (start.head or {}).items()}
        self._head_names = tuple(head)
        self.head_parameters = nn.ParameterList(head.values())
        self.metadata = start.metadata
        self._shapes = [[None if t is None else t.shape for t in entry] for entry in start.tensors()]
        self._kinds = {kind: [i for i, s in enumerate(self.sites) if s.kind == kind] for kind in start.lengths}
        self.first = int(config.freezes_first)
        self._leaf: Tensor | None = None  # what the model sees during a step
        self._seen: Tensor | None = None  # its memory
        tensors = start.tensors()
        matrices = {
            kind: torch.cat([t.detach().float().flatten(1) for i in own for t in tensors[i] if t is not None], 1)
            for kind, own in self._kinds.items()
        }
        self._matrix_shapes = {kind: matrix.shape for kind, matrix in matrices.items()}
        self.register_buffer("start", torch.cat([matrix.flatten() for matrix in matrices.values()]))
        self.mlps: nn.ModuleDict | None = None
        if config.reparameterization == "mlp":
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                trained = {kind: matrix[self.first :] for kind, matrix in matrices.items()}
                self.mlps = nn.ModuleDict({kind: _mlp(config.mlp_width, m.shape[1]) for kind, m in trained.items()})
                noise = {kind: torch.randn(len(m), config.mlp_width) * 0.02 for kind, m in trained.items()}
                self.embeddings = nn.ParameterDict(noise)
        else:
            self.rows = nn.ParameterDict({kind: matrix[self.first :].clone() for kind, matrix in matrices.items()})

    def vector(self) -> Float[Tensor, " N"]:
        """The prefix as one vector, differentiable with respect to the parameters."""
        parts = []
        for kind, start in self._matrices(self.start).items():
            if self.mlps is None:
                trained = self.rows[kind]
            else:
                trained = start[self.first :] + self.mlps[kind](self.embeddings[kind])
            parts += [start[: self.first].flatten(), trained.flatten()]
        return torch.cat(parts)

    @property
    def head(self) -> dict[str, Tensor] | None:
        """The head's parameters by name, if a head is trained as well."""
        return dict(zip(self._head_names, self.head_parameters, strict=True)) or None

    @contextmanager
    def once(self) -> Iterator[None]:
        """One optimizer step: run the reparameterization once, however many forward and backward passes follow inside.

        Their gradients gather in `gradients()`. On leaving, what these then hold flows back to the parameters.
        """
        vector = self.vector()
        with torch.no_grad():
            if self._seen is None or self._seen.device != vector.device:
                self._seen = vector.detach().clone().requires_grad_()
                self._seen.grad = torch.zeros_like(vector)
            else:  # in the same memory, where a CUDA graph finds it
                self._seen.copy_(vector)
        gradient = self._seen.grad
        assert gradient is not None
        gradient.zero_()
        self._leaf = self._seen
        try:
            yield
        finally:
            self._leaf = None
        vector.backward(gradient)

    def gradients(self) -> list[Tensor]:
        """What has gathered so far inside `once`, to be changed in place: of the vector `[N]`, and of each of the head's tensors."""
        leaves = [self._seen, *self.head_parameters]
        for leaf in leaves:
            assert leaf is not None
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]

    def tensors(self) -> list[SiteTensors]:
        """For each site keys `[P, G, D]`, values `[P, G, E]` and gates `[P, G]` or `None`."""
        return self._split(self.vector() if self._leaf is None else self._leaf)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """A copy of what is trained as `fold` takes it: the vector, then the head's tensors."""
        return [tensor.detach().clone() for tensor in (self.vector(), *self.head_parameters)]

    def fold(self, snapshot: Sequence[Tensor] | None = None) -> Prefix:
        """The plain prefix that the parameters, or a snapshot of them, stand for."""
        with torch.no_grad():
            vector, *head = [t.cpu().clone() for t in (self.snapshot() if snapshot is None else snapshot)]
            tensors = self._split(vector)
            return Prefix(
                self.sites,
                [entry.map(Tensor.contiguous) for entry in tensors],
                position_offset=self.position_offset,
                base=self.base,
                metadata=self.metadata,
                head=dict(zip(self._head_names, head, strict=True)),
            )

    def _matrices(self, vector: Float[Tensor, " N"]) -> dict[str, Float[Tensor, "P F"]]:
        sizes = [shape.numel() for shape in self._matrix_shapes.values()]
        parts = zip(self._matrix_shapes.items(), vector.split(sizes), strict=True)
        return {kind: part.view(shape) for (kind, shape), part in parts}

    def _split(self, vector: Float[Tensor, " N"]) -> list[SiteTensors]:
        tensors: dict[int, SiteTensors] = {}
        for kind, matrix in self._matrices(vector).items():
            shapes = [shape for site in self._kinds[kind] for shape in self._shapes[site] if shape is not None]
            # Split at once: each slice of its own would have a gradient as long as the whole, to be added up.
            parts = iter(matrix.split([shape[1:].numel() for shape in shapes], 1))
            for site in self._kinds[kind]:
                key, value, gate = [
                    None if shape is None else next(parts).unflatten(1, shape[1:]) for shape in self._shapes[site]
                ]
                assert key is not None
                assert value is not None
                # Symmetric around zero, so that a gate that crosses it goes on learning; never zero, as its log is taken.
                tensors[site] = SiteTensors(key, value, None if gate is None else gate.abs().clamp_min(_SMALLEST_GATE))
        return [tensors[i] for i in range(len(self.sites))]


def _mlp(width: int, features: int) -> nn.Sequential:
    """The two-layer tanh network of Li & Liang 2021, section 4.3; its last layer starts at zero."""
    last = nn.Linear(width, features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)
