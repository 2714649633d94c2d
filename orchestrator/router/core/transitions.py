"""What becomes of a row: into a replica, back into its line, or over; and what replicas and doors are told of it.

Owns the actions not yet taken by the shell and the times at which something may be late. Moves rows on the
:class:`~orchestrator.router.core.request_table.RequestTable`; never judges a replica or a message,
:mod:`orchestrator.router.core.router_core` does that.
"""

from __future__ import annotations

from math import inf

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.policy import LeastWaitPolicy
from orchestrator.router.core.replica_registry import Replica, ReplicaRegistry
from orchestrator.router.core.request_state import (
    ATTEMPTS_PER_ASK,
    Action,
    ChoiceState,
    FailChoice,
    FinishChoice,
    RequestState,
    SendMessage,
)
from orchestrator.router.core.request_table import RequestTable
from orchestrator.router.core.stats import Cause, Reason
from workers.protocol.errors import DeadlineExceeded, Overloaded, TriremeError, Unavailable
from workers.protocol.messages import Attach, Bye, Cancel, Credit, FinishReason, GenerateTask, Submit, Usage


class Transitions:
    """``boot``: the router's nonce, in every message. ``accept_s``: a Submit or Attach without an answer for so long was lost."""

    def __init__(
        self, boot: str, board: RequestTable, chooser: LeastWaitPolicy, fleet: ReplicaRegistry, admission: AdmissionSpec, accept_s: float
    ) -> None:
        self._boot, self._board, self._chooser, self._fleet, self._admission = boot, board, chooser, fleet, admission
        self._accept_s = accept_s
        self.actions: list[Action] = []
        #: No request's deadline, and no answer that a replica owes, falls due before these: most ticks look at no row at all.
        self._next_deadline = self._next_answer = inf

    def send(self, replica: Replica, message: Submit | Attach | Cancel | Credit | Bye) -> None:
        self.actions.append(SendMessage(replica.peer, message))

    def grant(self, replica: Replica, stream: int, tokens: int) -> None:
        """Tell a replica of credit; grants that come together go in one message, as a client's do."""
        last = self.actions[-1] if self.actions else None
        if isinstance(last, SendMessage) and last.peer == replica.peer and isinstance(last.message, Credit):
            last.message.streams.append(stream)
            last.message.tokens.append(tokens)
        else:
            self.send(replica, Credit(boot=self._boot, streams=[stream], tokens=[tokens]))

    def admit(self, request: RequestState) -> None:
        """Its rows wait in their line from now on."""
        self._board.requests[request.id] = request
        self._next_deadline = min(self._next_deadline, request.deadline)
        self._board.tallies[request.model].asked(len(request.rows), request.ask.params.max_tokens)
        for row in request.rows:
            self._board.lines[request.model].push(row)

    def fill(self, model: str, now: float) -> None:
        """Rows of the line to replicas, as many as there is room for."""
        line = self._board.lines[model]
        while (row := line.first()) is not None:
            if len(row.emitted) >= row.params.max_tokens:
                # All its tokens are here, only its Done was lost.
                usage = Usage(prompt_tokens=len(row.request.ask.prompt_ids), output_tokens=len(row.emitted))
                self.finish(row, "length", usage, None, now)
                continue
            choice = self._chooser.choose(row, self._fleet.trusted(model))
            if choice is None:
                return
            self._submit(row, *choice, now)

    def _submit(self, row: ChoiceState, replica: Replica, reason: Reason, now: float) -> None:
        ask = row.request.ask
        row.attempts += 1
        row.attempt = ask.attempt * ATTEMPTS_PER_ASK + row.attempts
        placement = self._chooser.placed(row, replica, reason, alone=len(self._fleet.replicas) == 1)
        self._board.place(row, replica, placement, now)
        self._next_answer = min(self._next_answer, now + self._accept_s)
        left = row.request.deadline - now
        self.send(
            replica,
            Submit(
                boot=self._boot, stream=row.stream, attempt=row.attempt, client=ask.client, request_id=_row_name(row),
                model=row.request.model, prompt_ids=ask.prompt_ids, salt=ask.salt,
                deadline_ms=max(1, int(left * 1000)) if left < inf else None, marks=ask.marks,
                task=GenerateTask(params=row.params, emitted=list(row.emitted), credit=row.credit),
            ),
        )  # fmt: skip

    def attach(self, row: ChoiceState, now: float) -> None:
        """Ask its replica for everything beyond the tokens that are here, on another stream."""
        self._board.restream(row, now)
        self._next_answer = min(self._next_answer, now + self._accept_s)
        replica, ask = row.replica, row.request.ask
        assert replica is not None
        self._board.counts["attached"] += 1
        self.send(
            replica,
            Attach(
                boot=self._boot, stream=row.stream, attempt=row.attempt, client=ask.client, request_id=_row_name(row),
                have=len(row.emitted), credit=row.credit,
            ),
        )  # fmt: skip

    def put_back(self, row: ChoiceState, cause: Cause, now: float, *, cancel: bool) -> None:
        """To the front of the queue, to go on elsewhere from the tokens that are here. ``cancel``: tell the replica to drop it."""
        self._release(row, cancel=cancel)
        self._board.tallies[row.request.model].moves(row.trail, cause, now)
        self._board.requeue(row, now)
        self._board.counts["resubmitted"] += 1

    def stop(self, row: ChoiceState, now: float) -> None:
        """Its door has ended it: it has all that it wanted."""
        if row.phase != "ended":
            self._board.tallies[row.request.model].ended(row.trail, now)
            self.abandon(row)

    def abandon(self, row: ChoiceState) -> None:
        """Nobody waits for it any more; its door knows."""
        if row.phase != "ended":
            self._release(row, cancel=True)
            self._board.end(row, "cancelled")

    def finish(self, row: ChoiceState, reason: FinishReason, usage: Usage, stop_id: int | None, now: float) -> None:
        """Its replica has ended it."""
        self._board.tallies[row.request.model].ended(row.trail, now, usage.cached_tokens)
        self._release(row, cancel=False)
        self._board.end(row, "finished")
        self.actions.append(FinishChoice(row.owner, row.choice, reason, usage, stop_id))

    def fail(self, row: ChoiceState, error: TriremeError, *, cancel: bool = True) -> None:
        self._board.tallies[row.request.model].gave_up(row.trail)
        self._release(row, cancel=cancel)
        self._board.end(row, "failed")
        self.actions.append(FailChoice(row.owner, row.choice, error))

    def _release(self, row: ChoiceState, *, cancel: bool) -> None:
        replica = self._board.release(row)
        if replica is not None and cancel:
            self.send(replica, Cancel(boot=self._boot, stream=row.stream, attempt=row.attempt))

    # --- time

    def expire(self, now: float) -> None:
        """End what is past its deadline, place again what no replica answered, and see to the lines."""
        if now >= self._next_deadline:
            for request in [request for request in self._board.requests.values() if now >= request.deadline]:
                self._expire(request)
            self._next_deadline = min((request.deadline for request in self._board.requests.values()), default=inf)
        if now >= self._next_answer:
            sent = [row for row in self._board.streams.values() if row.phase == "sent"]
            for row in sent:
                if now >= row.sent_at + self._accept_s:
                    self.put_back(row, "unanswered", now, cancel=True)
            self._next_answer = min((row.sent_at + self._accept_s for row in sent if row.phase == "sent"), default=inf)
        for model, line in self._board.lines.items():
            self.fill(model, now)
            if line and self._admission.queue_timeout_s:
                self._expire_line(model, now)

    def _expire(self, request: RequestState) -> None:
        limit = request.deadline - request.arrived
        for row in request.rows:
            if row.phase != "ended":
                self.fail(row, DeadlineExceeded(f"the request was not done within its {limit:.1f} s", f"it was {row.phase}"))

    def _expire_line(self, model: str, now: float) -> None:
        limit = self._admission.queue_timeout_s
        line = self._board.lines[model]
        for row in line.since(now - limit):
            waited = f"the request waited {limit:.0f} s for a replica of {model!r}"
            retry = self._chooser.retry_after(model, len(line), now)
            if any(replica.state == "ready" for replica in self._fleet.serving(model)):
                self.fail(row, Overloaded(waited, "all are busy", "retry later", retry_after=retry))
            else:
                self.fail(row, Unavailable(waited, "none is ready", "retry later, or see `trireme status`", retry_after=retry))


def _row_name(row: ChoiceState) -> str:
    """A choice's lasting name at leaders: unambiguous, for the part after the last slash is always the choice."""
    return f"{row.request.ask.request_id}/{row.choice}"
