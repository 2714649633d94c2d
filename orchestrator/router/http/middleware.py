"""What the HTTP API does with every request before its body is decoded.

Owns the request id and the limits on how a body may be sent. Knows no dialect.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.router import request_context
from workers.protocol.errors import TooLarge, Unsupported

_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
#: Characters.
_MAX_AFFINITY = 128
#: A browser sends one of these headers with every request that a page of another origin causes.
_BROWSER_HEADERS = ("origin", "sec-fetch-site")


def request_id(scope: Scope) -> str:
    """The caller's ``x-request-id`` where it has a harmless form, otherwise a new id; always the same for one request."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
    return str(state["request_id"])


class RequestContextMiddleware:
    """ASGI middleware: sets the request context, which log lines and traces carry."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == b"traceparent"]
        # W3C Trace Context: a header that was sent twice counts as missing.
        request_context.enter(request_id(scope), given[0].decode("latin-1") if len(given) == 1 else "")
        await self._app(scope, receive, send)


def affinity(http: Request) -> str:
    """The session that the caller names in ``x-correlation-id``, or an empty text. Requests of one session prefer one replica."""
    return http.headers.get("x-correlation-id", "")[:_MAX_AFFINITY]


async def read_body(http: Request, limit: int, *, any_type: bool = False) -> bytes:
    """The body. A body that is too large is refused by its declared length before reading, and by its size while reading; a compressed body
    is refused unread.

    Its content type must be JSON, because a web page can make a browser send other types to this router. ``any_type``: only requests of
    browsers must say JSON.

    Raises TooLarge, Unsupported.
    """
    declared = http.headers.get("content-length")
    if declared is not None and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes, more than {limit}")
    if http.headers.get("content-encoding", "identity") != "identity":
        raise Unsupported("compressed bodies are not taken", hint="send it without Content-Encoding")
    sent = declared not in (None, "0") or "transfer-encoding" in http.headers
    typed = not any_type or any(name in http.headers for name in _BROWSER_HEADERS)
    if sent and typed and http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Unsupported("the body must be sent as Content-Type: application/json")
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)
