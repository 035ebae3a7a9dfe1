"""A prefix is data: key and value vectors for every attention site of a model. No Transformers before `to_cache`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from .errors import ConfigError, EngineError, ModelMismatchError
from .fingerprint import check_fingerprint

if TYPE_CHECKING:
    from transformers import DynamicCache

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

    def cached_layers(self, engine: str) -> list[SiteTensors]:
        """Keys and values layer by layer, for an engine that keeps them in its cache, in front of the tokens.

        There they hold the positions 0 to P-1, weigh what attention makes of them, and are seen as any token is.

        Args:
            engine: what it is called in the error.

        Raises:
            EngineError: such a cache would compute something else than Foreword, with the reasons.
        """
        base = self.base.get("fingerprint", {}).get("architecture", {})
        windows = sorted({site.sliding_window for site in self.sites if site.sliding_window is not None})
        bare = self.base.get("layers_without_sites")
        reasons = {
            f"it has prefixes for {' and '.join(sorted(self.lengths.keys() - {'self'}))} attention, and such a cache is "
            "one of causal self-attention": self.lengths.keys() != {"self"},
            "its virtual tokens have gates, which no cache holds (train it with another start than noop)": self.gates
            is not None,
            f"real tokens start at position {self.position_offset}, and in a cache of {self.num_virtual_tokens} tokens at "
            f"{self.num_virtual_tokens}": self.gates is None and self.position_offset != self.num_virtual_tokens,
            f"the base has sliding windows ({', '.join(map(str, windows))} tokens): Foreword shows the prefix through "
            "them, and a cache lets it slide out of view": bool(windows),
            f"layers of the base keep a state instead of keys and values ({', '.join((bare or [])[:3])}...)": bool(
                bare
            ),
            "the base caches a latent vector instead of keys and values": "kv_lora_rank" in base,
            "it has a trained head, which stands outside attention": self._head is not None,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise EngineError(f"{engine} cannot hold this prefix: {'; '.join(found)}. Use it with foreword.attach.")
        return self.tensors()

    def to_cache(self, model: nn.Module, batch_size: int = 1) -> "DynamicCache":
        """A new cache of Transformers with the prefix in it, once for each row, for code that wants a cache.

        Pass it as the model's cache (`past_key_values`, called `cache` since Transformers 5.24), with an attention mask
        that has P ones in front, or without one. It is filled up by what runs after it: make a new one for the next
        batch. `attach` needs none of that, repeats nothing for the rows, and holds what a cache cannot.

        Args:
            model: the base that the prefix was made for.
            batch_size: the number of rows.

        Raises:
            EngineError: a cache would compute something else, with the reasons.
            ModelMismatchError: the prefix was made for another model.

        Example:
            >>> import torch, foreword
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))
            >>> cache = foreword.text_prefix(model, input_ids=[7, 8, 9]).to_cache(model, batch_size=2)
            >>> cache.get_seq_length()
            3
        """
        from transformers import DynamicCache

        layers = self.cached_layers("A cache of Transformers")
        name = self.base.get("name", "another model")
        if "fingerprint" in self.base:
            check_fingerprint(self.base["fingerprint"], model, name)
        modules = dict(model.named_modules())
        pairs: dict[int, tuple[Tensor, ...]] = {}
        for site, entry in zip(self.sites, layers, strict=True):
            if site.name not in modules:
                raise ModelMismatchError(f"The prefix was made for {name}; {type(model).__name__} has no {site.name}.")
            module: Any = modules[site.name]
            weight = next(module.parameters())
            rows = (tensor.detach().to(weight.device, weight.dtype).transpose(0, 1) for tensor in entry[:2])
            pairs[module.layer_idx] = tuple(tensor.expand(batch_size, -1, -1, -1) for tensor in rows)
        return DynamicCache([pairs[number] for number in sorted(pairs)])

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
