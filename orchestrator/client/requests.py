"""Turns a caller's arguments into an exchange; both clients use it before they send anything."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from orchestrator.client.protocol import ClientExchange
from workers.protocol.errors import Rejected

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Sequence[int]

#: Maximum number of choices in a client; routers have a much lower limit.
_MAX_CHOICES = 128


def chat(
    messages: Messages, options: Mapping[str, Any], *, model: str | None, request: str | None, deadline: float | None, texts: bool
) -> ClientExchange:
    """An exchange at the chat endpoint; ``options`` are further fields of its body."""
    body = {**options, "model": _model(model), "messages": list(messages)}
    return ClientExchange(_id(request), "chat", msgspec.json.encode(body), _choices(options), texts=texts, deadline=deadline)


def complete(
    prompt: Prompt, options: Mapping[str, Any], *, model: str | None, request: str | None, deadline: float | None, texts: bool
) -> ClientExchange:
    """An exchange at the completions endpoint, of text or of token ids."""
    body = {**options, "model": _model(model), "prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return ClientExchange(_id(request), "completions", msgspec.json.encode(body), _choices(options), texts=texts, deadline=deadline)


def _model(name: str | None) -> str:
    if not name:
        raise Rejected("no model is named", "", "give model=... to the call or to the client", param="model")
    return name


def _id(request: str | None) -> str:
    if request == "":
        raise Rejected("a request id must not be empty", param="request")
    return request or uuid.uuid4().hex


def _choices(options: Mapping[str, Any]) -> int:
    n = options.get("n")
    return min(n, _MAX_CHOICES) if isinstance(n, int) and n > 0 else 1
