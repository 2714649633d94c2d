"""Whose work this is: the request and the trace that a task works for, so that log lines and spans can say so.

Owns one context variable, set at each door before anything else. Knows W3C Trace Context's ``traceparent`` and nothing of tracing itself.
"""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from typing import Any

import msgspec

#: Version 00 has these four parts alone; a later one may have more, behind a dash.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACEPARENT = 256


class Trace(msgspec.Struct, frozen=True):
    """The caller's span, as ``traceparent`` names it: lower-case hexadecimal ids of 16 and 8 bytes."""

    id: str
    span: str
    sampled: bool


class Origin(msgspec.Struct, frozen=True):
    """``request``: the id that the caller sees. ``received``: when it came, by :func:`time.monotonic`. ``chat``: it asks for one."""

    request: str
    trace: Trace | None
    received: float
    chat: bool = False


_origin: ContextVar[Origin | None] = ContextVar("origin", default=None)


def parse_traceparent(text: str) -> Trace | None:
    """None for what is not one: a caller's mistake there must not cost its request."""
    found = _TRACEPARENT.fullmatch(text[:_MAX_TRACEPARENT])
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Trace(trace, span, bool(int(flags, 16) & 1))


def enter(request: str, traceparent: str) -> None:
    """From now on this task works for that request."""
    _origin.set(Origin(request, parse_traceparent(traceparent) if traceparent else None, time.monotonic()))


def learn(metadata: dict[str, Any] | None, *, chat: bool) -> None:
    """What its body says. ``traceparent`` in the metadata counts where the door brought none: the RPC door has no headers."""
    origin = _origin.get()
    if origin is None:
        return
    trace = origin.trace
    if metadata and trace is None and isinstance(found := metadata.get("traceparent"), str):
        trace = parse_traceparent(found)
    if chat or trace is not origin.trace:
        _origin.set(Origin(origin.request, trace, origin.received, chat))


def current() -> Origin | None:
    return _origin.get()


def marks() -> tuple[str, str]:
    """(request id, trace id) of this task's work, for those who log about it elsewhere; empty where there is none."""
    origin = _origin.get()
    return (origin.request, origin.trace.id if origin.trace is not None else "") if origin is not None else ("", "")


def fields(origin: Origin | None) -> dict[str, str]:
    """What a log line about it carries: ``log.error(..., extra=fields(origin))``."""
    if origin is None:
        return {}
    return {"request_id": origin.request} | ({"trace_id": origin.trace.id} if origin.trace is not None else {})


class OriginFilter(logging.Filter):
    """Puts a task's own origin on its log records, but for those that were told another."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.__dict__.update(fields(_origin.get()))
        return True
