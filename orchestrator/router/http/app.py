"""The HTTP door: OpenAI's endpoints in vLLM's dialect, health, metrics.

Owns how an HTTP request becomes a checked body under the size limits, and how errors become answers. What a body means is
:mod:`orchestrator.router.frontend.schema`'s and :mod:`orchestrator.router.frontend.preprocess`'s; the RPC door asks the same two.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.auth.api_keys import ApiKeys, Salting
from orchestrator.config.router_spec import HttpSpec, RouterSpec
from orchestrator.router.frontend import preprocess as preparing
from orchestrator.router.frontend import schema as bodies
from orchestrator.router.frontend.text_models import TextModel, TextModels
from orchestrator.router.http import event_stream
from orchestrator.router.http.authentication import ApiKeyMiddleware, tenant_of
from orchestrator.router.http.dialects.kserve import api as kserve
from orchestrator.router.http.dialects.openai import wording as openai
from orchestrator.router.http.dialects.openai.sinks import OpenAiResponse
from orchestrator.router.http.in_flight import HttpExchange
from orchestrator.router.http.middleware import RequestContextMiddleware, affinity, read_body, request_id
from orchestrator.router.http.response import GenerateResponse, json_response
from orchestrator.router.http.status_page import StatusPage
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.metrics import CONTENT_TYPE, Metrics
from workers import __version__
from workers.protocol.errors import NotFound, Overloaded, TriremeError, Unavailable
from workers.protocol.messages import UNLIMITED


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    tokens: list[int]


class HttpApi:
    """All routes over one dispatcher. Its methods are the endpoints."""

    def __init__(self, spec: RouterSpec, dispatcher: Dispatcher, texts: TextModels, metrics: Metrics, salting: Salting) -> None:
        self._dispatcher, self._texts, self._metrics, self._salting = dispatcher, texts, metrics, salting
        self._admission = spec.admission
        self._page = StatusPage(spec.name, len(spec.peers), metrics, dispatcher.status)
        self._max_body = (spec.http or HttpSpec()).max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
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
        ]

    async def chat(self, http: Request) -> ASGIApp:
        return await self._generate(http, "chat")

    async def completions(self, http: Request) -> ASGIApp:
        return await self._generate(http, "completions")

    async def _generate(self, http: Request, endpoint: bodies.Endpoint) -> ASGIApp:
        body = await read_body(http, self._max_body)
        request = bodies.read(endpoint, await preparing.decode(body, self._texts), on_unknown=self._metrics.ignored_fields)
        chat = endpoint == "chat"
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        caller = preparing.CallerContext(
            client="http",
            request=id,
            tenant=tenant_of(http),
            affinity=affinity(http),
            credit=event_stream.window(request) if request.stream else UNLIMITED,
        )
        prepared = await preparing.prepare(
            request, caller, texts=self._texts, dispatcher=self._dispatcher, admission=self._admission, salting=self._salting
        )
        options = request.stream_options or bodies.StreamOptions()
        wording = openai.Wording(
            id=id,
            created=int(time.time()),
            model=request.model,
            chat=chat,
            usage=bool(options.include_usage),
            continuous=bool(options.include_usage and options.continuous_usage_stats),
        )
        return GenerateResponse(HttpExchange(prepared), OpenAiResponse(request, wording), self._dispatcher, self._metrics)

    async def models(self, http: Request) -> Response:
        tenant = tenant_of(http)
        shown = [self._card(model, model.name) for model in self._texts.models if tenant.may_use(model.names)]
        return json_response(http, {"object": "list", "data": shown})

    async def model(self, http: Request) -> Response:
        name = http.path_params["name"]
        return json_response(http, self._card(preparing.resolve(name, self._texts, tenant_of(http)), name))

    def _card(self, model: TextModel, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": model.card.created,
            "owned_by": "trireme",
            "root": model.name,
            "parent": None,
            "max_model_len": self._context(model),
        }

    def _context(self, model: TextModel) -> int | None:
        status = self._dispatcher.model(model.name)
        return (status.max_seq_len if status else 0) or model.card.max_seq_len or None

    async def health(self, http: Request) -> Response:
        return json_response(http, {"status": "ok"})

    async def ready(self, http: Request) -> Response:
        if not self._dispatcher.ready():
            raise Unavailable("not every model has a ready replica", retry_after=1.0)
        return json_response(http, {"status": "ready"})

    async def metrics(self, http: Request) -> Response:
        _check_sees_all(http)
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE, "x-request-id": request_id(http.scope)})

    async def status(self, http: Request) -> Response:
        _check_sees_all(http)
        return json_response(http, self._dispatcher.status())

    async def page(self, http: Request) -> Response:
        return Response(self._page.html, headers=self._page.headers | {"x-request-id": request_id(http.scope)})

    async def page_data(self, http: Request) -> Response:
        _check_sees_all(http)
        answer = json_response(http, self._page.snapshot())
        answer.headers["cache-control"] = "no-store"
        return answer

    async def version(self, http: Request) -> Response:
        return json_response(http, {"version": __version__})

    async def tokenize(self, http: Request) -> Response:
        fields = await preparing.decode(await read_body(http, self._max_body), self._texts)
        if "messages" in fields:
            request = bodies.check(fields, bodies.ChatBody)
            model = preparing.resolve(request.model, self._texts, tenant_of(http))
            ids = await preparing.encode_chat(request, model, self._texts)
        else:
            body = bodies.convert(fields, TokenizeBody)
            model = preparing.resolve(body.model, self._texts, tenant_of(http))
            ids = await preparing.encode_prompt(body.prompt, model, self._texts, add_special=body.add_special_tokens)
        return json_response(http, {"count": len(ids), "max_model_len": self._context(model), "tokens": ids})

    async def detokenize(self, http: Request) -> Response:
        body = bodies.convert(await preparing.decode(await read_body(http, self._max_body), self._texts), DetokenizeBody)
        model = preparing.resolve(body.model, self._texts, tenant_of(http))
        if body.tokens:
            preparing.check_known(body.tokens, model.table.size, "tokens")
        return json_response(http, {"prompt": model.decode(body.tokens, skip_special=False)})

    async def on_error(self, http: Request, error: Exception) -> Response:
        """Every refusal and failure, as the door's own clients expect it."""
        found = error if isinstance(error, TriremeError) else _unexpected(error)
        self._metrics.refused(found.code)
        headers = {"x-request-id": request_id(http.scope)}
        if isinstance(error, HTTPException):
            headers |= dict(error.headers or {})
        if isinstance(found, Overloaded):
            headers["retry-after"] = str(max(1, round(found.retry_after or 1.0)))
        if found.status == 401:
            headers["www-authenticate"] = "Bearer"
        if found.status in (401, 413, 415, 500):
            # What is left of the body was not read, or the server closes after a fault: the client must not send another request here.
            headers["connection"] = "close"
        wording = kserve if kserve.speaks(http.scope["path"]) else openai
        return Response(openai.encode(wording.error_body(found)), found.status, headers, "application/json")


