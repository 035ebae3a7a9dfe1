"""Foreword's prefixes inside vLLM: a KV connector, which fills the pages of a request's first P tokens from a prefix file.

Installing Foreword beside vLLM is enough for vLLM to know it by name (entry point `vllm.general_plugins`):

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "ForewordConnector", "kv_role": "kv_both",
                                            "kv_connector_extra_config": {"prefixes": "FOLDER"}}'

A request names its prefix in `kv_transfer_params: {"prefix": NAME}`, repeats the first id of its prompt as many times as the
prefix has virtual tokens, and carries the SHA-256 of the prefix's file as `cache_salt`: vLLM's own cache of computed
pages goes by token ids and salt, so that without it one prefix would be taken for another. `vllm_engine` does all that. The
ids in front only hold the places; that they are the prompt's own first shows that they were put there on purpose: a text, or a
chat that vLLM rendered, would lose its beginning to the prefix.
What is wrong with a request fails that request before its first token; vLLM gives no reasons to clients, so it is in the log.

This is the only file that knows vLLM's interface of connectors, and it is not imported outside vLLM.
"""

# pyright: reportMissingImports=false

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .errors import EngineError, ForewordError
from .shelf import CONNECTOR, Shelf, Shelved, checkpoint_folder, layer_number, own_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["ForewordConnector", "register"]

_ON_DEVICE = 64  # prefixes that a worker keeps
logger = init_logger(__name__)


def register() -> None:
    """Make the connector known to vLLM by its name. vLLM may call this several times."""
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, __name__, CONNECTOR)


@dataclass
class _Load:
    """Virtual tokens `start` to `stop` of a prefix, for the pages of one request."""

    prefix: Shelved
    start: int
    stop: int
    blocks: list[int]


@dataclass
class _Step(KVConnectorMetadata):
    """What the scheduler tells the workers for one step."""

    loads: list[_Load] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # ids of requests


@dataclass
class _Plan:
    """What becomes of a request that names a prefix."""

    name: str
    prefix: Shelved | None = None
    error: str | None = None
    computed: int = 0  # tokens that vLLM's own cache has
    used: bool = False


