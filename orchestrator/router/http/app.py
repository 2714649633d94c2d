"""The HTTP API of a router: the endpoints of every dialect, and the router's own (probes, metrics, status, status page, tokenizer).

Owns the table of routes and how errors become responses. Each dialect words the errors below its own prefix.
"""

from __future__ import annotations

import difflib
from functools import partial
from math import ceil
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.auth.api_keys import ApiKeys
from orchestrator.config.router_spec import HttpSpec, RouterSpec
from orchestrator.router.frontend import schema
from orchestrator.router.frontend.known_fields import unknown_fields
from orchestrator.router.frontend.preprocess import Preprocessor, check_ids
from orchestrator.router.http.authentication import ApiKeyMiddleware, tenant_of
from orchestrator.router.http.client_address import ClientAddressMiddleware, networks
from orchestrator.router.http.dialect import Dialect, HttpFrontend
from orchestrator.router.http.dialects import DIALECTS
from orchestrator.router.http.event_stream import encode
from orchestrator.router.http.middleware import RequestContextMiddleware, TenantCapMiddleware, answer_headers, cross_origin
from orchestrator.router.http.response import json_response
from orchestrator.router.http.status_page import StatusPage
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.key_limits import KeyLimiter
from orchestrator.router.metrics import CONTENT_TYPE, Metrics
from orchestrator.router.tenant_caps import TenantCaps
from workers import __version__
from workers.protocol.errors import NotFound, Overloaded, RateLimited, TriremeError, Unavailable

_T = TypeVar("_T", bound=msgspec.Struct)
#: Paths whose answers name all models: for callers who may see them all.
_OPERATORS = frozenset(("/metrics", "/status", "/ui/data"))
#: Characters of a path that an error shows.
_MAX_SHOWN = 128


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    tokens: list[int]


class HttpApi:
    """All routes over one dispatcher. Its methods are the endpoints that belong to no dialect."""

    def __init__(
        self, spec: RouterSpec, dispatcher: Dispatcher, preprocessor: Preprocessor, metrics: Metrics, limiter: KeyLimiter
    ) -> None:  # fmt: skip
        self._dispatcher, self._preprocessor, self._metrics = dispatcher, preprocessor, metrics
        self._frontend = HttpFrontend(preprocessor, dispatcher, metrics, (spec.http or HttpSpec()).max_body_bytes, limiter)
        self._default, *self._others = (make(self._frontend) for make in DIALECTS)
        self._page = StatusPage(spec.name, len(spec.peers), metrics, dispatcher.status)

    def routes(self) -> list[Route]:
        return [
            *self._default.routes(),
            Route("/", self.root, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/status", self.status, methods=["GET"]),
            Route("/ui", self.page, methods=["GET"]),
            Route("/ui/data", self.page_data, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            *(route for dialect in self._others for route in dialect.routes()),
        ]

    async def root(self, http: Request) -> Response:
        return RedirectResponse("/ui", 302, answer_headers(http.scope))

    async def health(self, http: Request) -> Response:
        return json_response(http, {"status": "ok"})

    async def ready(self, http: Request) -> Response:
        if not self._dispatcher.ready():
            raise Unavailable("not every model has a ready replica", retry_after=1.0)
        return json_response(http, {"status": "ready"})

    async def metrics(self, http: Request) -> Response:
        _check_sees_all(http)
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE} | answer_headers(http.scope))

    async def status(self, http: Request) -> Response:
        _check_sees_all(http)
        status = self._dispatcher.status()
        return json_response(http, msgspec.structs.replace(status, default_sampling_params=self._preprocessor.defaults()))

    async def page(self, http: Request) -> Response:
        return Response(self._page.html, headers=self._page.headers | answer_headers(http.scope))

    async def page_data(self, http: Request) -> Response:
        _check_sees_all(http)
        answer = json_response(http, self._page.snapshot())
        answer.headers["cache-control"] = "no-store"
        return answer

    async def version(self, http: Request) -> Response:
        return json_response(http, {"version": __version__})

    async def tokenize(self, http: Request) -> Response:
        fields = await self._frontend.read(http)
        if "messages" in fields:
            chat = schema.check(fields, schema.ChatBody, on_unknown=partial(self._frontend.ignored, http))
            model = self._frontend.resolve(http, chat.model)
            ids = await self._preprocessor.encoder(model, chat).chat(chat)
        else:
            body = self._convert(http, fields, TokenizeBody)
            model = self._frontend.resolve(http, body.model)
            ids = await self._preprocessor.encoder(model).prompt(body.prompt, add_special=body.add_special_tokens)
        return json_response(http, {"count": len(ids), "max_model_len": self._preprocessor.context(model) or None, "tokens": ids})

    async def detokenize(self, http: Request) -> Response:
        body = self._convert(http, await self._frontend.read(http), DetokenizeBody)
        model = self._frontend.resolve(http, body.model)
        if body.tokens:
            check_ids(body.tokens, model.table.size, "tokens")
        return json_response(http, {"prompt": model.decode(body.tokens, skip_special=False)})

    def _convert(self, http: Request, fields: dict[str, Any], kind: type[_T]) -> _T:
        """``fields`` as a body of the router's own endpoints. Raises Rejected."""
        if unknown := unknown_fields(fields, kind):
            self._frontend.ignored(http, unknown)
        return schema.convert(fields, kind)

    async def on_error(self, http: Request, error: Exception) -> Response:
        """The response to a refused or failed request, in the wording of the path's dialect."""
        found = error if isinstance(error, TriremeError) else _unexpected(http, error)
        self._metrics.refused(found.code)
        headers = answer_headers(http.scope)
        if isinstance(error, HTTPException):
            headers |= dict(error.headers or {})
        if isinstance(found, RateLimited) and found.retry_after is None:
            headers["x-should-retry"] = "false"  # clients of OpenAI's packages try every other 429 again
        elif isinstance(found, Overloaded):
            headers["retry-after"] = str(max(1, ceil(found.retry_after or 1.0)))
        if found.status == 401:
            headers["www-authenticate"] = "Bearer"
        if not isinstance(error, TriremeError | HTTPException):
            headers["connection"] = "close"  # the server ends the connection after a fault of its own
        body = self._dialect_of(http.scope["path"]).error_body(found)
        return Response(encode(body), found.status, headers, "application/json")

    def _dialect_of(self, path: str) -> Dialect:
        below = (dialect for dialect in self._others if path == dialect.prefix or path.startswith(dialect.prefix + "/"))
        return next(below, self._default)


