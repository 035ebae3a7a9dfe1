"""A prefix is data: key and value vectors for every attention site of a model. No Transformers here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from .errors import ConfigError

__all__ = ["AttentionSite", "Prefix", "SiteTensors"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module that can carry a prefix.

    `name` is the module's name inside the model. `kind` is `self` (causal), `encoder` (sees both ways) or `cross`
    (decoder to encoder). `sliding_window` is the layer's window in tokens, or `None`; the prefix is seen through any window.
    """

    name: str
    kind: Literal["self", "encoder", "cross"]
    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None


class SiteTensors(NamedTuple):
    """The prefix of one site. The gate multiplies `exp(query @ key)`; `None` is a gate of one."""

    key: Float[Tensor, "P G D"]
    value: Float[Tensor, "P G E"]
    gate: Float[Tensor, "P G"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "SiteTensors":
        """`change` applied to each tensor."""
        return SiteTensors(change(self.key), change(self.value), None if self.gate is None else change(self.gate))


class Prefix(nn.Module):
    """Keys and values for every attention site of one base model.

    Args:
        sites: the model's attention sites.
        tensors: for each site, keys `[P, G, D]` and values `[P, G, E]`, keys as attention sees them (after rotary
            embedding), and optional gates `[P, G]`. P, the number of virtual tokens, is the same for all sites of one
            kind; the three kinds of an encoder-decoder may differ.
        position_offset: how far the prefix shifts the positions of the real tokens: P for causal models with
            positions, so that the prefix holds positions 0 to P-1, else 0.
        base: name and fingerprint of the model that the prefix belongs to.
        metadata: anything else worth keeping in the file: how it was trained, the chat template, metrics.
        head: the trained head of a task such as classification, by parameter name in the model's state dict; `attach`
            puts it into the model. `None`: the prefix works with the model's own head.

    Raises:
        ConfigError: shapes do not fit the sites.

    Example:
        >>> import torch
        >>> from foreword import AttentionSite, Prefix
        >>> site = AttentionSite("layer.0.attention", "self", num_kv_heads=2, key_dim=4, value_dim=4)
        >>> prefix = Prefix([site], [(torch.randn(3, 2, 4), torch.randn(3, 2, 4))], position_offset=3)
        >>> prefix.num_virtual_tokens, prefix.num_parameters
        (3, 48)
    """

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        tensors: Sequence[SiteTensors | tuple[Tensor, Tensor]],
        *,
        position_offset: int,
        base: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        head: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.position_offset = position_offset
        self.base = dict(base or {})
        self.metadata = dict(metadata or {})
        site_tensors = [entry if isinstance(entry, SiteTensors) else SiteTensors(*entry) for entry in tensors]
        self._check(site_tensors)
        self.keys = nn.ParameterList([t.key for t in site_tensors])
        self.values = nn.ParameterList([t.value for t in site_tensors])
        gates = [t.gate for t in site_tensors if t.gate is not None]
        self.gates = nn.ParameterList(gates) if gates else None
        named = sorted((head or {}).items())  # in one order, as it is made and as it is loaded
        self._head_names = tuple(name for name, _ in named)  # a ParameterDict would not take the dots in them
        self._head = nn.ParameterList([tensor for _, tensor in named]) if named else None

    def _check(self, tensors: list[SiteTensors]) -> None:
        if not self.sites or len(self.sites) != len(tensors):
            raise ConfigError(f"A prefix needs tensors for each of its sites: {len(self.sites)} and {len(tensors)}.")
        if len({entry.gate is None for entry in tensors}) > 1:
            raise ConfigError("Either every site of a prefix has gates or none has.")
        lengths: dict[str, int] = {}
        for site, (key, value, gate) in zip(self.sites, tensors, strict=True):
            length = lengths.setdefault(site.kind, len(key))
            expected = {
                "key": (key, (length, site.num_kv_heads, site.key_dim)),
                "value": (value, (length, site.num_kv_heads, site.value_dim)),
                "gate": (gate, (length, site.num_kv_heads)),
            }
            for name, (tensor, shape) in expected.items():
                if tensor is not None and tuple(tensor.shape) != shape:
                    raise ConfigError(
                        f"{name} of {site.name} has shape {tuple(tensor.shape)}, expected {shape}: "
                        "[virtual tokens, key/value heads, head dim]."
                    )

    def with_head(self, head: Mapping[str, Tensor] | None) -> "Prefix":
        """The same prefix with this head."""
        return Prefix(
            self.sites,
            self.tensors(),
            position_offset=self.position_offset,
            base=self.base,
            metadata=self.metadata,
            head=head,
        )

    def tensors(self) -> list[SiteTensors]:
        """For each site its keys, values and gates, in the order of `sites`."""
        gates = self.gates if self.gates is not None else [None] * len(self.sites)
        return [SiteTensors(*entry) for entry in zip(self.keys, self.values, gates, strict=True)]

    @property
    def lengths(self) -> dict[str, int]:
        """P of each kind of site that the prefix has: `self`, `encoder`, `cross`."""
        return {site.kind: len(key) for site, key in zip(self.sites, self.keys, strict=True)}

    @property
    def num_virtual_tokens(self) -> int:
        """P of the longest kind."""
        return max(self.lengths.values())

    @property
    def head(self) -> dict[str, Tensor] | None:
        """The head's tensors by name, if there is a head."""
        return None if self._head is None else dict(zip(self._head_names, self._head, strict=True))

    @property
    def num_parameters(self) -> int:
        """How many numbers the prefix holds, its head included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_bytes(self) -> int:
        """How many bytes those numbers take."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def __repr__(self) -> str:
        lengths = self.lengths
        told = " + ".join(f"{length} {kind}" if len(lengths) > 1 else f"{length}" for kind, length in lengths.items())
        head = "" if self._head is None else " and a head"
        return f"Prefix({told} virtual tokens at {len(self.sites)} sites{head}, {self.num_parameters:,} numbers)"
