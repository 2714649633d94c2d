"""The command line's own HTTP client, against scripted answers."""

from __future__ import annotations

import json

import httpx
import pytest

from orchestrator.cli.generate_backends import HttpBackend
from workers.protocol.errors import EngineFault, EnvironmentFault, NotFound, Overloaded, ReplicaLost


def door(*, status: int = 200, body: str = "") -> tuple[HttpBackend, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, text=body)

    return HttpBackend("http://here:8000/v1/", transport=httpx.MockTransport(answer)), seen


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]}) + "\n\n"


def test_a_chat_is_streamed_piece_by_piece() -> None:
    role = 'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
    usage = 'data: {"choices": [], "usage": {"prompt_tokens": 3}}\n\n'
    http, seen = door(body=role + chunk("Par") + ": ping\n\n" + chunk("is") + usage + "data: [DONE]\n\n")
    assert list(http.stream("chat", {"model": "m", "messages": []})) == ["Par", "is"]
    assert str(seen[0].url) == "http://here:8000/v1/chat/completions"
    assert json.loads(seen[0].content) == {"model": "m", "messages": [], "stream": True}


def test_a_completion_is_text() -> None:
    http, seen = door(body='data: {"choices": [{"text": " a time"}]}\n\ndata: [DONE]\n\n')
    assert list(http.stream("completions", {"prompt": "Once upon"})) == [" a time"]
    assert seen[0].url.path == "/v1/completions"


def test_models_in_their_order() -> None:
    http, _ = door(body='{"data": [{"id": "b"}, {"id": "a"}]}')
    assert http.models() == ["b", "a"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(404, "model_not_found", NotFound), (429, "overloaded", Overloaded), (503, "replica_lost", ReplicaLost)],
)
def test_a_refusal_is_the_error_that_it_names(status: int, code: str, kind: type[Exception]) -> None:
    http, _ = door(status=status, body=json.dumps({"error": {"message": "no", "code": code, "type": "x", "param": None}}))
    with pytest.raises(kind, match="no"):
        list(http.stream("chat", {}))


def test_an_error_in_mid_stream_comes_after_what_was_said() -> None:
    http, _ = door(body=chunk("Par") + 'data: {"error": {"message": "gang died", "code": "replica_lost"}}\n\n')
    pieces = http.stream("chat", {})
    assert next(pieces) == "Par"
    with pytest.raises(ReplicaLost, match="gang died"):
        next(pieces)


def test_an_answer_that_breaks_off_is_an_error() -> None:
    http, _ = door(body=chunk("Par"))
    with pytest.raises(EngineFault, match="broke off"):
        list(http.stream("chat", {}))


def test_another_server_is_told_apart() -> None:
    http, _ = door(status=502, body="<html>")
    with pytest.raises(EngineFault, match="HTTP 502"):
        http.models()


def test_nobody_there() -> None:
    with pytest.raises(EnvironmentFault, match=r"nothing answers at http://127\.0\.0\.1:9"):
        HttpBackend("http://127.0.0.1:9").models()
