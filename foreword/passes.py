"""How the model's forward and backward passes run while training: as CUDA graphs, compiled, with checkpoints, with dropout."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .anatomy import input_device, layers_with_sites
from .data import Batch

__all__ = ["Graphs", "checkpointed", "compiled", "dropout", "stream_of_its_own"]


class Graphs:
    """Forward and backward pass as CUDA graphs, one for each shape of batch that comes again."""

    def __init__(self) -> None:
        self._met: dict[Any, int] = {}
        self._captured: dict[Any, tuple[Batch, torch.cuda.CUDAGraph, Tensor]] = {}
        self._works: bool | None = None  # unknown yet

    def run(self, runs: tuple[int, ...], batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """What `compute` returns for the batch. The first times that a shape comes, by calling it."""
        key = runs, batch.shape
        self._met[key] = self._met.get(key, 0) + 1
        if self._met[key] == 1 or self._works is False:
            return compute(batch)
        if self._works is None:
            return self._try(batch, compute)
        if key not in self._captured:
            pool = next((graph.pool() for _, graph, _ in self._captured.values()), None)  # they run one at a time
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                losses = compute(batch)
            self._captured[key] = batch, graph, losses
        own, graph, losses = self._captured[key]
        for name, value in vars(batch).items():
            if isinstance(value, Tensor) and value is not getattr(own, name):
                getattr(own, name).copy_(value)
        graph.replay()
        return losses.clone()

    def _try(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """Compute, and see whether the model waits for the device, which a graph cannot hold."""
        before, counts = torch.cuda.get_sync_debug_mode(), dict(torch._dynamo.utils.counters["stats"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                losses = compute(batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        if counts != dict(torch._dynamo.utils.counters["stats"]):  # compiling waits as well: look again next time
            return losses
        waits = [str(warning.message) for warning in found if "synchronizing CUDA" in str(warning.message)]
        self._works = not waits
        if waits:
            warnings.warn(
                f"No CUDA graphs, so steps are slower: the model waits for the device. {waits[0]}", stacklevel=2
            )
        return losses

    def clear(self) -> None:
        """Give their memory back."""
        self._captured.clear()


@contextmanager
def stream_of_its_own() -> Iterator[None]:
    """Inside, work goes to a new stream, as the default one cannot be captured."""
    outer, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's layers are compiled, each as one graph that all share."""
    layers = [layer for _, layer in layers_with_sites(model)]
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a layer keeps its inputs for the backward pass, which computes it once more, and nothing between.

    Transformers' own checkpointing works in training mode only, which would bring the model's dropout.
    """
    layers = [layer for _, layer in layers_with_sites(model)]
    before = [layer._compiled_call_impl for layer in layers]
    for layer, call in zip(layers, before, strict=True):
        layer._compiled_call_impl = partial(_again, call or layer._call_impl, layer)
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


def _again(call: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the layer, now and once more in the backward pass; the same elements drop out, if any do."""
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=layer.training, **kwargs)


@contextmanager
def dropout(model: PreTrainedModel, seed: str) -> Iterator[None]:
    """Inside, the model drops out as it did when it was pretrained; what it counts about its inputs stays as it is."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    device = input_device(model)
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(random.Random(seed).getrandbits(63))
            yield
    finally:
        model.eval()
