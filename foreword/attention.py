"""A model's attention: where it is, and how to step into its calls. Only this file knows Transformers' registry.

A model looks its attention function up in a registry by the name in its config, `sdpa` for instance. We register a
function `foreword_sdpa` that wraps the one in use, and its mask function under the same name, then change the name in
the model's config. Attention modules that carry a handler are handled; all others pass through.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import ConfigError, UnsupportedModelError
from .prefix import AttentionSite

__all__ = [
    "AttentionCall",
    "attention_sites",
    "entry_module",
    "first_position",
    "install",
    "intercept",
    "position_limit",
    "takes_positions",
]

_NAME, _HANDLER = "foreword_", "_foreword_handler"
_SUPPORTED = ("sdpa", "eager")


@dataclass
class AttentionCall:
    """One call of an attention function. `run` calls the implementation that the model would use without us."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    implementation: str
    module: nn.Module
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, G, S, D]
    value: Tensor  # [B, G, S, E]
    mask: Tensor | None
    options: dict[str, Any]

    def run(self, **changes: Any) -> tuple[Tensor, Tensor | None]:
        """The output `[B, T, H, E]` and the attention weights, where the implementation returns them."""
        used = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask} | changes
        return self.function(self.module, used["query"], used["key"], used["value"], used["mask"], **self.options)

    @property
    def is_causal(self) -> bool:
        """Whether the implementation would apply a causal mask of its own."""
        if self.implementation == "eager" or self.mask is not None:
            return False
        causal = self.options.get("is_causal")
        return self.query.shape[2] > 1 and (getattr(self.module, "is_causal", True) if causal is None else causal)


Handler = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]

# --------------------------------------------------------------------------------------------------- interception


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(module).__name__} runs with attn_implementation='eager', and its module {type(module).__module__} has "
        "no eager_attention_forward to wrap. Load the model with attn_implementation='sdpa'."
    )


def _register(implementation: str) -> str:
    name = _NAME + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(module, query, key, value, attention_mask, **options):
            function = _eager(module) if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
            handler: Handler | None = module.__dict__.get(_HANDLER)
            if handler is None:
                return function(module, query, key, value, attention_mask, **options)
            return handler(AttentionCall(function, implementation, module, query, key, value, attention_mask, options))

        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        # Without a mask function under the same name the model would get no mask at all, and drop padding silently.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def install(model: PreTrainedModel, handlers: dict[nn.Module, Handler]) -> Callable[[], None]:
    """Route the attention of `handlers`' modules through them; returns what undoes it."""
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    for implementation in {name for name in before.values() if name is not None}:
        if implementation.startswith(_NAME):
            raise ConfigError(
                f"{type(model).__name__} has a prefix attached already. Detach it first, or change what it sees with "
                "Attachment.use(...): one prefix, or a list with one prefix or None for each row."
            )
        if implementation not in _SUPPORTED:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs with attn_implementation={implementation!r}; a prefix can be attached to "
                f"{' and '.join(_SUPPORTED)}. Load the model with attn_implementation='sdpa'."
            )
    for key, config in configs.items():
        if (name := before[key]) is not None:
            config._attn_implementation_internal = _register(name)
    for module, handler in handlers.items():
        setattr(module, _HANDLER, handler)

    def undo() -> None:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module in handlers:
            delattr(module, _HANDLER)

    return undo


@contextmanager
def intercept(model: PreTrainedModel, handler: Handler, names: Sequence[str] | None = None) -> Iterator[None]:
    """Inside, every attention call of the named modules (default: all) goes to `handler`."""
    modules = list(model.modules()) if names is None else [model.get_submodule(name) for name in names]
    undo = install(model, dict.fromkeys(modules, handler))
    try:
        yield
    finally:
        undo()


# -------------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class _Anatomy:
    """What one probe forward finds out about a model."""

    sites: tuple[AttentionSite, ...]
    entry: str  # the innermost module whose forward takes the tokens of all sites
    takes_positions: bool
    first_position: int  # what the model gives its first token when it is given no positions
    max_positions: int | None  # how many learned positions there are, if there are any


_anatomies: "weakref.WeakKeyDictionary[nn.Module, _Anatomy]" = weakref.WeakKeyDictionary()


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Every attention module of the model that can carry a prefix, found by one forward pass over four tokens.

    Raises:
        UnsupportedModelError: no attention goes through Transformers' attention registry, or the model is of a kind
            that Foreword cannot run.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> [site.name for site in attention_sites(LlamaForCausalLM(config))]
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
    """
    return _anatomy(model).sites


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model is causal and places its tokens by `position_ids`, so that a prefix has to shift them."""
    return _anatomy(model).takes_positions


def first_position(model: PreTrainedModel) -> int:
    """The position that the model itself gives its first token: 0, except where a table of positions keeps rows free."""
    return _anatomy(model).first_position


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has learned, if it learned any: prefix and text must fit in."""
    return _anatomy(model).max_positions


def entry_module(model: PreTrainedModel) -> nn.Module:
    """The innermost pretrained model around all sites: the model below its head."""
    return model.get_submodule(_anatomy(model).entry)


def _anatomy(model: PreTrainedModel) -> _Anatomy:
    if model not in _anatomies:
        _anatomies[model] = _probe(model)
    return _anatomies[model]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> _Anatomy:
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder; this version attaches to models with one stack only."
        )
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{kind} reads {model.main_input_name!r}; this version needs 'input_ids'.")
    names = {module: name for name, module in model.named_modules()}
    sites: dict[str, AttentionSite] = {}
    starts: list[tuple[int, int]] = []  # of each lookup by position: the first index, and how many positions fit

    def record(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        causal = call.options.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        sites[names[call.module]] = AttentionSite(
            names[call.module],
            "self" if causal else "encoder",
            num_kv_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
            sliding_window=call.options.get("sliding_window"),
        )
        return call.run()

    def look_up(module: nn.Embedding, args: tuple[Any, ...]) -> None:
        index = args[0].reshape(-1) if args and isinstance(args[0], Tensor) else torch.empty(0)
        if len(index) == 4 and bool((index.diff() == 1).all()):  # looked up by position: the token ids are all equal
            starts.append((int(index[0]), module.num_embeddings - int(index[0])))

    tokens = torch.full((1, 4), 5, device=model.device)
    training = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_pre_hook(look_up) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model.eval()
        with intercept(model, record):
            model(input_ids=tokens, use_cache=False)
        name = _entry(model, list(sites))
        entry, own = model.get_submodule(name), list(starts)
        causal = any(site.kind == "self" for site in sites.values())
        positions = causal and "position_ids" in inspect.signature(entry.forward).parameters
        if positions and own:
            entry(input_ids=tokens, position_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not sites:
        raise UnsupportedModelError(
            f"{kind} does not call its attention through Transformers' attention registry, so nothing can be attached."
        )
    first = own[0][0] - starts[len(own)][0] if len(starts) > len(own) else 0
    return _Anatomy(tuple(sites.values()), name, positions, first, min((room for _, room in own), default=None))


def _entry(model: PreTrainedModel, sites: list[str]) -> str:
    """The innermost pretrained model around all sites, preferring one that takes `position_ids`."""
    around = [
        (name, "position_ids" in inspect.signature(module.forward).parameters)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(s.startswith(f"{name}.") or not name for s in sites)
    ]
    return max(around, key=lambda entry: (entry[1], len(entry[0])))[0]
