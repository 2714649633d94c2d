"""The processing of every HTTP request before its body is decoded.

Owns the request id and the limits on how a body may be sent. Knows no dialect.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.router import request_context
from orchestrator.router.http.client_address import tenant_address
from orchestrator.router.tenant_caps import Place, TenantCaps
from workers.protocol.errors import Overloaded, TooLarge, Unsupported

_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
#: Characters.
_MAX_AFFINITY = 128
#: Ignored fields that an answer names: their number, their length together, and what of a name is not shown.
_MAX_IGNORED, _MAX_IGNORED_CHARS = 32, 1024
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
#: A browser sends one of these headers with every request that a page of another origin causes.
_BROWSER_HEADERS = ("origin", "sec-fetch-site")
_PLACE = "trireme.place"


def request_id(scope: Scope) -> str:
    """The caller's ``x-request-id`` where it has a harmless form, otherwise a new id; always the same for one request."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
    return str(state["request_id"])


def note_ignored(scope: Scope, fields: Sequence[str]) -> None:
    """Have the answer name ``fields`` of the body as ignored."""
    names: list[str] = []
    size = 0
    for field in fields[:_MAX_IGNORED]:
        name = _UNSAFE.sub("?", field[:_MAX_AFFINITY])
        size += len(name) + 2
        if size > _MAX_IGNORED_CHARS:
            break
        names.append(name)
    more = len(fields) - len(names)
    scope.setdefault("state", {})["ignored"] = ", ".join([*names, f"... ({more} more)"] if more else names)


def note_limits(scope: Scope, headers: dict[str, str]) -> None:
    """Have the answer say ``headers``, which are about the limits of the caller's key."""
    scope.setdefault("state", {})["limits"] = headers


def answer_headers(scope: Scope) -> dict[str, str]:
    """The headers of every answer: the request's id, and, where there are some, the limits of its key and the fields of its body that were
    ignored."""
    headers = {"x-request-id": request_id(scope), **scope["state"].get("limits", {})}
    ignored = scope["state"].get("ignored")
    return headers if ignored is None else headers | {"x-trireme-ignored": ignored}


class RequestContextMiddleware:
    """ASGI middleware: sets the request context, which log lines and traces carry."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == b"traceparent"]
        # W3C Trace Context: a header that was sent twice counts as missing.
        client = scope.get("client")
        traceparent = given[0].decode("latin-1") if len(given) == 1 else ""
        request_context.enter(request_id(scope), traceparent, tenant_address(client[0]) if client is not None else "")
        await self._app(scope, receive, send)


class TenantCapMiddleware:
    """ASGI middleware: a request with a body counts as its tenant's until it is answered. ``refuse`` makes the response where the tenant
    has too many. It stands behind the authentication, which says who the tenant is."""

    def __init__(self, app: ASGIApp, caps: TenantCaps, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._caps, self._refuse = app, caps, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            place = self._caps.enter(request_context.caller())
        except Overloaded as error:
            await (await self._refuse(Request(scope), error))(scope, receive, send)
            return
        scope.setdefault("state", {})[_PLACE] = place
        try:
            await self._app(scope, receive, send)
        finally:
            place.leave()


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app`` for the web pages of ``origins`` too (``*``: of all). A browser asks before it sends their requests, without a key, so this
    stands before the authentication."""
    limits = (f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens"))
    shown = ("x-request-id", "x-trireme-ignored", "retry-after", *limits)
    return CORSMiddleware(app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=shown)


def affinity(http: Request) -> str:
    """The session that the caller names in ``x-correlation-id``, or an empty text. Requests of one session prefer one replica."""
    return http.headers.get("x-correlation-id", "")[:_MAX_AFFINITY]


async def read_body(http: Request, limit: int, *, any_type: bool = False) -> bytes:
    """The body. A body that is too large is refused by its declared length before reading, and by its size while reading; a compressed body
    is refused unread.

    Its content type must be JSON, because a web page can make a browser send other types to this router. ``any_type``: only requests of
    browsers must say JSON.

    Raises TooLarge, Unsupported, TenantLimit, Overloaded.
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
    place: Place = http.scope["state"][_PLACE]
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        place.add(len(part))
        parts.append(part)
    return b"".join(parts)
