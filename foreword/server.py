"""HTTP: the routes, who may use them, and errors in OpenAI's form."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from . import __version__
from .answers import Answer, Piece, merged
from .catalog import Entry
from .errors import (
    ForewordError,
    OverloadedError,
    PositionError,
    PrefixChangedError,
    ServingError,
    ShutdownError,
)
from .gateway import Gateway
from .keys import Key, Scope
from .responses import Form
from .schemas import (
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    GenerationRequest,
    Model,
    ModelList,
    PrefixInfo,
    PrefixList,
    error_body,
)
from .service import Asked, NotFoundError, Service

__all__ = ["create_app"]

_ATTEMPTS = 3  # at a request whose prefix is replaced before it starts
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Result = TypeVar("Result")


def create_app(service: Service, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        service: what is served.
        hosts: the names under which it may be called; by default any. A server on loopback names them, so that no web page
            can reach it through a name of its own that points there.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(
        title="Foreword",
        version=__version__,
        summary="Thousands of prefixes over one frozen model, in OpenAI's form.",
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
        responses={status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)},
    )
    app.state.service = service
    app.include_router(_routes(service))
    _handle_errors(app)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(Gateway, service=service)
    return app


# --------------------------------------------------------------------------------------------------------- who asks


def _needs(service: Service, scope: Scope) -> Callable[..., Awaitable[Key]]:
    bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the server has none.")

    async def key(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Key:
        found = service.key(None if given is None else given.credentials)
        if found is None:
            told = "No API key was given" if given is None else "This API key is not known"
            raise HTTPException(
                401, f"{told}. Send the header Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
            )
        if scope not in found.scopes:
            raise HTTPException(403, f"This API key has not the scope {scope!r}, only: {', '.join(found.scopes)}.")
        request.state.about["key"] = found.name
        return found

    return key


# ------------------------------------------------------------------------------------------------------------ routes


def _routes(service: Service) -> APIRouter:
    router = APIRouter()
    infer, manage = Depends(_needs(service, "infer")), Depends(_needs(service, "manage"))

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> HTMLResponse:
        page = (files("foreword") / "playground.html").read_text("utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @router.get("/healthz", tags=["state"])
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", tags=["state"])
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        if (reason := service.ready) is not None:
            raise HTTPException(503, f"Not ready: {reason}.", {"Retry-After": "5"})
        return {"status": "ready"}

    @router.get("/metrics", tags=["state"], dependencies=[manage], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts, in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", tags=["models"])
    async def models(key: Annotated[Key, infer]) -> ModelList:
        """The base, and every prefix that the key may use."""
        entries = await run_in_threadpool(lambda: [entry for entry in service.catalog if key.sees(entry.name)])
        return ModelList(data=[Model(id=service.name, created=service.started), *(_model(service, e) for e in entries)])

    @router.get("/v1/models/{name:path}", tags=["models"], include_in_schema=False)
    async def model(name: str, key: Annotated[Key, infer]) -> Model:
        if name == service.name:
            return Model(id=service.name, created=service.started)
        return _model(service, await run_in_threadpool(service.entry, name.removeprefix(f"{service.name}:"), key))

    @router.post("/v1/completions", tags=["answers"], response_model=None, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request, key: Annotated[Key, infer]) -> Response:
        """Continue a text."""
        return await _generate(service, request, body, key)

    @router.post("/v1/chat/completions", tags=["answers"], response_model=None, responses=_STREAMED)
    async def chat(body: ChatRequest, request: Request, key: Annotated[Key, infer]) -> Response:
        """Answer a chat."""
        return await _generate(service, request, body, key)

    @router.get("/v1/prefixes", tags=["prefixes"])
    async def prefixes(key: Annotated[Key, infer]) -> PrefixList:
        """The prefixes that the key may use."""
        entries = await run_in_threadpool(lambda: [entry for entry in service.catalog if key.sees(entry.name)])
        return PrefixList(data=[_info(service, entry) for entry in entries])

    @router.get("/v1/prefixes/{name}", tags=["prefixes"])
    async def prefix(name: Name, response: Response, key: Annotated[Key, infer]) -> PrefixInfo:
        """One prefix, as its file tells."""
        entry = await run_in_threadpool(service.entry, name, key)
        return await _told(service, entry, response)

    @router.put(
        "/v1/prefixes/{name}",
        tags=["prefixes"],
        responses={201: {"model": PrefixInfo}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def upload(name: Name, request: Request, response: Response, key: Annotated[Key, manage]) -> PrefixInfo:
        """Upload a prefix file, or replace one. Checked whole before it is seen; requests that run keep the old one."""
        entry, new = await run_in_threadpool(service.put, name, await request.body(), key)
        response.status_code = 201 if new else 200
        return await _told(service, entry, response)

    @router.delete("/v1/prefixes/{name}", tags=["prefixes"], status_code=204)
    async def delete(name: Name, key: Annotated[Key, manage]) -> None:
        """Delete a prefix. Requests that run end with it."""
        await run_in_threadpool(service.delete, name, key)

    return router


_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers; as server-sent events with `stream`.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


def _model(service: Service, entry: Entry) -> Model:
    return Model(id=f"{service.name}:{entry.name}", created=int(entry.modified), parent=service.name)


def _info(service: Service, entry: Entry) -> PrefixInfo:
    header = entry.header
    return PrefixInfo(
        name=entry.name,
        version=service.catalog.known_version(entry),
        base=header["base"].get("name"),
        virtual_tokens=header["virtual_tokens"],
        bytes=entry.size,
        created=int(entry.modified),
        training=header["metadata"].get("training", {}),
        evaluation=header["metadata"].get("evaluation", {}),
    )


async def _told(service: Service, entry: Entry, response: Response) -> PrefixInfo:
    version = await run_in_threadpool(service.catalog.version, entry)
    response.headers["ETag"] = f'"{version.version}"'
    return _info(service, entry)


# ----------------------------------------------------------------------------------------------------------- answers


async def _generate(service: Service, request: Request, body: GenerationRequest, key: Key) -> Response:
    about = request.state.about
    if (reason := service.ready) is not None:
        raise ShutdownError(f"This server takes no requests: {reason}.")
    with service.taking(key) as counted:
        asked = await run_in_threadpool(service.read, body, key)
        about |= {"model": asked.model, "prompt_tokens": sum(map(len, asked.prompts)), "user": body.user}
        if asked.prefix is not None:
            about["version"] = asked.prefix.version[:12]
        run = _Run(service, request, body, key, asked)
        if not body.stream:
            return JSONResponse(await _unless_gone(request, run.whole()), headers=run.headers)
        await _unless_gone(request, run.begin())  # so that what cannot start is an error with a status of its own
        counted.keep()  # until the stream has ended
    return StreamingResponse(run.stream(counted.release), media_type="text/event-stream", headers=run.headers)


class _Run:
    """One request for answers while it is answered."""

    def __init__(self, service: Service, request: Request, body: GenerationRequest, key: Key, asked: Asked) -> None:
        self.service, self.body, self.key, self.asked = service, body, key, asked
        self.about, self.id = request.state.about, request.state.request_id
        self.answers: list[Answer] = []
        self._pieces: AsyncGenerator[tuple[int, Piece]] | None = None
        self._first: tuple[int, Piece] | None = None
        self._began = request.state.began

    @property
    def headers(self) -> dict[str, str]:
        """Which content of the prefix answered."""
        prefix = self.asked.prefix
        return {"Cache-Control": "no-store"} | ({} if prefix is None else {"Foreword-Prefix-Version": prefix.version})

    @property
    def made(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    async def begin(self) -> None:
        """Submit, and wait for the first piece. A prefix that is replaced meanwhile is looked up again."""
        for attempt in range(_ATTEMPTS):
            self.answers = self.service.answer(self.asked, self.id, self.key)
            self._pieces = merged(self.answers)
            try:
                self._first = await anext(self._pieces)
            except PrefixChangedError:
                if attempt == _ATTEMPTS - 1:
                    raise
                self.asked = await run_in_threadpool(self.service.read, self.body, self.key)
            else:
                seconds = time.perf_counter() - self._began
                self.about["first_token_ms"] = round(seconds * 1000, 1)
                self.service.metrics.first_token.observe(seconds)
                return

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        if self._pieces is None:
            await self.begin()
        assert self._first is not None
        assert self._pieces is not None
        try:
            yield self._first
            async for item in self._pieces:
                yield item
        finally:
            await self._pieces.aclose()
            self.about["completion_tokens"] = self.made
            prompt_tokens = sum(map(len, self.asked.prompts))
            self.service.metrics.tokens.labels("prompt").inc(prompt_tokens)
            self.service.metrics.tokens.labels("completion").inc(self.made)

    async def whole(self) -> dict[str, Any]:
        answers: dict[int, list[Piece]] = {}
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                answers.setdefault(number, []).append(piece)
        return self._form().whole([answers[number] for number in sorted(answers)], self.made)

    async def stream(self, release: Callable[[], None]) -> AsyncIterator[str]:
        form = self._form()
        try:
            async with aclosing(self.pieces()) as pieces:
                async for number, piece in pieces:
                    if piece.text or piece.tokens or piece.finish:
                        yield _event(form.chunk(number, piece))
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield _event(form.usage_chunk(self.made))
            yield "data: [DONE]\n\n"
        except ForewordError as error:  # too late for a status
            self.about["error"] = str(error)
            _, kind, code = _status(error)
            yield _event(error_body(str(error), kind, code))
        finally:
            release()

    def _form(self) -> Form:
        body, tokenizer = self.body, self.service.tokenizer
        echo = list[str]()
        if isinstance(body, CompletionRequest) and body.echo:
            texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in self.asked.prompts]
            echo = [str(text) for text in texts for _ in range(self.asked.count)]
        return Form(
            chat=isinstance(body, ChatRequest),
            request_id=self.id,
            model=self.asked.model,
            tokenizer=tokenizer,
            prompt_tokens=sum(map(len, self.asked.prompts)),
            logprobs=self.asked.options["logprobs"] is not None,
            echo=echo,
        )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is stopped when the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "The client has hung up.")
        return task.result()
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------------ errors


def _status(error: ForewordError) -> tuple[int, str, str | None]:
    """HTTP status, and OpenAI's type and code."""
    kinds: list[tuple[type[ForewordError], tuple[int, str, str | None]]] = [
        (NotFoundError, (404, "invalid_request_error", "model_not_found")),
        (PositionError, (422, "invalid_request_error", "context_length_exceeded")),
        (OverloadedError, (429, "rate_limit_error", "rate_limit_exceeded")),
        (ShutdownError, (503, "server_error", "unavailable")),
        (PrefixChangedError, (503, "server_error", "prefix_changed")),
        (ServingError, (500, "server_error", None)),
    ]
    return next((found for kind, found in kinds if isinstance(error, kind)), (422, "invalid_request_error", None))


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _handle_errors(app: FastAPI) -> None:
    def reply(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(body, status, headers)

    @app.exception_handler(ForewordError)
    async def refuse(request: Request, error: ForewordError) -> JSONResponse:
        request.state.about["error"] = str(error)
        status, kind, code = _status(error)
        retry = error.retry_after if isinstance(error, OverloadedError) else 5 if status == 503 else None
        return reply(status, error_body(str(error), kind, code), None if retry is None else {"Retry-After": str(retry)})

    @app.exception_handler(PermissionError)
    async def forbid(request: Request, error: PermissionError) -> JSONResponse:
        return reply(403, error_body(str(error), "permission_error"))

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException) -> JSONResponse:
        kind = _KINDS.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
        return reply(error.status_code, error_body(str(error.detail), kind), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query"))
        if first["type"] == "json_invalid":
            return reply(
                400, error_body(f"The body is not JSON: {first.get('ctx', {}).get('error')}.", "invalid_request_error")
            )
        told = f"{where}: {first['msg']}" if where else first["msg"]
        request.state.about["error"] = told
        return reply(422, error_body(told, "invalid_request_error", first["type"], where or None))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return reply(500, error_body("The server has failed at this request; its log says why.", "server_error"))
