"""An engine whose model runs in vLLM: paged attention, several GPUs, vLLM's own cache of computed pages.

Stands where `batching.BatchingEngine` stands. It puts the placeholders before each prompt, sets the salt of vLLM's cache from
the content of the prefix, and looks at each answer for whether its prefix was used: vLLM drops prefixes silently when it is
asked the wrong way. The other half is `vllm_connector`, inside vLLM.
"""

# pyright: reportMissingImports=false

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from .engine import Emit, Event, Failed, Finished, Request, Sampling, Stats, Token
from .errors import (
    ConfigError,
    ForewordError,
    OverloadedError,
    PositionError,
    PrefixChangedError,
    ServingError,
    ShutdownError,
)
from .prefix import Prefix
from .shelf import CONNECTOR, Shelf, checkpoint_folder, file_digest

__all__ = ["VllmEngine", "VllmLimits"]


@dataclass(frozen=True)
class VllmLimits:
    """What vLLM may use.

    Args:
        rows: requests that run at a time.
        waiting: requests that may wait.
        length: tokens that a request may have, virtual ones included; by default what the model was made for.
        tensor_parallel: GPUs that the model is split over.
    """

    rows: int = 256
    waiting: int = 1024
    length: int | None = None
    tensor_parallel: int = 1


class VllmEngine:
    """An `engine.Engine` over one model in vLLM, whose workers run in processes of their own.

    Args:
        model: a folder or a Hugging Face id.
        store: the folder of prefixes, which the workers read.
        precision: `auto` as the checkpoint says, or a name of torch's.
        limits: what it may use.
        options: further options of vLLM's engine (`vllm.AsyncEngineArgs`).

    Raises:
        ConfigError: vLLM cannot run the model so, or cannot give it prefixes: sliding windows, recurrent layers, latent attention.
    """

    def __init__(
        self,
        model: str,
        store: Path,
        precision: str = "auto",
        limits: VllmLimits | None = None,
        **options: Any,
    ) -> None:
        self.limits = limits or VllmLimits()
        connector = KVTransferConfig(
            kv_connector=CONNECTOR, kv_role="kv_both", kv_connector_extra_config={"prefixes": str(store.resolve())}
        )
        arguments = AsyncEngineArgs(
            model=model,
            dtype=precision,  # pyright: ignore[reportArgumentType]
            max_model_len=self.limits.length,
            max_num_seqs=self.limits.rows,
            tensor_parallel_size=self.limits.tensor_parallel,
            enable_prefix_caching=True,
            kv_transfer_config=connector,
            generation_config="vllm",  # no settings of the checkpoint's, which a request would not know of
            disable_log_stats=True,
            **options,
        )
        try:
            self._llm = AsyncLLM.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"vLLM did not start with {model}: {error}\nWhat it could not do stands in its log above, at the first error."
            ) from error
        config = self._llm.vllm_config.model_config
        self._max_length: int = config.max_model_len
        self._shelf = Shelf(store, config.hf_text_config, checkpoint_folder(model))
        self._lock = threading.Lock()
        self._tasks: dict[str, Future[None]] = {}
        self._running, self._generated, self._hits, self._loads = 0, 0, 0, 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="foreword-vllm", daemon=True).start()

    @property
    def max_length(self) -> int:
        """How many tokens a request may have: virtual, prompt and answer together."""
        return self._max_length

    @property
    def failure(self) -> BaseException | None:
        """What stopped vLLM, if anything did."""
        return self._llm.dead_error if self._llm.errored else None

    def check(self, prefix: Prefix) -> None:
        """Raise a `ForewordError` if vLLM could not serve this prefix with this model."""
        self._shelf.check(prefix)

    def submit(self, request: Request, emit: Emit) -> None:
        """Put the request into vLLM's queue."""
        virtual = 0 if request.prefix is None else request.prefix.position_offset
        asked = virtual + len(request.prompt) + request.sampling.max_tokens
        if asked > self._max_length:
            raise PositionError(
                f"{virtual} virtual tokens, a prompt of {len(request.prompt)} and an answer of up to "
                f"{request.sampling.max_tokens} tokens make {asked}; at most {self._max_length} fit. Shorten the prompt or the answer."
            )
        with self._lock:
            if self._closed or self.failure is not None:
                raise ShutdownError(
                    f"The engine has failed: {self.failure}" if self.failure else "The server is shutting down."
                )
            if len(self._tasks) >= self.limits.rows + self.limits.waiting:
                raise OverloadedError(f"{len(self._tasks)} requests are running or waiting already. Try again later.")
            task = asyncio.run_coroutine_threadsafe(self._answer(request, emit), self._loop)
            self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))

    async def _answer(self, request: Request, emit: Emit) -> None:
        last: Event = Finished("cancelled")
        try:
            last = await self._stream(request, emit)
        except asyncio.CancelledError:
            if self._closed:
                last = Failed(ShutdownError("The server was shut down before the answer was whole."))
        except ForewordError as error:
            last = Failed(error)
        except Exception as error:  # noqa: BLE001  whatever vLLM raises ends this request, and emit has to be told
            last = Failed(ServingError(f"vLLM gave no answer: {type(error).__name__}: {error}"))
        emit(last)

    async def _stream(self, request: Request, emit: Emit) -> Event:
        """Emit the tokens; returns how the answer ended."""
        virtual, prompt, extra = 0, TokensPrompt(prompt_token_ids=list(request.prompt)), None
        if request.prefix is not None:
            await asyncio.to_thread(self._check_version, request)
            virtual = request.prefix.position_offset
            # Its own first id: a repetition penalty counts the places as a part of the prompt.
            ids = [request.prompt[0]] * virtual + list(request.prompt)
            prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=request.prefix.version)
            extra = {"kv_transfer_params": {"prefix": request.prefix.path.stem}}
        options = _options(request.sampling, extra)
        used = virtual == 0
        async for output in self._llm.generate(prompt, options, request.id):
            [part] = output.outputs
            if part.finish_reason == "error":
                await asyncio.to_thread(self._check_version, request)
                raise ServingError("vLLM refused the request. The reason stands in its log.")
            if not used and part.token_ids:
                if (output.num_cached_tokens or 0) < virtual:
                    raise ServingError(
                        f"vLLM answered without the prefix {request.prefix}: {output.num_cached_tokens} tokens were not "
                        f"computed, {virtual} are the prefix's. The answer was dropped."
                    )
                used, self._hits = True, self._hits + 1
            for place, token in enumerate(part.token_ids):
                if token not in request.sampling.stop_ids:
                    self._generated += 1
                    emit(_token(token, part.logprobs[place] if part.logprobs else None, request.sampling.logprobs))
            if part.finish_reason is not None:
                about = output.kv_transfer_params or {}
                if virtual and not about.get("used"):
                    raise ServingError(f"vLLM does not confirm that it used the prefix {request.prefix}.")
                return Finished("length" if part.finish_reason == "length" else "stop")
        raise ServingError("vLLM ended the answer without saying why.")

    def _check_version(self, request: Request) -> None:
        version = request.prefix
        if version is None:
            return
        try:
            digest = file_digest(version.path)
        except FileNotFoundError:
            digest = None
        if digest != version.version:
            raise PrefixChangedError(f"The prefix {version.name!r} was replaced or deleted before the request started.")
        self._shelf.find(version.path.stem)

    def cancel(self, request_id: str) -> None:
        """End a request soon."""
        if (task := self._tasks.get(request_id)) is not None:
            task.cancel()

    def stats(self) -> Stats:
        """The counts of now. vLLM's queue is its own: all that have not ended count as running."""
        return Stats(running=len(self._tasks), generated_tokens_total=self._generated, prefix_hits_total=self._hits)

    def close(self, timeout: float = 0.0) -> None:
        """Take no more requests, give those that it has `timeout` seconds, then fail the rest."""
        with self._lock:
            if self._closed:
                return
            tasks = list(self._tasks.values())
            if not timeout:
                self._closed = True
        if timeout:
            from concurrent.futures import wait

            wait(tasks, timeout)
            self._closed = True
        for task in list(self._tasks.values()):
            task.cancel()
        self._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)


def _options(sampling: Sampling, extra: dict[str, Any] | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias or None,
        logprobs=sampling.logprobs,
        stop_token_ids=sorted(sampling.stop_ids),
        ignore_eos=True,  # the stop tokens are told
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
    )


def _token(token: int, logprobs: Any, count: int | None) -> Token:
    if logprobs is None or count is None:
        return Token(token)
    ranked = sorted(((i, entry.logprob) for i, entry in logprobs.items()), key=lambda pair: -pair[1])
    return Token(token, logprobs[token].logprob, tuple(ranked[:count]))
