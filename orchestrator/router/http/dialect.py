"""The protocol of a dialect of the HTTP API, and the services that every dialect uses.

Owns the steps of a generating request in any dialect: the body is read within the size limit, prepared, answered.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from starlette.requests import Request
from starlette.routing import Route

from orchestrator.router.frontend.preprocess import CallerContext, Preprocessor
from orchestrator.router.frontend.schema import Body
from orchestrator.router.frontend.text_models import TextModel
from orchestrator.router.http.authentication import tenant_of
from orchestrator.router.http.event_stream import StreamWrites
from orchestrator.router.http.in_flight import InFlightRequest
from orchestrator.router.http.middleware import affinity, note_ignored, read_body
from orchestrator.router.http.quota import KeyQuota
from orchestrator.router.http.response import GenerateResponse, ResponseBuilder
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.key_limits import KeyLimiter
from orchestrator.router.metrics import Metrics
from workers.protocol.errors import TriremeError


class Dialect(Protocol):
    """Bodies, wording and routes of one API."""

    #: The paths below it are worded by this dialect, known paths or not.
    prefix: ClassVar[str]

    def routes(self) -> list[Route]: ...

    def error_body(self, error: TriremeError) -> dict[str, Any]:
        """The JSON body of an error response."""


class HttpFrontend:
    """What the dialects of one router share."""

    def __init__(
        self, preprocessor: Preprocessor, dispatcher: Dispatcher, metrics: Metrics, max_body_bytes: int, limiter: KeyLimiter
    ) -> None:  # fmt: skip
        self.preprocessor, self.dispatcher, self.metrics, self._max_body_bytes = preprocessor, dispatcher, metrics, max_body_bytes
        self._writes = StreamWrites()
        self._limiter = limiter

    async def read_bytes(self, http: Request, *, any_type: bool = False) -> bytes:
        """The body within the size limit; ``any_type`` as in read_body. Raises TooLarge, Unsupported."""
        return await read_body(http, self._max_body_bytes, any_type=any_type)

    async def read(self, http: Request) -> dict[str, Any]:
        """The JSON object in the body. Raises TooLarge, Unsupported, Rejected."""
        return await self.preprocessor.decode(await self.read_bytes(http))

    def ignored(self, http: Request, fields: list[str]) -> None:
        """Count fields that nobody here knows, and name them in a header of the answer."""
        self.metrics.ignored_fields(len(fields))
        note_ignored(http.scope, fields)

    def resolve(self, http: Request, name: str) -> TextModel:
        """The model that the caller means. Raises NotFound."""
        return self.preprocessor.resolve(name, tenant_of(http))

    async def generate(self, http: Request, id: str, body: Body, builder: ResponseBuilder, *, credit: int) -> GenerateResponse:
        """The response to a generating request; ``id`` is unique, ``credit`` as in CallerContext. Raises what prepare raises, and
        RateLimited."""
        tenant = tenant_of(http)
        quota = KeyQuota(self._limiter, tenant, http.scope)
        quota.check()
        caller = CallerContext(client="http", request_id=id, tenant=tenant, affinity=affinity(http), credit=credit)
        prepared = await self.preprocessor.prepare(body, caller)
        request = InFlightRequest(prepared, self.dispatcher, self.metrics, quota)
        return GenerateResponse(request, builder, self.metrics, self._writes)
