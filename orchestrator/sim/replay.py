"""Runs a router's dump again: the same events must lead to exactly the same actions and the same state.

Owns nothing. The core is the production object; only the prefix lookup is replaced, by the answers in the dump.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from orchestrator.router.core.choice_state import ChoiceState, RequestState
from orchestrator.router.core.event_record import event_of
from orchestrator.router.core.recorder import Dump, EventRecorder, dump_lines
from orchestrator.router.core.replica_registry import Replica
from orchestrator.router.core.router_core import RouterCore
from workers.protocol.errors import ArtifactError, TriremeError


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay. ``difference``: the first line of the dump that differs, and how; empty if all are equal."""

    router: str
    events: int
    actions: int
    seconds: float
    difference: str = ""


class RecordedPrefixes:
    """A :class:`~orchestrator.router.core.prefix_index.PrefixLookup` that repeats recorded answers; it learns nothing."""

    def __init__(self) -> None:
        self._answers: list[list[int]] = []

    def load(self, answers: list[list[int]]) -> None:
        """The answers of the next event, in order."""
        self._answers = list(answers)

    def cached_tokens(self, request: RequestState, replicas: Sequence[Replica]) -> list[int]:
        """If more is requested than was recorded, the replay differs already, so any answer of the right length is fine."""
        answer = self._answers.pop(0) if self._answers else []
        return answer if len(answer) == len(replicas) else [0] * len(replicas)

    def note_sent(self, request: RequestState, replica: Replica) -> None: ...

    def note_end(self, choice: ChoiceState, replica: Replica) -> None: ...

    def note_cached(self, replica: Replica, hashes: Sequence[int]) -> None: ...

    def forget(self, replica: Replica) -> None: ...


def replay(found: Dump) -> ReplayReport:
    """Run the dump ``found`` again. Raises :class:`ArtifactError` where its state contradicts itself, and whatever the core raised when the
    dump was taken, where that was a fault."""
    prefixes = RecordedPrefixes()
    try:
        core = RouterCore.restored(found.header.settings, found.snapshot, prefixes)
        core.check()
    except (AssertionError, LookupError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ArtifactError("the state at the beginning of the dump contradicts itself", why, "was the file changed?") from None
    recorder = EventRecorder(core, digest=str, window_events=2 * len(found.events) + 2, window_bytes=1 << 62)
    for record in found.events:
        prefixes.load(record.cached)
        try:
            recorder.handle(event_of(record.event), record.at)
        except TriremeError:
            continue  # the record has the refusal
    core.check()
    again = dump_lines(recorder.dump(found.header.unix_offset_s))
    times = [record.at for record in found.events]
    return ReplayReport(
        router=found.header.settings.router, events=len(found.events), actions=sum(len(record.actions) for record in found.events),
        seconds=times[-1] - times[0] if times else 0.0, difference=_difference(found.lines[1:], again[1:]),
    )  # fmt: skip


def _difference(recorded: list[bytes], again: list[bytes]) -> str:
    for number, (one, other) in enumerate(zip(recorded, again, strict=True), 2):
        if one != other:
            return f"line {number} was\n{one.decode()}\nand is\n{other.decode()}"
    return ""
