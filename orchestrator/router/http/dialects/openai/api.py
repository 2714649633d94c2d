"""OpenAI's API with vLLM's additions: the endpoints of chats, completions and models.

Owns the routes and the constants of each answer. The bodies are :mod:`orchestrator.router.frontend.schema`'s, since RPC clients send the
same ones.
"""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.router.frontend import schema
from orchestrator.router.frontend.text_models import TextModel
from orchestrator.router.http import event_stream
from orchestrator.router.http.authentication import tenant_of
from orchestrator.router.http.dialect import HttpFrontend
from orchestrator.router.http.dialects.openai import wording
from orchestrator.router.http.dialects.openai.sinks import OpenAiResponse
from orchestrator.router.http.response import json_response
from workers.protocol.errors import TriremeError
from workers.protocol.messages import UNLIMITED, ApiEndpoint


class OpenAiDialect:
    """A :class:`~orchestrator.router.http.dialect.Dialect`. Its methods are the endpoints."""

    prefix: ClassVar[str] = "/v1"

    def __init__(self, frontend: HttpFrontend) -> None:
        self._frontend = frontend

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
        ]

    def error_body(self, error: TriremeError) -> dict[str, Any]:
        return wording.error_body(error)

    async def chat(self, http: Request) -> ASGIApp:
        return await self._generate(http, "chat")

    async def completions(self, http: Request) -> ASGIApp:
        return await self._generate(http, "completions")

    async def _generate(self, http: Request, endpoint: ApiEndpoint) -> ASGIApp:
        body = schema.read(endpoint, await self._frontend.read(http), on_unknown=partial(self._frontend.ignored, http))
        options = body.stream_options or schema.StreamOptions()
        chat = endpoint == "chat"
        kind, id = "chatcmpl" if chat else "cmpl", uuid.uuid4().hex
        words = wording.Wording(
            id=f"{kind}-{body.request_id or id}",
            created=int(time.time()),
            model=body.model,
            chat=chat,
            usage=bool(options.include_usage),
            continuous=bool(options.include_usage and options.continuous_usage_stats),
            functions=isinstance(body, schema.ChatBody) and body.functions is not None,
        )
        credit = event_stream.window(body) if body.stream else UNLIMITED
        return await self._frontend.generate(http, f"{kind}-{id}", body, OpenAiResponse(body, words), credit=credit)

    async def models(self, http: Request) -> Response:
        models = self._frontend.preprocessor.models(tenant_of(http))
        return json_response(http, {"object": "list", "data": [self._card(model, model.name) for model in models]})

    async def model(self, http: Request) -> Response:
        name = http.path_params["name"]
        return json_response(http, self._card(self._frontend.resolve(http, name), name))

    def _card(self, model: TextModel, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": model.card.created,
            "owned_by": "trireme",
            "root": model.name,
            "parent": None,
            "max_model_len": self._frontend.preprocessor.context(model) or None,
            "default_sampling_params": self._frontend.preprocessor.defaults()[model.name],
        }
