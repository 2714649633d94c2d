"""The recorder of a routing core: the last events with the state before them, so that an incident can be run again elsewhere.

Owns the window: segments of records, each after a snapshot of the core. The oldest segment is dropped whole once those after it hold
:data:`WINDOW_EVENTS` events, or when all together take more than :data:`WINDOW_BYTES`. A snapshot takes about 4 µs a live choice: so a new
segment begins at a tick, when no token waits, and only while :data:`SNAPSHOT_REQUESTS` requests or less are live, else when a segment has
grown to a quarter of the bytes. The garbage collector scans none of it: an event is kept encoded, and a replica's message as the received
frame, which costs nothing per token. Data that a dump must not contain is removed when a dump is written, outside the event loop.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias, TypeVar

import msgspec

from orchestrator.router.core.actions import Action, DeliverTokens
from orchestrator.router.core.event_record import (
    DeliverRecord,
    EventRecord,
    KeptAction,
    PlainEvent,
    record_action,
    record_event,
    record_message,
)
from orchestrator.router.core.events import ReplicaMessage, RouterEvent, SubmitRequest, Tick
from orchestrator.router.core.fair_order import FairOrderSnapshot
from orchestrator.router.core.router_core import CoreSettings, CoreSnapshot, RouterCore
from workers.protocol import messages
from workers.protocol.errors import TriremeError
from workers.protocol.messages import Tokens

#: Minimum number of kept events, if they fit, and the maximum bytes of all segments.
WINDOW_EVENTS, WINDOW_BYTES = 10_000, 64 << 20
#: With more live requests than this, a snapshot would block the event loop for more than about 10 ms.
SNAPSHOT_REQUESTS = 2048
#: Maximum bytes of an event's objects and list entries in addition to their content.
OVERHEAD_BYTES = 160
#: Number of users whose digests are cached.
MAX_USERS = 4096
#: The first word of a dump: what it is, and its format.
DUMP_FORMAT = "trireme router dump 1"

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class DumpHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a dump. ``dropped``: events since the start that are no longer kept. ``unix_offset_s``: add it to a time of the
    core to get seconds since 1970."""

    format: str
    settings: CoreSettings
    dropped: int
    unix_offset_s: float


class KeptOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the core did with a replica's message; the fields are those of an ``EventRecord``, and of a ``TokensRecord``."""

    cached: list[list[int]] = []
    actions: list[KeptAction] = []
    invalid: list[int] = []
    invalid_prompts: list[int] = []


class KeptMessage(msgspec.Struct, frozen=True, gc=False):
    """A ``ReplicaMessage`` in the window. ``user``: a digest; ``outcome``: an encoded :class:`KeptOutcome`."""

    at: float
    peer: bytes
    user: str
    frame: bytes
    outcome: bytes

    def __len__(self) -> int:
        """Its bytes."""
        return len(self.frame) + len(self.outcome) + len(self.peer)

    def record(self) -> EventRecord:
        found = _outcomes.decode(self.outcome)
        message = messages.decode_from_replica(self.frame)
        event = record_message(self.peer, self.user, message, found.invalid, found.invalid_prompts)
        return EventRecord(at=self.at, event=event, cached=found.cached, actions=found.actions)


_outcomes = msgspec.msgpack.Decoder(KeptOutcome)
_NOTHING = _encoder.encode(KeptOutcome())


@functools.lru_cache(maxsize=512)
def _delivered(choices: int) -> bytes:
    """The outcome of a message whose tokens were delivered to so many choices, encoded."""
    return _encoder.encode(KeptOutcome(actions=[DeliverRecord(choices=choices)]))


#: A line of a dump before it is written: encoded, or a message as it came.
DumpPart: TypeAlias = bytes | KeptMessage


class _Segment:
    """Events from one snapshot on. ``size``: bytes of the events."""

    __slots__ = ("events", "size", "snapshot")

    def __init__(self, snapshot: bytes) -> None:
        self.snapshot = snapshot
        self.events: list[DumpPart] = []
        self.size = 0

    @property
    def bytes(self) -> int:
        return self.size + len(self.snapshot)


