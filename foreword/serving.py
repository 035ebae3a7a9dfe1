"""`foreword serve` and `foreword keys`: a server over one base and a folder of prefixes, and who may use it."""

import ipaddress
import logging
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from .config import Precision
from .console import err, out, table
from .errors import ConfigError

if TYPE_CHECKING:
    from .service import Service

__all__ = ["keys", "serve"]

keys = typer.Typer(name="keys", help="Make, list and remove API keys.", no_args_is_help=True)
Store = Annotated[
    Path, typer.Option(help="The folder of prefixes. The keys are kept in it, as hashes.", show_default=False)
]


def serve(
    model: Annotated[
        str, typer.Option(help="The base: a folder, a Hugging Face id, or `smollm2`.", show_default=False)
    ],
    store: Store,
    name: Annotated[
        str | None, typer.Option(help="What clients call the base.", show_default="the end of --model")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    precision: Annotated[Precision, typer.Option(help="Of the base.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="For example cpu or cuda:1.", show_default="the accelerator")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
    batch_tokens: Annotated[
        int, typer.Option(min=16, help="Room for keys and values: rows times the longest.")
    ] = 65_536,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens between two decoding steps.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a request.", show_default="the model's")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request for answers.")] = 4_000_000,
    max_upload: Annotated[int, typer.Option(min=1, help="Bytes of a prefix file.")] = 64_000_000,
    prefix_memory: Annotated[int, typer.Option(min=1, help="Bytes for prefixes on the device.")] = 256_000_000,
    host_memory: Annotated[
        int, typer.Option(min=0, help="Bytes for prefixes that have left the device.")
    ] = 1_000_000_000,
    allow_templates: Annotated[
        bool, typer.Option("--allow-templates", help="Take uploads with a chat template other than the base's.")
    ] = False,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have when the server stops.")
    ] = 30.0,
    engine: Annotated[
        Literal["foreword", "vllm"],
        typer.Option(help="What runs the model: vllm on several GPUs, or for many requests."),
    ] = "foreword",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that vLLM splits the model over.")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Serve a base and a folder of prefixes over HTTP, in the form of OpenAI's API."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed. Install it: pip install 'foreword[serve]'") from None
    from .catalog import Catalog
    from .keys import KeyFile
    from .server import create_app
    from .service import ServerLimits, Service

    key_file = KeyFile(_key_path(store))
    if not _is_loopback(host) and not key_file.all():
        raise ConfigError(
            f"--host {host} lets others than this machine in, and there are no API keys. Make one first: "
            f"foreword keys add NAME --store {store}"
        )
    _quiet()
    shared = {"rows": rows, "waiting": waiting, "length": max_length}
    ours = {
        "tokens": batch_tokens,
        "prefill_tokens": prefill_tokens,
        "device_bytes": prefix_memory,
        "host_bytes": host_memory,
    }
    start = _start_vllm if engine == "vllm" else _start_ours
    with _bound(host, port) as listening:
        own = start(model, store, precision, device, trust_remote_code, tensor_parallel, shared, ours)
        try:
            own_name = name or Path(model).name
            template: Any = own.tokenizer.chat_template
            catalog = Catalog(
                store, own.engine.check, own_template=template, any_template=allow_templates, reserved=own_name
            )
            service = Service(
                name=own_name,
                tokenizer=own.tokenizer,
                engine=own.engine,
                catalog=catalog,
                keys=key_file,
                limits=ServerLimits(
                    body_bytes=max_body, upload_bytes=max_upload, max_tokens=max_tokens, requests=rows + waiting
                ),
                stop_ids=own.stop_ids,
            )
            hosts = ["localhost", "127.0.0.1", "[::1]", host] if _is_loopback(host) else None
            _run(create_app(service, hosts), service, listening, drain)
        finally:
            own.engine.close()


class _Started(NamedTuple):
    """An engine, and what turns text into its tokens."""

    engine: Any
    tokenizer: Any
    stop_ids: frozenset[int]


def _start_ours(
    model: str,
    store: Path,
    precision: Precision,
    device: str | None,
    trust_remote_code: bool,
    tensor_parallel: int,
    shared: dict[str, Any],
    ours: dict[str, int],
) -> _Started:
    from .batching import BatchingEngine, BatchLimits
    from .models import load_base

    if tensor_parallel != 1:
        raise ConfigError("--tensor-parallel belongs to --engine vllm.")
    limits = BatchLimits(**shared, **ours)
    with err.status(f"Loading {model}"):
        base = load_base(model, precision=precision, device=device, trust_remote_code=trust_remote_code)
    engine = BatchingEngine(base.model, limits)
    return _Started(engine, base.tokenizer, _stop_ids(base.model.generation_config, base.tokenizer))


def _start_vllm(
    model: str,
    store: Path,
    precision: Precision,
    device: str | None,
    trust_remote_code: bool,
    tensor_parallel: int,
    shared: dict[str, Any],
    ours: dict[str, int],
) -> _Started:
    try:
        from .vllm_engine import VllmEngine, VllmLimits
    except ImportError as error:
        raise ConfigError(
            f"--engine vllm: {error}. Install vLLM in an environment of its own: pip install 'foreword[vllm]', or on CPUs as "
            "docs/engines.md says."
        ) from None
    from transformers import AutoTokenizer, GenerationConfig

    from .batching import BatchLimits
    from .models import model_folder

    if precision in ("int8", "int4", "fp8"):
        raise ConfigError(f"--precision {precision}: not with --engine vllm. Give it a checkpoint that is quantized.")
    flags = {"tokens": "--batch-tokens", "prefill_tokens": "--prefill-tokens"}
    flags |= {"device_bytes": "--prefix-memory", "host_bytes": "--host-memory"}
    given = [flags[name] for name, value in ours.items() if value != getattr(BatchLimits, name)]
    if given or device is not None:
        told = ", ".join([*given, *(["--device"] if device is not None else [])])
        raise ConfigError(f"{told}: not with --engine vllm, which decides that itself. Leave it out.")
    folder = model_folder(model)
    store.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:
        generation = GenerationConfig()
    limits = VllmLimits(**shared, tensor_parallel=tensor_parallel)
    engine = VllmEngine(folder, store, precision, limits, trust_remote_code=trust_remote_code)
    return _Started(engine, tokenizer, _stop_ids(generation, tokenizer))


def _run(app: Any, service: "Service", listening: socket.socket, drain: float) -> None:
    """Answer until told to stop; then finish what runs, or say clearly that it was not."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not service.draining:  # the first signal: no new requests, and so many seconds for the others
                service.draining = True
                threading.Thread(target=service.engine.close, args=(drain,), daemon=True).start()
                self.should_exit = True  # and end as any program that is done, not by the signal as uvicorn would
            else:
                self.force_exit = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started and self.servers:
                host, port = listening.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                locked = "with API keys" if service.keys is not None and service.keys.exist else "open to this machine"
                count = len(service.catalog.names())
                err.print(f"Serving {service.name} and {count} prefixes at http://{shown}:{port}, {locked}.")

    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(drain) + 5, server_header=False,
        timeout_keep_alive=30,
    )  # fmt: skip
    Server(config).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address, so that one that is taken is told before a model is loaded. It does not listen yet."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Is another server running there? Choose another --port."
        ) from None
    return found


def _quiet() -> None:
    """Structured logs to stderr, and nothing from Transformers but warnings."""
    import transformers

    from .gateway import JsonLines

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("foreword", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "foreword" else logging.WARNING)


def _stop_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the checkpoint's generation settings name."""
    named = generation.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------------------------- keys


def _key_path(store: Path) -> Path:
    return store / ".keys.json"


@keys.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Who gets the key.", show_default=False)],
    store: Store,
    manage: Annotated[
        bool, typer.Option("--manage", help="May upload and delete prefixes, and read the metrics.")
    ] = False,
    prefixes: Annotated[
        list[str] | None,
        typer.Option(
            "--prefix", help="A prefix that it may use, or a pattern such as 'acme-*'. Repeatable.", show_default="all"
        ),
    ] = None,
    max_prefixes: Annotated[
        int, typer.Option(min=0, help="How many prefixes it may see before uploads are refused.")
    ] = 10_000,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that run or wait at a time.")] = 64,
) -> None:
    """Make a key and print it, once. Only its hash is kept."""
    from .keys import KeyFile

    scopes = ("infer", "manage") if manage else ("infer",)
    out.print(KeyFile(_key_path(store)).add(name, scopes, prefixes or ["*"], max_prefixes, max_requests))


@keys.command("list")
def list_keys(store: Store) -> None:
    """List who has keys, and what they may do."""
    from .keys import KeyFile

    body = [
        [key.name, ", ".join(key.scopes), ", ".join(key.prefixes), key.max_prefixes, key.max_requests]
        for key in KeyFile(_key_path(store)).all()
    ]
    out.print(table(["key", "may", "prefixes", "at most", "requests"], body))


@keys.command("remove")
def remove(name: Annotated[str, typer.Argument(help="Whose key.", show_default=False)], store: Store) -> None:
    """Make a key worthless. A running server knows at once."""
    from .keys import KeyFile

    KeyFile(_key_path(store)).remove(name)
    err.print(f"The key of {name} is worthless now.")
