"""Replaces running replicas by wanted ones, one at a time, and rolls back completely if a new one does not start.

Owns the order of the moves and the progress. Pure: the :class:`~orchestrator.control.reconciler.Reconciler` carries out what is wanted
after each move (drain the old gang, launch the new one), its views show the progress, and the next move waits until all replicas are
steady.

    rolling --every move done--> done
    rolling --a new replica fails, or is not ready in time--> returning --every move undone--> returned

If replicas of a model change and it gets no additional ones, a *spare* starts first and ends last, if there is room for it. Then the number
of serving replicas never falls, and if the spare fails, the update ends before any other replica was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from orchestrator.control.reconciler import ReplicaView, WantedReplica
from workers.protocol.status import UpdatePhase

#: Failures of a new replica after which the update stops waiting for it.
FAILURES = 2


class RolloutTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that should run: its model and its revision."""

    name: str
    model: str
    revision: str


class RolloutMove(msgspec.Struct, frozen=True, kw_only=True):
    """The change of one replica from revision ``before`` to revision ``after``; empty = it does not exist."""

    name: str
    before: str
    after: str
    spare: bool = False

    def __str__(self) -> str:
        if not self.before:
            return f"start {'the spare ' if self.spare else ''}{self.name}"
        return f"replace {self.name}" if self.after else f"end {'the spare ' if self.spare else ''}{self.name}"


class RolloutBounds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a spare may wait for a place, and that any move may take."""

    spare_s: float = 10.0
    move_s: float = 600.0


class RolloutStep(msgspec.Struct, frozen=True, kw_only=True):
    """A move that is over."""

    text: str
    seconds: float


def plan(
    old: Sequence[RolloutTarget], new: Sequence[RolloutTarget], spares: Sequence[RolloutTarget], *, ready: frozenset[str] = frozenset()
) -> list[RolloutMove]:
    """The moves, model by model: additional replicas, the spare, changed replicas (those that do not serve first), the spare's end; at the
    end, removals. ``spares``: at most one a model. Empty when nothing changes."""
    had = {target.name: target.revision for target in old}
    wanted = {target.name for target in new}
    moves: list[RolloutMove] = []
    for model in dict.fromkeys(target.model for target in new):
        targets = [target for target in new if target.model == model]
        added = [RolloutMove(name=target.name, before="", after=target.revision) for target in targets if target.name not in had]
        changed = [
            RolloutMove(name=target.name, before=had[target.name], after=target.revision)
            for target in targets
            if had.get(target.name, target.revision) != target.revision
        ]
        changed.sort(key=lambda move: move.name in ready)
        spare = next((spare for spare in spares if spare.model == model), None)
        if changed and spare is not None and not added:
            start = RolloutMove(name=spare.name, before="", after=spare.revision, spare=True)
            changed = [start, *changed, RolloutMove(name=spare.name, before=spare.revision, after="", spare=True)]
        moves += [*added, *changed]
    return [*moves, *(RolloutMove(name=target.name, before=target.revision, after="") for target in old if target.name not in wanted)]


class MoveVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a move. ``crowded``: a spare finds no room; ``failed``: the move failed because of ``why``."""

    kind: Literal["waiting", "done", "crowded", "failed"]
    why: str = ""


_WAITING, _DONE, _CROWDED = (MoveVerdict(kind=kind) for kind in ("waiting", "done", "crowded"))