class EventRecorder:
    """Give events to the core through :meth:`handle`. ``id_of``: the id of the request that an owner stands for; by default the owner is
    that id. ``digest``: what is kept of an authenticated user, and of a tenant."""

    def __init__(
        self, core: RouterCore, *, id_of: Callable[[Any], int] = int, digest: Callable[[str], str] | None = None,
        window_events: int = WINDOW_EVENTS, window_bytes: int = WINDOW_BYTES,
    ) -> None:  # fmt: skip
        self._core, self._id_of = core, id_of
        self._digest = digest if digest is not None else user_digest
        self._window_events, self._window_bytes = window_events, window_bytes
        #: Events and bytes of a segment that is full.
        self._full_events, self._full_bytes = (window_events + 1) // 2, (window_bytes + 3) // 4
        self._digests: dict[str, str] = {"": ""}
        self._segments: deque[_Segment] = deque()
        self._events = self._bytes = self._dropped = 0
        self._start_segment()

    def handle(self, event: RouterEvent, now: float) -> list[Action]:
        """:meth:`RouterCore.handle`, recorded also where it raises."""
        segment = self._segments[-1]
        if segment.size >= self._full_bytes or (len(segment.events) >= self._full_events and self._may_snapshot(event)):
            self._start_segment()
            segment = self._segments[-1]
        actions: list[Action] = []
        refused = ""
        try:
            actions = self._core.handle(event, now)
        except TriremeError as error:
            refused = error.code
            raise
        finally:
            kept: DumpPart
            if isinstance(event, ReplicaMessage):
                frame = event.frame or messages.encode(event.message)
                kept = KeptMessage(now, event.peer, self._digest_of(event.user) if event.user else "", frame, self._outcome(event, actions))
            else:
                kept = self._encode(event, now, actions, refused)
            size = len(kept) + OVERHEAD_BYTES
            segment.events.append(kept)
            segment.size += size
            self._bytes += size
            self._events += 1
        return actions

    def _may_snapshot(self, event: RouterEvent) -> bool:
        return isinstance(event, Tick) and self._core.live <= SNAPSHOT_REQUESTS

    def _outcome(self, event: ReplicaMessage, actions: list[Action]) -> bytes:
        """What the core did with the message, encoded. For most messages it is one delivery, or nothing: this is made once."""
        core = self._core
        invalid, prompts = core.invalid if isinstance(event.message, Tokens) else ((), ())
        if len(actions) <= 1 and not core.prefix_answers and not invalid and not prompts:
            if not actions:
                return _NOTHING
            action = actions[0]
            if isinstance(action, DeliverTokens):
                return _delivered(len(action.deliveries))
        kept = [record_action(action, self._id_of) for action in actions]
        return _encoder.encode(KeptOutcome(cached=core.prefix_answers, actions=kept, invalid=list(invalid), invalid_prompts=list(prompts)))

    def _encode(self, event: SubmitRequest | PlainEvent, now: float, actions: list[Action], refused: str) -> bytes:
        kept = [record_action(action, self._id_of) for action in actions]
        record = EventRecord(
            at=now, event=record_event(event, self._digest_of), cached=self._core.prefix_answers, actions=kept, refused=refused
        )
        return _encoder.encode(record)

    def dump(self, unix_offset_s: float) -> list[DumpPart]:
        """The window: header, snapshot, events in order, and a snapshot of now; :func:`dump_lines` makes a file. The parts hold tokens, the
        lines do not."""
        header = DumpHeader(
            format=DUMP_FORMAT, settings=self._core.settings(), dropped=self._dropped, unix_offset_s=unix_offset_s
        )  # fmt: skip
        events = [event for segment in self._segments for event in segment.events]
        return [_encoder.encode(header), self._segments[0].snapshot, *events, self._snapshot()]

    def _start_segment(self) -> None:
        segment = _Segment(self._snapshot())
        self._segments.append(segment)
        self._bytes += segment.bytes
        while len(self._segments) > 1:
            oldest = self._segments[0]
            # The new segment may grow to a quarter of the bytes before this is looked at again.
            if self._events - len(oldest.events) < self._window_events and self._bytes * 4 <= self._window_bytes * 3:
                break
            self._segments.popleft()
            self._events -= len(oldest.events)
            self._bytes -= oldest.bytes
            self._dropped += len(oldest.events)

    def _snapshot(self) -> bytes:
        found = self._core.snapshot()
        replicas = [msgspec.structs.replace(replica, user=self._digest_of(replica.user)) for replica in found.replicas]
        table = found.table
        requests = [msgspec.structs.replace(one, tenant=self._digest_of(one.tenant)) for one in table.requests]
        fair = {model: self._without_names(order) for model, order in table.fair.items()}
        table = msgspec.structs.replace(table, requests=requests, fair=fair)
        return _encoder.encode(msgspec.structs.replace(found, replicas=replicas, table=table))

    def _without_names(self, order: FairOrderSnapshot) -> FairOrderSnapshot:
        accounts = [msgspec.structs.replace(one, tenant=self._digest_of(one.tenant)) for one in order.accounts]
        return msgspec.structs.replace(order, accounts=accounts, idle=[self._digest_of(tenant) for tenant in order.idle])

    def _digest_of(self, user: str) -> str:
        known = self._digests.get(user)
        if known is None:
            if len(self._digests) >= MAX_USERS:
                self._digests = {"": ""}
            known = self._digests[user] = self._digest(user)
        return known


def user_digest(user: str, key: bytes = b"") -> str:
    """The digest of an authenticated user, or a tenant, for a dump. ``key``: a secret; without it an address could be guessed."""
    return blake2b(user.encode(errors="surrogatepass"), digest_size=6, key=key).hexdigest()


def dump_lines(dump: Sequence[DumpPart]) -> list[bytes]:
    """A dump as lines of JSON, to be read by people and by :func:`read_dump`."""
    return [dump_line(part) for part in dump]


def dump_line(part: DumpPart) -> bytes:
    """One part of a dump as a line. Takes 10 µs for a small event, 100 µs for a step of 250 choices: not for an event loop."""
    if isinstance(part, KeptMessage):
        return msgspec.json.encode(part.record())
    return msgspec.json.encode(msgspec.msgpack.decode(part))


class Dump(msgspec.Struct, frozen=True, kw_only=True):
    """A dump that was read. ``lines``: as they are in the file; ``end``: the state after the last event."""

    lines: list[bytes]
    header: DumpHeader
    snapshot: CoreSnapshot
    events: list[EventRecord]
    end: CoreSnapshot


def read_dump(lines: list[bytes]) -> Dump:
    """Raises ValueError naming the line if ``lines`` are not a dump."""
    number = 0

    def decode(line: bytes, kind: type[T]) -> T:
        nonlocal number
        number += 1
        return msgspec.json.decode(line, type=kind)

    try:
        header = decode(lines[0] if lines else b"", DumpHeader)
        if header.format != DUMP_FORMAT:
            raise ValueError(f"its format is {header.format[:64]!r}, not {DUMP_FORMAT!r}")
        if len(lines) < 3:
            raise ValueError("the state before or after the events is missing")
        return Dump(
            lines=lines, header=header, snapshot=decode(lines[1], CoreSnapshot),
            events=[decode(line, EventRecord) for line in lines[2:-1]], end=decode(lines[-1], CoreSnapshot),
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None