def build_app(
    spec: RouterSpec, dispatcher: Dispatcher, texts: TextModels, metrics: Metrics, salting: Salting, keys: ApiKeys | None = None
) -> ASGIApp:
    """The HTTP door as an ASGI application; run it with :func:`orchestrator.router.http.server.serve`. ``keys`` None: open to all."""
    door = HttpApi(spec, dispatcher, texts, metrics, salting)
    app = Starlette(
        routes=door.routes() + kserve.KServeApi(spec, dispatcher, texts, metrics, salting).routes(),
        exception_handlers=dict.fromkeys((TriremeError, HTTPException, ClientDisconnect, Exception), door.on_error),
    )
    app.router.redirect_slashes = False
    return RequestContextMiddleware(app if keys is None else ApiKeyMiddleware(app, keys, door.on_error))


def _check_sees_all(http: Request) -> None:
    """Raises NotFound for a tenant that is bound to models: what it asks for names those of others."""
    if tenant_of(http).models is not None:
        raise NotFound("no such path")


def _unexpected(error: Exception) -> TriremeError:
    if isinstance(error, HTTPException) and error.status_code == 404:
        return NotFound("no such path")
    if isinstance(error, HTTPException) and error.status_code == 405:
        return _MethodNotAllowed("this path does not take that method")
    return TriremeError("the router failed to handle the request")


class _MethodNotAllowed(NotFound):
    code, status = "method_not_allowed", 405
