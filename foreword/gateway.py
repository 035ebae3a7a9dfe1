"""What every HTTP request passes through: a request id, limits on its body, one line in the log, counts."""

import asyncio
import json
import logging
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Service

__all__ = ["Gateway", "JsonLines"]

_log = logging.getLogger("foreword.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what the record has in its `about`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        entry |= {key: value for key, value in getattr(record, "about", {}).items() if value is not None}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class Gateway:
    """ASGI middleware, outermost."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        about: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        began, status = time.perf_counter(), 500
        scope.setdefault("state", {}).update(request_id=request_id, about=about, began=began)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            await self.app(scope, self._limited(scope, headers, receive), send_on)
        except Exception:
            _log.exception("request failed", extra={"about": about})
            raise
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.requests.labels(route, status).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            _log.info("request", extra={"about": about | {"status": status, "ms": round(seconds * 1000, 1)}})

    def _limited(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """`receive`, for a body that is neither too large nor too slow."""
        limits = self.service.limits
        most = limits.upload_bytes if scope["path"].startswith("/v1/prefixes/") else limits.body_bytes
        told = headers.get(b"content-length", b"0")
        declared = int(told) if told.isdigit() else 0
        got, whole, deadline = 0, False, time.monotonic() + limits.seconds

        async def limited() -> Message:
            nonlocal got, whole
            if whole:  # what comes now is that the client has hung up
                return await receive()
            if declared > most:
                raise HTTPException(413, f"The body has {declared:,} bytes; at most {most:,} are taken.")
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"The body did not arrive within {limits.seconds:.0f} s.") from None
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > most:
                raise HTTPException(413, f"The body has more than {most:,} bytes.")
            return message

        return limited