class ForewordConnector(KVConnectorBase_V1, SupportsHMA):
    """One in vLLM's scheduler, which decides, and one in each worker, which writes pages."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check_cache(vllm_config, kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._plans: dict[str, _Plan] = {}
        self._step = _Step()
        self._failed_blocks: set[int] = set()
        self._tensors: OrderedDict[str, dict[int, tuple[Tensor, Tensor]]] = OrderedDict()
        if role is KVConnectorRole.SCHEDULER:
            folder = self._kv_transfer_config.get_from_extra_config("prefixes", None)
            if folder is None:
                raise EngineError(
                    'kv_connector_extra_config has no "prefixes": name the folder with prefix files there.'
                )
            model = vllm_config.model_config
            weights = checkpoint_folder(model.model, model.revision, vllm_config.load_config.download_dir)
            self._shelf = Shelf(Path(folder), model.hf_text_config, weights)

    # ---------------------------------------------------------------------------------------------- in the scheduler

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """The virtual tokens that vLLM's own cache lacks; or one that never arrives, for a request to be refused."""
        if not request.kv_transfer_params:
            return 0, False
        plan = self._plans.get(request.request_id) or self._plan(request)
        self._plans[request.request_id] = plan
        plan.computed = num_computed_tokens
        if plan.error is None and plan.prefix is not None:
            return max(0, plan.prefix.virtual_tokens - num_computed_tokens), False
        # A load that fails is how a connector ends one request with an error. Nothing else may keep vLLM from it.
        request.skip_reading_prefix_cache = False
        return (1, True) if num_computed_tokens < request.num_tokens else (0, False)

    def _plan(self, request: "Request") -> _Plan:
        params = request.kv_transfer_params or {}
        name = str(params.get("prefix"))
        try:
            if "prefix" not in params:
                raise EngineError(
                    f'kv_transfer_params has {", ".join(params)}, expected "prefix": the name of a prefix.'
                )
            prefix = self._shelf.find(name)
            length, sampling, ids = prefix.virtual_tokens, request.sampling_params, request.prompt_token_ids or []
            if request.cache_salt != prefix.digest:
                raise EngineError(
                    f"cache_salt is {request.cache_salt!r}, and the file of prefix {name!r} has the SHA-256 {prefix.digest}. Without it "
                    "vLLM would mix up what it cached for different prefixes."
                )
            if len(ids) <= length or len(set(ids[: length + 1])) > 1:
                raise EngineError(
                    f"The prompt of {len(ids)} ids begins with {ids[:4]}..., expected its first id {length} times in front, to hold "
                    f"the places of prefix {name!r}. A text, or a chat that vLLM renders, has no such places: send ids."
                )
            if sampling is not None and sampling.prompt_logprobs is not None:
                raise EngineError("prompt_logprobs: vLLM drops the prefix to compute them. Leave them out.")
            if request.skip_reading_prefix_cache:
                raise EngineError("skip_reading_prefix_cache: vLLM drops the prefix with it. Leave it out.")
        except (ForewordError, OSError) as error:
            logger.error("Request %s refused: %s", request.request_id, error)
            return _Plan(name, error=str(error))
        return _Plan(name, prefix)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Note which pages the virtual tokens go to."""
        plan = self._plans.get(request.request_id)
        if plan is None or (plan.error is not None and num_external_tokens == 0):
            return
        if plan.error is not None or plan.prefix is None:
            self._step.refused.add(request.request_id)
            return
        stop = plan.prefix.virtual_tokens
        plan.used = num_external_tokens > 0 or plan.computed >= stop or request.num_cached_tokens >= stop
        if num_external_tokens > 0:
            self._step.loads.append(
                _Load(plan.prefix, stop - num_external_tokens, stop, list(blocks.get_block_ids()[0]))
            )

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """What the workers have to do in this step."""
        step, self._step = self._step, _Step()
        return step

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """What the answer says about its prefix."""
        plan = self._plans.pop(request.request_id, None)
        if plan is None:
            return False, None
        if plan.prefix is None:
            return False, None
        about = {"digest": plan.prefix.digest, "virtual_tokens": plan.prefix.virtual_tokens}
        return False, {"prefix": plan.name, "used": plan.used} | about

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same; there is one group."""
        return self.request_finished(request, block_ids[0])

    # ------------------------------------------------------------------------------------------------ in the workers

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Write the prefixes of this step's new requests into their pages."""
        step = self._get_connector_metadata()
        assert isinstance(step, _Step)
        for load_ in step.loads:
            try:
                self._write(forward_context, load_)
            except (ForewordError, OSError) as error:
                logger.error("Prefix %s could not be loaded: %s", load_.prefix.path, error)
                self._failed_blocks.update(load_.blocks[: -(-load_.stop // self._block_size)])

    @torch.no_grad()
    def _write(self, forward_context: "ForwardContext", load_: _Load) -> None:
        layers = {
            layer_number(name): layer
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None
        }
        tensors = self._on_device(load_.prefix, layers)
        device = next(iter(layers.values())).kv_cache.device
        places = torch.arange(load_.start, load_.stop, device=device)
        blocks = torch.tensor(load_.blocks, device=device)
        slots = blocks[places // self._block_size] * self._block_size + places % self._block_size
        for number, layer in layers.items():
            key, value = (tensor[load_.start : load_.stop] for tensor in tensors[number])
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def _on_device(self, prefix: Shelved, layers: dict[int, Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer the keys and values of this worker's heads."""
        if prefix.digest in self._tensors:
            self._tensors.move_to_end(prefix.digest)
            return self._tensors[prefix.digest]
        loaded = prefix.load()
        entries = dict(
            zip(map(layer_number, (s.name for s in loaded.sites)), loaded.cached_layers("vLLM"), strict=True)
        )
        if missing := layers.keys() - entries.keys():
            raise EngineError(f"{prefix.path}: has nothing for layer {min(missing)}.")
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        dtype = self._vllm_config.model_config.dtype
        found = {}
        for number, layer in layers.items():
            pair = [
                own_heads(tensor.detach(), rank, ranks, layer.num_kv_heads)
                .to(layer.kv_cache.device, dtype)
                .contiguous()
                for tensor in entries[number][:2]
            ]
            found[number] = (pair[0], pair[1])
        self._tensors[prefix.digest] = found
        if len(self._tensors) > _ON_DEVICE:
            self._tensors.popitem(last=False)
        return found

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The refused requests, as loads that failed."""
        step = self._get_connector_metadata()
        assert isinstance(step, _Step)
        return KVConnectorTransferResults(finished_recving=set(step.refused), failed_recving=set(step.refused))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The pages of prefixes that could not be read."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: all is written before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: prefixes are only read."""

    def wait_for_save(self) -> None:
        """Nothing, as nothing is saved."""


def _check_cache(config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> None:
    """Raise an `EngineError` if vLLM keeps keys and values in a way that no prefix can be written into."""
    groups = kv_cache_config.kv_cache_groups
    specs = [
        spec
        for group in groups
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {0: group.kv_cache_spec}).values()
    ]
    plain = all(
        type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None
        for spec in specs
    )
    if len(groups) != 1 or not plain:
        kinds = sorted({type(spec).__name__ for spec in specs})
        raise EngineError(
            f"vLLM keeps the cache of {config.model_config.model} as {', '.join(kinds)} in {len(groups)} groups. Prefixes can be "
            "written into full attention alone: sliding windows let them slide out of view, and recurrent layers and latent "
            "attention have no keys and values. Use foreword serve, without --engine vllm."
        )
    if config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise EngineError(
            f"--kv-cache-dtype {config.cache_config.cache_dtype} would round the prefixes. Leave it out, or use auto."
        )
    if config.kv_transfer_config is not None and config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise EngineError(
            'kv_load_failure_policy must be "fail": with "recompute" vLLM would answer without a prefix that cannot be loaded.'
        )
