"""Attach prefixes to a model: shift its positions, lay the prefixes out over the rows, let each site attend to them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from .anatomy import Stack, stacks
from .attention import AttentionCall, install
from .errors import ConfigError, ModelMismatchError, PositionError, UnsupportedModelError
from .fingerprint import check_fingerprint
from .heads import LENT, own_parameters
from .kernels import Prefixes, Rows, assign, concatenate, extend_mask, merged_attention
from .kernels import stack as stack_prefixes
from .prefix import AttentionSite, SiteTensors
from .token_kernels import Packing, has_token_kernel

__all__ = ["Attachment", "Choice", "PrefixSource", "attach"]


@runtime_checkable
class PrefixSource(Protocol):
    """What can be attached: a `Prefix`, or anything in training that yields one's tensors."""

    sites: tuple[AttentionSite, ...]
    position_offset: int
    base: dict[str, Any]

    @property
    def head(self) -> dict[str, Tensor] | None: ...

    def tensors(self) -> list[SiteTensors]: ...


def attach(model: nn.Module, prefix: PrefixSource | Sequence[PrefixSource | None]) -> "Attachment":
    """Let every attention layer of `model` see `prefix` before the real tokens.

    The model object stays the same: call it, generate with it, train through it as before. Use the result in a `with`
    statement, after which the model is itself again, or keep it and call `detach`.

    Args:
        model: a Transformers model, or the wrapper of PEFT or `torch.compile` around one.
        prefix: one prefix for all rows, or a list with one prefix or `None` for each row of the batch. A batch k times
            as long (beams, several return sequences) repeats each entry k times, as `generate` does. Swap prefixes
            later with `Attachment.use`.

    A prefix that all rows share is a submodule of the model while it is attached, `foreword_prefix`: freeze the model, and
    `transformers.Trainer`, any optimizer over `model.parameters()`, DDP and FSDP2 train exactly the prefix.

    A prefix with a trained head lends it to the model until it is detached; the model's own parameters stay as they are.

    Without `position_ids`, rows are placed as their `attention_mask` says: the first real token of each row has
    position `prefix.position_offset`, however the row is padded.

    Raises:
        ModelMismatchError: the prefix was made for another model.
        UnsupportedModelError: the model cannot carry a prefix.
        ConfigError: the model has prefixes attached already, or the rows' prefixes have different heads.

    Example:
        >>> import torch, foreword
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2))
        >>> prefix = foreword.text_prefix(model, input_ids=[7, 8, 9])
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> with foreword.attach(model, [prefix, None]):   # row 0 sees the prefix, row 1 does not
        ...     logits = model(ids).logits
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: getattr(model, "_orig_mod", model))
    own = unwrap()  # PEFT changes the model that it wraps, and a compiled model is compiled anew
    if not isinstance(own, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a Transformers model, got {type(own).__name__}. Attach the prefix to the model itself, before it is "
            "wrapped for several devices or processes."
        )
    return Attachment(own, prefix)


_SEEN = "_foreword_seen"


class _Seen(NamedTuple):
    """What a site sees in this forward pass. Kept on its module, so that one compiled graph serves all layers."""

    prefixes: Prefixes | None
    rows: int | None  # how many, where they see different prefixes
    differentiates: bool  # whether the whole forward pass does
    kept: dict[Any, Prefixes]  # without gradients, as attention took them before: on its device, in its precision

    def like(self, query: Tensor, value: Tensor) -> Prefixes:
        """The prefixes on the device and in the precision of attention."""
        how = query.device, query.dtype, value.dtype
        if how in self.kept:
            return self.kept[how]
        assert self.prefixes is not None
        key, own_value, bias, rows = self.prefixes
        prefixes = Prefixes(
            key.to(query.device, query.dtype),
            own_value.to(query.device, value.dtype),
            None if bias is None else bias.to(query.device),
            None if rows is None else Rows(*(numbers.to(query.device) for numbers in rows)),
        )
        if not self.differentiates and not torch.compiler.is_compiling():
            self.kept[how] = prefixes
        return prefixes


class _Assigned(NamedTuple):
    """A batch whose rows see different prefixes."""

    rows: Rows | None  # None: no row sees any
    offsets: Tensor  # [B], how far each row's positions are shifted
    batch: int  # B


@dataclass(frozen=True)
class Choice:
    """Which prefix each row of a batch sees. Made by `Attachment.use`, which takes it again later.

    What it once put on the device stays there with it, so a CUDA graph that was captured while it was in use can be replayed
    for as long as the choice is kept.
    """

    sources: list[PrefixSource]
    owners: list[int]  # for each row the number of its source, or -1
    shared: bool  # one prefix for all rows, however many
    head_source: PrefixSource | None
    # By the size of a batch, and where it is.
    assigned: dict[tuple[int, torch.device], _Assigned] = field(default_factory=dict)


class Attachment:
    """The tie between a model and its prefixes. Made by `attach`."""

    def __init__(self, model: PreTrainedModel, prefix: PrefixSource | Sequence[PrefixSource | None]) -> None:
        self.model = model
        self._stacks = stacks(model)
        self._sites = {site.name: site for stack in self._stacks for site in stack.sites}
        self._laid_out: dict[str, Any] = {}  # by stack, what its sites were told last
        self._checked: WeakSet[Any] = WeakSet()  # not their ids, which are used again once a prefix is gone
        self._own_head: dict[str, nn.Parameter] = {}  # what the prefix's head stands in for
        self._choice = self._choose(prefix)
        modules = {model.get_submodule(name): name for name in self._sites}
        self._modules = {name: module for module, name in modules.items()}
        undo = install(model, dict.fromkeys(modules, self._attend))
        hooks = [
            model.get_submodule(stack.name).register_forward_pre_hook(
                partial(self._before_forward, stack), with_kwargs=True
            )
            for stack in self._stacks
        ]

        def undo_all() -> None:
            for hook in hooks:
                hook.remove()
            for module in modules:
                module.__dict__.pop(_SEEN, None)
            undo()

        self._undo: Callable[[], None] | None = undo_all
        self._lend()

    def use(self, prefix: PrefixSource | Sequence[PrefixSource | None] | Choice) -> Choice:
        """From the next forward pass on, see this prefix, or these: one prefix or `None` for each row.

        Returns:
            What was chosen. Given to `use` again, it saves making it anew.
        """
        self._choice = prefix if isinstance(prefix, Choice) else self._choose(prefix)
        self._laid_out.clear()
        self._lend()
        return self._choice

    def _choose(self, prefix: PrefixSource | Sequence[PrefixSource | None]) -> Choice:
        rows = list(prefix) if isinstance(prefix, Sequence) else [prefix]
        if not rows:
            raise ConfigError("An empty list of prefixes: expected one prefix or None for each row of the batch.")
        sources = list({id(source): source for source in rows if source is not None}.values())
        for source in sources:
            self._check(source)
        number = {id(source): i for i, source in enumerate(sources)}
        owners = [-1 if source is None else number[id(source)] for source in rows]
        return Choice(sources, owners, not isinstance(prefix, Sequence), _head_source(rows))

    def detach(self) -> None:
        """Make the model itself again. May be called twice."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            self._choice = Choice([], [-1], False, None)
            self._lend()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _check(self, source: PrefixSource) -> None:
        if source in self._checked:
            return
        name = source.base.get("name", "another model")
        for site in source.sites:
            if self._sites.get(site.name) != site:
                found = self._sites.get(site.name, f"no such site among its {len(self._sites)}")
                raise ModelMismatchError(
                    f"The prefix was made for {name} and has a site {site}, but {type(self.model).__name__} has {found}. "
                    "Load the base that the prefix was trained on."
                )
        if "fingerprint" in source.base:
            check_fingerprint(source.base["fingerprint"], self.model, name)
        own = {name: tuple(parameter.shape) for name, parameter in own_parameters(self.model)}
        for parameter, tensor in (source.head or {}).items():
            if own.get(parameter) != tuple(tensor.shape):
                raise ModelMismatchError(
                    f"The prefix has a trained head with {parameter} {tuple(tensor.shape)}, but {type(self.model).__name__} "
                    f"has {own.get(parameter, 'no such parameter')}. Load the base with the head of the prefix's task and "
                    "as many labels: foreword.load_base(..., task=..., labels=[...])."
                )
        self._checked.add(source)

    def _lend(self) -> None:
        """Make the prefix that all rows share a part of the model, for trainers and wrappers to find, and its head."""
        self.model._modules.pop(LENT, None)
        if self._choice.shared and isinstance(source := self._choice.sources[0], nn.Module):
            self.model.add_module(LENT, source)
        self._lend_head()

    def _lend_head(self) -> None:
        """Put the chosen prefix's head in the place of the model's own, or put the model's own back."""
        head = {} if self._choice.head_source is None else self._choice.head_source.head or {}
        for name in {**self._own_head, **head}:
            owner, _, attribute = name.rpartition(".")
            slots: dict[str, Any] = self.model.get_submodule(owner)._parameters
            own = self._own_head.setdefault(name, slots[attribute])
            slots[attribute] = head[name].to(own.device, own.dtype) if name in head else self._own_head.pop(name)

    # What happens in a stack's forward: positions are shifted and prefixes laid out once, then each site attends.

    def _before_forward(self, stack: Stack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        parameters = list(inspect.signature(module.forward).parameters)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        wanted = [given.get("input_ids"), given.get("inputs_embeds"), *given.values()]
        tokens = next(value for value in wanted if isinstance(value, Tensor))  # or patches, or frames
        batch, length = tokens.shape[:2]
        rows = None if self._choice.shared else self._rows_of(batch, tokens.device)
        self._lay_out(stack, rows)
        if self._choice.head_source is not None:  # it may have been trained since, or its precision changed
            self._lend_head()
        if not stack.takes_positions:
            return args, kwargs
        offsets = [source.position_offset for source in self._choice.sources]
        offset = offsets[0] if rows is None else rows.offsets[:, None]
        positions = given.get("position_ids")
        # No token stands further behind than there are tokens; only positions from elsewhere have to be looked at.
        last = given.get("max_length_q") or (length + _past(given) if positions is None else None)
        last = last if isinstance(last, int) else None  # a static cache counts on the device
        if positions is None:
            positions = _positions(given, length, tokens.device) + stack.first_position
        positions = positions + offset
        limit = stack.position_limit
        known = limit is None or (last is not None and last + max(offsets, default=0) <= limit)
        if limit is not None and not known and (last := int(positions.max()) - stack.first_position) >= limit:
            raise PositionError(
                f"Prefix and text need position {last}, but {type(self.model).__name__} has learned positions up to "
                f"{limit - 1}. Shorten the text to {limit - max(offsets, default=0)} tokens or the prefix."
            )
        where = parameters.index("position_ids")
        if where < len(args):
            return (*args[:where], positions, *args[where + 1 :]), kwargs
        return args, kwargs | {"position_ids": positions}

    def _rows_of(self, batch: int, device: torch.device) -> "_Assigned":
        """Which row of the batch sees which prefix; made once for each size of batch."""
        if batch % len(self._choice.owners):
            raise ConfigError(
                f"{len(self._choice.owners)} prefixes for a batch of {batch} rows: give one prefix or None for each row "
                "(generate with k beams or return sequences repeats each entry k times)."
            )
        choice = self._choice
        if (batch, device) not in choice.assigned:
            owners = [owner for owner in choice.owners for _ in range(batch // len(choice.owners))]
            offsets = [0 if owner < 0 else choice.sources[owner].position_offset for owner in owners]
            rows = assign(owners, device) if choice.sources else None
            choice.assigned[batch, device] = _Assigned(rows, torch.tensor(offsets, device=device), batch)
        return choice.assigned[batch, device]

    def _lay_out(self, stack: Stack, rows: "_Assigned | None") -> None:
        """Tell each site of the stack which prefixes its queries see."""
        # Without gradients the prefixes stay as they are, unless somebody writes into them.
        differentiates = torch.is_grad_enabled()
        version = None if differentiates or torch.compiler.is_compiling() else self._version()
        if version is not None and self._laid_out.get(stack.name) == (version, rows and rows.batch):
            return
        own = {site.name: dict[int, Any]() for site in stack.sites}
        for number, source in enumerate(self._choice.sources):
            for site, (key, value, gate) in zip(source.sites, source.tensors(), strict=True):
                if site.name in own:
                    own[site.name][number] = key, value, None if gate is None else gate.log()
        for name, found in own.items():
            prefixes = None
            if found:  # of a prefix without this site, no virtual tokens
                key, value, _ = next(iter(found.values()))
                none = key[:0], value[:0], None
                entries = [found.get(number, none) for number in range(len(self._choice.sources))]
                prefixes = stack_prefixes(entries, rows and rows.rows)
            self._modules[name].__dict__[_SEEN] = _Seen(prefixes, rows and rows.batch, differentiates, {})
        self._laid_out[stack.name] = (version, rows and rows.batch)

    def _version(self) -> tuple[Any, ...] | None:
        """Changes when a prefix is written into; `None` where that cannot be told."""
        tensors = [t for s in self._choice.sources for t in (s.parameters() if isinstance(s, nn.Module) else [None])]
        if any(tensor is None or tensor.is_inference() for tensor in tensors):
            return None
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors if tensor is not None)

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        query, options, seen = call.query, call.options, call.module.__dict__[_SEEN]
        if seen.rows is not None and seen.rows != len(query):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} attends in {self._name(call)} over a batch of {len(query)}, which does not "
                f"tell its {seen.rows} rows apart, so they cannot see different prefixes there. Attach one for all rows."
            )
        prefixes, longest = seen.prefixes, options.get("max_length_q")  # Transformers' name, of packed documents
        if prefixes is None and (longest is None or call.implementation != "sdpa"):  # sdpa knows of no documents
            return call.run()
        if prefixes is not None and seen.differentiates and not torch.is_grad_enabled() and prefixes.key.requires_grad:
            raise ConfigError(
                f"{self._name(call)} runs without gradients inside a forward pass that has them, so the prefix would not be trained. "
                "Re-entrant checkpointing does that: switch it on with 'use_reentrant': False."
            )
        # A causal call without a mask sees no key beyond its queries: what follows are empty slots of a static cache.
        length = query.shape[2] if call.is_causal else call.key.shape[2]
        tokens = (query, call.key[:, :, :length], call.value[:, :, :length])
        plain = call.implementation == "sdpa" and call.is_plain
        if plain and torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            precision = torch.get_autocast_dtype(query.device.type)  # the attention that ours stands for is cast to it
            tokens = tuple(tensor.to(precision) for tensor in tokens)
        query, own_key, own_value = tokens
        prefixes = None if prefixes is None else seen.like(query, own_value)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        if longest is not None:
            return self._attend_inside_documents(call, query, own_key, own_value, prefixes, scale, longest), None
        assert prefixes is not None
        if plain and has_token_kernel(query, own_value, call.mask):
            output = merged_attention(
                query, own_key, own_value, prefixes, scale=scale, mask=call.mask, is_causal=call.is_causal
            )
            return output.transpose(1, 2).contiguous(), None
        key, value, bias = concatenate(own_key, own_value, prefixes)
        mask = extend_mask(call.mask, bias, query, length, key.shape[2] - length, call.is_causal)
        changes = {}
        if (position_bias := options.get("position_bias")) is not None:  # virtual tokens are at no distance
            new = key.shape[2] - length
            changes = {"position_bias": pad(position_bias[..., :length], (new, 0))}
        return call.run(query=query, key=key, value=value, mask=mask, **changes)

    def _attend_inside_documents(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefixes: Prefixes | None,
        scale: float,
        longest: int,
    ) -> Tensor:
        """Causal attention inside packed documents, or where there are none marked, inside whole rows."""
        starts, window = call.options.get("cu_seq_lens_q"), call.options.get("sliding_window")
        window = None if window is None or window >= longest else window
        if starts is None and window is not None:  # kernels for whole rows know no windows
            starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) * longest
        plain = call.implementation == "sdpa" and call.is_plain
        if not (plain and has_token_kernel(query, value, None, packed=starts is not None)):
            raise UnsupportedModelError(
                f"{self._name(call)} cannot attend inside packed documents on {query.device.type} in {query.dtype}. "
                "Give the documents as rows of a padded batch."
            )
        packing = None if starts is None else Packing(starts, longest)
        output = merged_attention(
            query, key, value, prefixes, scale=scale, is_causal=starts is None, packing=packing, window=window
        )
        return output.transpose(1, 2).contiguous()

    def _name(self, call: AttentionCall) -> str:
        return next(name for name, module in self._modules.items() if module is call.module)


def _head_source(rows: Sequence[PrefixSource | None]) -> PrefixSource | None:
    """A prefix with the head that all rows share, if they have one."""
    sources = list({id(source): source for source in rows}.values())
    first, *others = [None if source is None else source.head for source in sources]
    for other in others:
        same = first is None and other is None
        if first is not None and other is not None:
            same = first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
        if not same:
            raise ConfigError(
                "The rows of one batch have prefixes with different heads, or some have none; a model has one head at a "
                "time. Put the rows of each prefix in a batch of their own."
            )
    return None if first is None else sources[0]


def _positions(given: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Positions of the tokens as the attention mask places them, or after what the cache holds."""
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.to(device).long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return torch.arange(length, device=device)[None] + _past(given)


def _past(given: dict[str, Any]) -> int | Tensor:
    """How many tokens the cache holds; found by its type, as Transformers calls it past_key_values, or cache since 5.24."""
    return next((value.get_seq_length() for value in given.values() if isinstance(value, Cache)), 0)