def build_app(
    spec: RouterSpec, dispatcher: Dispatcher, preprocessor: Preprocessor, metrics: Metrics, caps: TenantCaps, keys: ApiKeys | None = None,
    limiter: KeyLimiter | None = None,
) -> ASGIApp:  # fmt: skip
    """The HTTP API as an ASGI application; run it with :func:`orchestrator.router.http.server.serve`. ``keys`` None: open to all.
    ``limiter``: keeps the limits of keys; one of its own by default."""
    api = HttpApi(spec, dispatcher, preprocessor, metrics, limiter if limiter is not None else KeyLimiter())
    handlers = dict.fromkeys((TriremeError, HTTPException, ClientDisconnect, Exception), api.on_error)
    app = Starlette(routes=api.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False
    http = spec.http or HttpSpec()
    capped = TenantCapMiddleware(app, caps, api.on_error)
    guarded = RequestContextMiddleware(capped if keys is None else ApiKeyMiddleware(capped, keys, api.on_error))
    placed = ClientAddressMiddleware(guarded, networks(http.trusted_proxies)) if http.trusted_proxies else guarded
    return cross_origin(placed, http.allowed_origins) if http.allowed_origins else placed


def _check_sees_all(http: Request) -> None:
    """Raises NotFound for a tenant that may use some models only: the answer would name the models of others."""
    if tenant_of(http).models is not None:
        raise _no_such_path(http)


def _unexpected(http: Request, error: Exception) -> TriremeError:
    if isinstance(error, HTTPException) and error.status_code == 404:
        return _no_such_path(http)
    if isinstance(error, HTTPException) and error.status_code == 405:
        taken = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return _MethodNotAllowed(f"{_shown_path(http)} does not take {http.method}", f"it takes {taken}")
    return TriremeError("the router failed to handle the request")


def _no_such_path(http: Request) -> NotFound:
    """Names the path, and the one that was probably meant; where none is close, all paths without a model's name in them."""
    own = tenant_of(http).models is None
    paths = [route.path for route in http.app.routes if isinstance(route, Route) and (own or route.path not in _OPERATORS)]
    close = difflib.get_close_matches(http.scope["path"], paths, n=1, cutoff=0.75)
    there = ", ".join(sorted(path for path in paths if "{" not in path))
    return NotFound(f"there is no path {_shown_path(http)}", f"did you mean {close[0]}?" if close else f"there are {there}")


def _shown_path(http: Request) -> str:
    """The path, cut and escaped, because it came from outside."""
    path = ascii(http.scope["path"])[1:-1]
    return path if len(path) <= _MAX_SHOWN else f"{path[:_MAX_SHOWN]}..."


class _MethodNotAllowed(NotFound):
    code, status = "method_not_allowed", 405
