"""One HTTP exchange over a socket of its own, and how it is written down: status, headers, the exact body."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.recorded.recording import as_text, masked

#: Headers of HTTP itself that differ from run to run or from server to server.
_LEFT_OUT = ("date", "content-length")
BOUND_S = 60.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """``body`` as JSON, or as it is where it is bytes. The framing of a chunked answer is not part of ``Answer.body``."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=BOUND_S)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    known = {"content-type": "application/json"} if sent is not None else {}
    try:
        connection.request(method, path, sent, {**known, **(headers or {})})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        if "allow" in found:  # made of a set
            found["allow"] = ", ".join(sorted(found["allow"].split(", ")))
        return Answer(answer.status, dict(sorted(found.items())), answer.read())
    finally:
        connection.close()


def shown(answer: Answer, places: Mapping[str, str] | None = None) -> str:
    """The answer as text. Ids and times are masked, nothing else is changed; a body that has no line end at its end gets one."""
    heads = [f"{name}: {value}" for name, value in answer.headers.items() if name not in _LEFT_OUT]
    return as_text(masked("\n".join([f"HTTP {answer.status}", *heads, "", answer.body.decode()]), places))
