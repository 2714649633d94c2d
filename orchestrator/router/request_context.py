"""The request context: which request, and which trace, the current task works for. Log lines and spans carry it.

Owns one context variable, which each frontend sets before anything else. Reads W3C Trace Context's ``traceparent``; knows nothing else of
tracing.
"""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from typing import Any

import msgspec

#: Version 00 has exactly these four parts; a later version may have more after a dash.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACEPARENT = 256


class Trace(msgspec.Struct, frozen=True):
    """The caller's span, from ``traceparent``: lower-case hexadecimal ids of 16 and 8 bytes."""

    id: str
    span: str
    sampled: bool


class RequestContext(msgspec.Struct, frozen=True):
    """``request_id``: the id that the caller sees. ``received``: when the request arrived, by :func:`time.monotonic`. ``caller``: its
    tenant or its address, for fair turns at the pools. ``chat``: it is for the chat endpoint."""

    request_id: str
    trace: Trace | None
    received: float
    caller: str = ""
    chat: bool = False


_current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)


def parse_traceparent(text: str) -> Trace | None:
    """None for a malformed one: a caller's mistake in it must not fail the request."""
    found = _TRACEPARENT.fullmatch(text[:_MAX_TRACEPARENT])
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Trace(trace, span, bool(int(flags, 16) & 1))


def enter(request_id: str, traceparent: str, caller: str = "") -> None:
    """Set the request of the current task. ``traceparent``: empty = none."""
    _current.set(RequestContext(request_id, parse_traceparent(traceparent) if traceparent else None, time.monotonic(), caller))


def identify(caller: str) -> None:
    """Set the caller."""
    context = _current.get()
    if context is not None:
        _current.set(msgspec.structs.replace(context, caller=caller))


def learn(metadata: dict[str, Any] | None, *, chat: bool) -> None:
    """Add what the request's body says. ``traceparent`` in the metadata counts where there was no header: RPC has no headers."""
    context = _current.get()
    if context is None:
        return
    trace = context.trace
    if metadata and trace is None and isinstance(found := metadata.get("traceparent"), str):
        trace = parse_traceparent(found)
    if chat or trace is not context.trace:
        _current.set(msgspec.structs.replace(context, trace=trace, chat=chat))


def current() -> RequestContext | None:
    return _current.get()


def caller() -> str:
    """The caller; empty outside of a request."""
    context = _current.get()
    return context.caller if context is not None else ""


def marks() -> tuple[str, str]:
    """(request id, trace id) of the current task's request, for log lines in other processes; empty where there is none."""
    context = _current.get()
    return (context.request_id, context.trace.id if context.trace is not None else "") if context is not None else ("", "")


def fields(context: RequestContext | None) -> dict[str, str]:
    """The fields of a log line about a request: ``log.error(..., extra=fields(context))``."""
    if context is None:
        return {}
    return {"request_id": context.request_id} | ({"trace_id": context.trace.id} if context.trace is not None else {})


class RequestContextFilter(logging.Filter):
    """Adds the current task's request id and trace id to a log record, unless the record has some."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.__dict__.update(fields(_current.get()))
        return True
