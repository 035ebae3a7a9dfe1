"""Several processes that train together, as torchrun and `accelerate launch` start them: what is decided by the first, what
is added up, and a base whose layers are spread over them.

Nothing is wrapped around the model. What is trained is small, so every process holds all of it, computes the gradient of its share of
a batch, and the sums are the same numbers on each: so are the optimizer's steps and every decision that follows from them.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .anatomy import layers_with_sites, layers_without_sites, stacks
from .errors import ConfigError, ForewordError
from .fingerprint import remember_fingerprint
from .quantized import is_quantized

__all__ = ["add_up", "from_first", "is_sharded", "join", "leave", "own_device", "shard", "world_size"]

T = TypeVar("T")

_WRAPPING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def world_size() -> int:
    """How many processes were started together, before or after they have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(asked: str | None) -> torch.device:
    """The device of this process: the one asked for, else the accelerator, of several the one with this process's number.

    Raises:
        ConfigError: several processes would share an accelerator.
    """
    device = torch.device(asked or torch.accelerator.current_accelerator() or "cpu")
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ConfigError(
            f"device is {device}, but {world_size()} processes were started and each needs a device of its own. Leave it "
            f"out, or give {device.type!r}; choose among them with CUDA_VISIBLE_DEVICES."
        )
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if number >= count:
        raise ConfigError(
            f"Process {number} of this machine has no device: there are {count}. Start at most {count} processes here "
            f"(--nproc-per-node {count}), or train on the CPU (--device cpu)."
        )
    return torch.device(device.type, number)


def join(device: torch.device, **options: Any) -> Accelerator:
    """Meet the other processes, if there are any. `device`: where this one's model is.

    Raises:
        ConfigError: Accelerate is configured to wrap the model in a way that training does not, or the model is on the device
            of another process.
    """
    accelerator = Accelerator(cpu=device.type == "cpu", **options)
    if accelerator.distributed_type in _WRAPPING:
        raise ConfigError(
            f"Accelerate is configured for {accelerator.distributed_type.value}, but nothing is wrapped here: what is trained is "
            "small. Launch plain processes (accelerate launch --multi_gpu, or torchrun); --shard spreads the base over them."
        )
    if accelerator.num_processes > 1 and device.type == "cuda" and device != accelerator.device:
        raise ConfigError(
            f"The model is on {device}, but process {accelerator.process_index} has {accelerator.device} for its own. Load it "
            "with foreword.load_base, which knows, or move it there."
        )
    return accelerator


def leave() -> None:
    """Part from the other processes at the end."""
    if dist.is_initialized():
        PartialState().destroy_process_group()


def add_up(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the processes, in one exchange."""
    if not tensors or not _several():
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes; a mistake that it finds is raised in all of them."""
    if not _several():
        return make()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except (ForewordError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Spread the model's layers over the processes: each holds a share of every layer, and gathers a layer for as long as it runs.

    Frozen weights have no gradients, so nothing else is exchanged. What is outside the layers, embeddings and head, is
    needed all through a step and stays whole in each process. A model that lies in the CPU's memory goes to the device layer by
    layer, so no device ever holds all of it.

    Raises:
        ConfigError: there is one process only, or the weights are quantized.
    """
    if world_size() == 1:
        raise ConfigError(
            "shard spreads the base over several processes, but only one was started. Start them with "
            "torchrun --nproc-per-node N -m foreword train ... --shard, or leave --shard out."
        )
    if any(is_quantized(module) for module in model.modules()):
        raise ConfigError("A quantized base cannot be spread over processes. Leave shard out, or load it in bfloat16.")
    join(device)
    remember_fingerprint(model)
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (world_size(),))
    layers = [*(name for name, _ in layers_with_sites(model)), *layers_without_sites(model)]
    for name in sorted(layers, key=lambda name: -name.count(".")):  # those inside others first
        fully_shard(model.get_submodule(name), mesh=mesh)
    whole = {weight for weight in model.parameters() if not isinstance(weight, DTensor)}
    for stack in stacks(model):  # so that they gather their layers one ahead
        fully_shard(model.get_submodule(stack.name), mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether layers are spread over processes (FSDP2), which then have to call the model together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
