"""What a model is made of, as one probe forward finds it: stacks of layers, their attention sites, their positions.

A *stack* is the innermost pretrained model around a site: a decoder-only model has one, an encoder-decoder two, a model
of text and images one for each. No table of model families.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .attention import AttentionCall, intercept
from .errors import ConfigError, ForewordError, UnsupportedModelError
from .heads import own_parameters
from .prefix import AttentionSite

__all__ = [
    "Stack",
    "attention_sites",
    "input_device",
    "layers_with_sites",
    "layers_without_sites",
    "place",
    "sample_inputs",
    "stacks",
    "text_room",
    "text_stack",
]

_TOKEN, _TOKENS, _DECODER_TOKENS = 5, 4, 3  # two lengths, so that cross-attention shows itself


@dataclass(frozen=True)
class Stack:
    """The part of a model whose forward is given the tokens (or patches, or frames) of some sites."""

    name: str  # of the module
    sites: tuple[AttentionSite, ...]
    takes_positions: bool  # causal, and places its tokens by `position_ids`, so that a prefix has to shift them
    first_position: int = 0  # what it gives its first token when it is given no positions; some tables keep rows free
    position_limit: int | None = None  # how many positions it has learned, if any: prefix and text must fit in


@dataclass(frozen=True)
class _Anatomy:
    stacks: tuple[Stack, ...]
    inputs: Mapping[str, Any] | None  # what the caller gave to probe with


_anatomies: "weakref.WeakKeyDictionary[nn.Module, _Anatomy]" = weakref.WeakKeyDictionary()


def attention_sites(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> tuple[AttentionSite, ...]:
    """Every attention module of the model that can carry a prefix, found by one forward pass over a few tokens.

    Args:
        model: a Transformers model.
        inputs: what to call the model with in that pass, for a model that needs other inputs than token ids, pixel
            values or log-mel features. Sites that these inputs do not reach get no prefix. Remembered for this model.

    Raises:
        UnsupportedModelError: no attention goes through Transformers' attention registry, or the model cannot be called
            with made-up inputs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> [site.name for site in attention_sites(LlamaForCausalLM(config))]
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
    """
    if inputs is not None:
        _anatomies[model] = _probe(model, inputs)
    return tuple(site for stack in stacks(model) for site in stack.sites)


def stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The model's stacks that have attention sites."""
    if model not in _anatomies:
        _anatomies[model] = _probe(model, None)
    return _anatomies[model].stacks


def text_stack(model: PreTrainedModel) -> Stack:
    """The one stack of a model that reads token ids and nothing else.

    Raises:
        ConfigError: the model has several stacks, or reads something else.
    """
    first, *others = stacks(model)
    if others or model.main_input_name != "input_ids":
        raise ConfigError(
            f"A prefix for {type(model).__name__} cannot start from text: the model has {1 + len(others)} stacks with "
            f"attention and reads {model.main_input_name!r}. Start it with initialization='random' or 'noop'."
        )
    return first


def text_room(model: PreTrainedModel, num_virtual_tokens: int = 0) -> int | None:
    """How many tokens a text may have beside a prefix, if the model has learned so many positions and no more."""
    limited = [stack for stack in stacks(model) if stack.position_limit is not None]
    rooms = [(s.position_limit or 0) - num_virtual_tokens * s.takes_positions for s in limited]
    return min(rooms, default=None)


def sample_inputs(model: PreTrainedModel, length: int, generator: torch.Generator) -> dict[str, Any]:
    """Random inputs that reach every site: `length` tokens, or one image, or one window of sound."""
    if model in _anatomies and (given := _anatomies[model].inputs) is not None:
        return dict(given)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 2)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    return _inputs(model, tokens, tokens, generator)


