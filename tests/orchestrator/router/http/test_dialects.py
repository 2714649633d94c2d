"""The table of dialects: one more dialect is one more entry, with its own routes and its own wording of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator.router.http.dialect import HttpFrontend
from orchestrator.router.http.dialects import DIALECTS
from orchestrator.router.http.response import json_response
from tests.support.scripted_router import ServedDoor
from workers.protocol.errors import TriremeError


class EchoDialect:
    """Answers with the body that it got."""

    prefix: ClassVar[str] = "/echo"

    def __init__(self, frontend: HttpFrontend) -> None:
        self._frontend = frontend

    def routes(self) -> list[Route]:
        return [Route("/echo/body", self.body, methods=["POST"])]

    async def body(self, http: Request) -> Response:
        return json_response(http, await self._frontend.read(http))

    def error_body(self, error: TriremeError) -> dict[str, Any]:
        return {"echo": error.code}


def test_a_dialect_brings_its_routes_and_words_the_errors_below_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.router.http.app.DIALECTS", (*DIALECTS, EchoDialect))
    with ServedDoor(tmp_path) as door:
        assert door.http.post("/echo/body", json={"a": 1}).json() == {"a": 1}
        assert door.http.post("/echo/body", json=[]).json() == {"echo": "invalid_request"}
        for path in ("/echo", "/echo/nothing"):
            assert door.http.get(path).json() == {"echo": "not_found"}
        for path in ("/echoes", "/v1/nothing", "/nothing"):
            assert door.http.get(path).json()["error"]["code"] == "not_found", "the first dialect of the table is the default"
        assert door.http.get("/v2/nothing").json()["error"].startswith("there is no path /v2/nothing: ")