class Rollout:
    """``old``: the running replicas. ``wanted``: the replicas that should run now; it changes in :meth:`step` only."""

    def __init__(self, old: Sequence[RolloutTarget], moves: Sequence[RolloutMove], bounds: RolloutBounds, now: float) -> None:
        self.wanted = {target.name: target.revision for target in old}
        self.phase: UpdatePhase = "rolling"
        #: Reason of the rollback.
        self.error = ""
        self.steps: list[RolloutStep] = []
        self._bounds = bounds
        self._todo = list(moves)
        self._done: list[RolloutMove] = []
        self._move: RolloutMove | None = None
        self._since = now
        self._end_if_done()

    @property
    def over(self) -> bool:
        return self.phase in ("done", "returned")

    @property
    def doing(self) -> str:
        """The running move, or the one that waits for a steady state."""
        return str(self._move or self._todo[0]) if not self.over else ""

    @property
    def left(self) -> int:
        """Moves that are not finished."""
        return len(self._todo) + (self._move is not None)

    def wants(self) -> list[WantedReplica]:
        return [WantedReplica(name=name, revision=revision) for name, revision in self.wanted.items()]

    def step(self, now: float, views: Mapping[str, ReplicaView]) -> bool:
        """Advance with the reconciler's last view of every replica; True if ``wanted`` has changed."""
        if self.over:
            return False
        if self._move is not None:
            verdict = self._judge(self._move, now, views.get(self._move.name))
            match verdict.kind:
                case "waiting":
                    return False
                case "crowded":
                    return self._do_without(self._move, now)
                case "failed":
                    return self._turn_back(verdict.why, now)
                case "done":
                    self._finish(self._move, now)
        if not self._todo:
            return False
        troubled = [name for name, revision in self.wanted.items() if not self._steady(views.get(name), revision)]
        if not troubled:
            self._begin(now)
            return True
        if now - self._since > self._bounds.move_s:
            return self._turn_back(f"replica {troubled[0]} was not ready within {self._bounds.move_s:.0f} s", now)
        return False

    @staticmethod
    def _steady(view: ReplicaView | None, revision: str) -> bool:
        """Whether the rollout need not wait for a replica: it serves, or has failed permanently."""
        if view is None:
            return False
        return view.phase == "failed" or (view.phase == "ready" and view.gang is not None and view.gang.revision == revision)

    def _judge(self, move: RolloutMove, now: float, view: ReplicaView | None) -> MoveVerdict:
        if not move.after:
            return _DONE if view is None else self._wait(move, now)
        if view is None:
            return self._wait(move, now)
        if view.phase == "ready" and view.gang is not None and view.gang.revision == move.after:
            return _DONE
        if self.phase == "rolling" and (view.phase == "failed" or view.failures >= FAILURES):
            return MoveVerdict(kind="failed", why=f"replica {move.name} does not start: {view.cause}")
        if move.spare and view.phase == "placing" and now - self._since > self._bounds.spare_s:
            return _CROWDED
        return self._wait(move, now)

    def _wait(self, move: RolloutMove, now: float) -> MoveVerdict:
        if now - self._since > self._bounds.move_s:
            return MoveVerdict(kind="failed", why=f"{move}: not done within {self._bounds.move_s:.0f} s")
        return _WAITING

    def _begin(self, now: float) -> None:
        move = self._move = self._todo.pop(0)
        self._since = now
        if move.after:
            self.wanted[move.name] = move.after
        else:
            self.wanted.pop(move.name, None)

    def _finish(self, move: RolloutMove, now: float) -> None:
        self.steps.append(RolloutStep(text=str(move), seconds=now - self._since))
        self._done.append(move)
        self._move, self._since = None, now
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._todo and self._move is None:
            self.phase = "done" if self.phase == "rolling" else "returned"

    def _do_without(self, spare: RolloutMove, now: float) -> bool:
        """There is no room for a spare: the replicas are replaced one by one, each drained before its successor starts."""
        self.steps.append(
            RolloutStep(text=f"{spare}: no room, so each replica ends before its successor starts", seconds=now - self._since)
        )
        del self.wanted[spare.name]
        self._todo = [move for move in self._todo if move.name != spare.name]
        self._move, self._since = None, now
        return True

    def _turn_back(self, why: str, now: float) -> bool:
        """Undo the finished moves, in reverse; if that fails too, want all old replicas at once and leave the rest to the reconciler."""
        if self._move is not None:
            self._done.append(self._move)
        undone = [RolloutMove(name=move.name, before=move.after, after=move.before, spare=move.spare) for move in reversed(self._done)]
        if self.phase == "rolling":
            self.error, self.phase = why, "returning"
            self._todo, self._done, self._move = undone, [], None
            if not undone:
                self._end_if_done()
                return False
            self._begin(now)
            return True
        self.error += f"; on the way back: {why}"
        for move in self._todo:
            if move.after:
                self.wanted[move.name] = move.after
            else:
                self.wanted.pop(move.name, None)
        self._todo, self._move = [], None
        self._end_if_done()
        return True