def _inputs(
    model: PreTrainedModel, tokens: Tensor, decoder_tokens: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Arguments for the model's forward, as far as its config tells their shapes."""
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = tokens
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = decoder_tokens
    # A model that inserts images into its text has a token for them; without one, image and text go side by side.
    vision = getattr(config, "vision_config", config)
    images = "pixel_values" in parameters and hasattr(vision, "image_size")
    if images and not any("image_token" in key for key in vars(config)):
        size = vision.image_size
        shape = (1, vision.num_channels, *((size, size) if isinstance(size, int) else size))
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_features" in parameters and hasattr(config, "num_mel_bins"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    return {
        name: value.to(input_device(model), model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def layers_without_sites(model: PreTrainedModel) -> list[str]:
    """The layers that no prefix reaches, beside others that have attention: state spaces, convolutions, linear attention."""
    reached = {name for name, _ in layers_with_sites(model)}
    rows = [[name for name, _ in row] for row in _layers(model)]
    return [layer for row in rows if reached & set(row) for layer in row if layer not in reached]


def layers_with_sites(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The layers that hold attention sites, by name."""
    sites = [site.name for site in attention_sites(model)]
    layers = [layer for row in _layers(model) for layer in row]
    return [(name, layer) for name, layer in layers if any(site.startswith(f"{name}.") for site in sites)]


def _layers(model: PreTrainedModel) -> list[list[tuple[str, nn.Module]]]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [[(f"{name}.{number}", layer) for number, layer in module.named_children()] for name, module in lists]


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: where its first weight in memory is, as a `device_map` may leave some on the disk."""
    return next((weight.device for _, weight in own_parameters(model) if not weight.is_meta), torch.device("cpu"))


def place(module: nn.Module, positions: Callable[[int], Tensor]) -> RemovableHandle:
    """Until the handle is removed, the module of a stack gets the positions that the number of its tokens is mapped to."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return args, kwargs | {"position_ids": positions(tokens.shape[1])[None].to(tokens.device)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


# -------------------------------------------------------------------------------------------------------- the probe


@torch.no_grad()
def _probe(model: PreTrainedModel, given: Mapping[str, Any] | None) -> _Anatomy:
    if given is None:
        tokens = torch.full((1, _TOKENS), _TOKEN)
        inputs: Mapping[str, Any] = _inputs(
            model, tokens, tokens[:, :_DECODER_TOKENS], torch.Generator().manual_seed(0)
        )
    else:
        inputs = given
    names = {module: name for name, module in model.named_modules()}
    sites: dict[str, AttentionSite] = {}
    lookups: list[tuple[str, int, int]] = []  # by position: the table's name, the first index, how many positions fit

    def record(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        crossing = call.key.shape[2] != call.query.shape[2]
        sites[names[call.module]] = AttentionSite(
            names[call.module],
            "cross" if crossing else "self" if call.causal_module else "encoder",
            num_kv_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
            sliding_window=call.options.get("sliding_window"),
        )
        return call.run()

    def look_up(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            index = value.reshape(-1) if isinstance(value, Tensor) else torch.empty(0)
            # Looked up by position: the token ids are all equal.
            if len(index) in (_TOKENS, _DECODER_TOKENS) and bool((index.diff() == 1).all()):
                lookups.append((names[module], int(index[0]), module.num_embeddings - int(index[0])))

    training = {module: module.training for module in model.modules()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_pre_hook(look_up, with_kwargs=True) for table in tables]
    try:
        model.eval()
        with intercept(model, record):
            _call(model, inputs)
        found = _group(model, tuple(sites.values()))
        by_default = list(lookups)
        lookups.clear()
        placed = [name for name, (_, takes) in found.items() if takes]
        if by_default and placed:
            hooks += [place(model.get_submodule(name), torch.arange) for name in placed]
            _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call its attention through Transformers' attention registry, so nothing "
            "can be attached."
        )
    made = []
    for name, (own, takes) in found.items():
        first, limit = _positions(name, by_default, lookups)
        made.append(Stack(name, own, takes, first, limit))
    return _Anatomy(tuple(made), given)


def _call(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        model(**inputs, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if isinstance(error, ForewordError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be probed with {', '.join(inputs) or 'no inputs'} "
            f"({type(error).__name__}: {error}). Call foreword.attention_sites(model, inputs) first, with a dictionary "
            "of small inputs that the model accepts."
        ) from error


def _group(
    model: PreTrainedModel, sites: tuple[AttentionSite, ...]
) -> dict[str, tuple[tuple[AttentionSite, ...], bool]]:
    """By stack its sites, and whether it places tokens by `position_ids`."""
    takes = {
        name: "position_ids" in inspect.signature(module.forward).parameters
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    owned: dict[str, list[AttentionSite]] = {}
    for site in sites:
        around = [name for name in takes if not name or site.name.startswith(f"{name}.")]
        # For decoders the innermost one that can be told positions, if any can.
        chosen = max(around, key=lambda name: (site.kind != "encoder" and takes[name], len(name)))
        owned.setdefault(chosen, []).append(site)
    return {name: (tuple(own), takes[name] and any(site.kind == "self" for site in own)) for name, own in owned.items()}


def _positions(
    stack: str, by_default: list[tuple[str, int, int]], placed: list[tuple[str, int, int]]
) -> tuple[int, int | None]:
    """The position that the stack gives its first token by itself, and how many positions it has learned."""
    inside = [entry for entry in by_default if not stack or entry[0].startswith(f"{stack}.")]
    starts = {name: first for name, first, _ in placed}
    first = next((first - starts[name] for name, first, _ in inside if name in starts), 0)
    return first, min((room for _, _, room in inside), default=None)
