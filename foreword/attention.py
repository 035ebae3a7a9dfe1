"""Step into a model's attention calls. Only this file knows Transformers' attention registry.

A model looks its attention function up in a registry by the name in its config, `sdpa` for instance. We register a
function `foreword_sdpa` that wraps the one in use, and its mask function under the same name, then change the name in
the model's config. Attention modules that carry a handler are handled; all others pass through.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import ConfigError, UnsupportedModelError

__all__ = ["AttentionCall", "install", "intercept"]

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
        used = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask} | self.options | changes
        tensors = [used.pop(name) for name in ("query", "key", "value", "mask")]
        return self.function(self.module, *tensors, **used)

    @property
    def causal_module(self) -> bool:
        """Whether this attention looks only backwards."""
        causal = self.options.get("is_causal")
        return getattr(self.module, "is_causal", True) if causal is None else causal

    @property
    def is_plain(self) -> bool:
        """Whether it is a softmax over scaled products and nothing else."""
        others = ("position_bias", "softcap", "s_aux", "cache")
        return not self.options.get("dropout") and all(self.options.get(name) is None for name in others)

    @property
    def is_causal(self) -> bool:
        """Whether the implementation would apply a causal mask of its own."""
        if self.implementation == "eager" or self.mask is not None:
            return False
        return self.query.shape[2] > 1 and self.causal_module


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
