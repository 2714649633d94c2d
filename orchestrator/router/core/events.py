"""The events of the routing core, as values: the arguments of :meth:`orchestrator.router.core.router_core.RouterCore.handle`.

Owns the vocabulary only. The time of an event is the second argument of ``handle``. The tags are those of
:mod:`orchestrator.router.core.event_record`, which keeps most events as they are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from orchestrator.router.core.request import RouterRequest
from workers.protocol.messages import FromReplica


class SubmitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A frontend submits a request.

    ``id`` is a number greater than that of every request before. All that is delivered for the request is addressed to ``owner``, or to
    ``id`` where that is None. ``session`` is :func:`orchestrator.router.core.session_table.session_key` of the request.
    """

    id: int
    request: RouterRequest
    session: str = ""
    owner: Any = None


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """The caller is gone: nothing more is delivered for any choice. Ignored if the request has ended."""

    id: int


class StopChoice(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """The frontend has ended one choice itself, for example at a stop string. Ignored if the choice has ended."""

    id: int
    choice: int


class AddCredit(msgspec.Struct, frozen=True, kw_only=True, tag="credit"):
    """Every live choice of request ``ids[i]`` may be given ``tokens[i]`` more tokens. Requests that have ended are ignored."""

    ids: list[int]
    tokens: list[int]


class ReplicaMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the connection ``peer``, whose sender is authenticated as ``user``. ``frame``: the bytes that ``message`` was decoded
    from, for the recorder; empty where it came by no socket."""

    peer: bytes
    user: str
    message: FromReplica
    frame: bytes = b""


class PeerUnreachable(msgspec.Struct, frozen=True, kw_only=True, tag="unreachable"):
    """A send to ``peer`` failed: the connection is lost, or its queue has reached the high-water mark."""

    peer: bytes


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """Time has passed; due every 50 to 200 ms."""


class StopAccepting(msgspec.Struct, frozen=True, tag="stop_accepting"):
    """The router drains: it refuses new requests, and running ones continue."""


class AbortAll(msgspec.Struct, frozen=True, tag="abort"):
    """The router stops: every remaining request fails, and every replica gets Bye."""


RouterEvent: TypeAlias = (
    SubmitRequest | CancelRequest | StopChoice | AddCredit | ReplicaMessage | PeerUnreachable | Tick | StopAccepting | AbortAll
)
