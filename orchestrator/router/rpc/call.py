"""One RPC request inside the router, with everything that was sent to its client, so that it can be sent again.

Owns the record of one :class:`~workers.protocol.messages.Generate` from receipt to its last terminal message, and the parallel lists that
the next message to each client will hold. No sockets: :mod:`orchestrator.router.rpc.server` sends.

    preparing --submitted--> submitted --every choice ended--> ended
    preparing, submitted --cancelled by the client, or the client stays away--> dropped
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from orchestrator.router.interfaces import Ticket
from orchestrator.router.metrics import RequestMeter
from orchestrator.router.tenant_caps import Place
from workers.protocol.errors import TriremeError, printable
from workers.protocol.messages import Accepted, Done, Failed, FinishReason, Logprobs, Tokens, Usage, error_text

#: (client key, the client's own request id): the permanent name of a request.
Name: TypeAlias = tuple[str, str]


#: The output of one step for a choice: (stream, attempt, first, tokens, choice, text, logprobs). :meth:`Outgoing.take` makes columns of
#: them.
Delta: TypeAlias = tuple[int, int, int, list[int], int, str | None, list[Logprobs] | None]


class Outgoing:
    """The next messages to one client: one message with the tokens of all its streams, then terminal messages. ``wake(self)`` is called
    when the first part of the next message has been added."""

    __slots__ = ("_deltas", "_ends", "_nonempty", "_prompts", "_wake", "peer")

    def __init__(self, peer: bytes, wake: Callable[[Outgoing], None]) -> None:
        self.peer, self._wake, self._nonempty = peer, wake, False
        self._ends: list[Done | Failed] = []
        self._clear()

    def _clear(self) -> None:
        self._deltas: list[Delta] = []
        self._prompts: list[tuple[int, list[Logprobs]]] = []

    def add(self, delta: Delta) -> None:
        if not self._nonempty:
            self._mark()
        self._deltas.append(delta)

    def add_prompt(self, stream: int, logprobs: list[Logprobs]) -> None:
        self._mark()
        self._prompts.append((stream, logprobs))

    def end(self, message: Done | Failed) -> None:
        self._mark()
        self._ends.append(message)

    def _mark(self) -> None:
        if not self._nonempty:
            self._nonempty = True
            self._wake(self)

    def take(self, boot: str) -> list[Tokens | Done | Failed]:
        """The messages in order; afterwards there are none."""
        self._nonempty = False
        messages: list[Tokens | Done | Failed] = []
        if self._deltas or self._prompts:
            columns: list[list[Any]] = [list(column) for column in zip(*self._deltas, strict=True)] or [[] for _ in range(7)]
            streams, attempts, firsts, tokens, choices, texts, logprobs = columns
            messages.append(
                Tokens(
                    boot=boot,
                    streams=streams,
                    attempts=attempts,
                    firsts=firsts,
                    tokens=tokens,
                    logprobs=logprobs if _any_given(logprobs) else None,
                    prompt_logprobs=self._prompts or None,
                    texts=[text or "" for text in texts] if _any_given(texts) else None,
                    choices=choices if any(choices) else None,
                )
            )
            self._clear()
        messages += self._ends
        self._ends = []
        return messages


class _CallChoice:
    """The whole output of one choice. ``tokens``: the ``base`` tokens that the client had at the start, and all later ones. ``starts`` and
    ``texts``: for each delivery, the number of tokens before it and its text."""

    __slots__ = ("base", "end", "logprobs", "starts", "texts", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.base = tokens, len(tokens)
        self.logprobs: list[Logprobs] = []
        self.starts: list[int] = []
        self.texts: list[str] = []
        self.end: Done | Failed | None = None


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What the dispatcher has accepted for a call. ``accepted``: the message that told the client so."""

    ticket: Ticket
    meter: RequestMeter
    accepted: Accepted


class RpcCall:
    """A client's request, and the sink of its output. ``stream`` and ``attempt`` are those of the client's last Generate; ``out`` leads to
    the connection that it came from. ``texts``: the client wants text. ``place``: what it counts for among the requests of its ``tenant``.

    Where the client wants no text (``open`` with a meter), the call itself is the dispatcher's watcher, which saves a call per token, and
    its choices share the dispatcher's token lists.
    """

    __slots__ = (
        "_boot", "_ended", "_meter", "_open", "attempt", "cancelled", "choices", "client_boot", "granted", "lost_at", "name", "out",
        "place", "prompt", "stream", "submission", "tenant", "texts",
    )  # fmt: skip

    def __init__(
        self, name: Name, boot: str, texts: bool, out: Outgoing, ended: Callable[[RpcCall], None], *, tenant: str, place: Place,
        granted: int = 0,
    ) -> None:  # fmt: skip
        self.name, self._boot, self.texts, self.out, self._ended = name, boot, texts, out, ended
        self.tenant, self.place = tenant, place
        self.client_boot, self.stream, self.attempt = "", 0, 0
        self.submission: Submission | None = None
        self._meter: RequestMeter | None = None
        self.choices: list[_CallChoice] = []
        self.prompt: list[Logprobs] | None = None
        self._open = 0
        #: Tokens granted to each choice, beyond those that the client had at the start.
        self.granted = granted
        #: Cancelled before it was submitted.
        self.cancelled = False
        #: When the client was first found gone; None = it is connected.
        self.lost_at: float | None = None

    def open(self, records: list[list[int]], meter: RequestMeter | None = None) -> None:
        """Begin the choices. ``records``: a list for each, with the tokens that the client has already. ``meter``: counts the ends, where
        the call is the dispatcher's watcher."""
        self.choices = [_CallChoice(record) for record in records]
        self._open, self._meter = len(records), meter

    @property
    def repeatable(self) -> bool:
        """Whether every choice is done. A failure may be temporary, so a repeat of a failed call is a new request."""
        return all(isinstance(choice.end, Done) for choice in self.choices)

    @property
    def size(self) -> int:
        """Tokens in the record."""
        return sum(len(choice.tokens) for choice in self.choices)

    def continues(self, have: list[int]) -> bool:
        """Whether :meth:`replay` leaves no gap for a client that has ``have`` tokens of each choice."""
        if not self.choices:
            return not any(have)
        for index, choice in enumerate(self.choices):
            count = _count(have, index)
            if not choice.base <= count <= len(choice.tokens) or (self.texts and count < len(choice.tokens) and count not in choice.starts):
                return False
        return True

    def lacking(self, have: list[int], credit: int) -> int:
        """Tokens to grant so that a client that has ``have`` tokens gets ``credit`` more. Its earlier grants may have been lost."""
        taken = max((_count(have, index) - choice.base for index, choice in enumerate(self.choices)), default=0)
        return max(0, taken + credit - self.granted)

    def add_credit(self, tokens: int) -> None:
        """Grant ``tokens`` more to every live choice; without effect before the request is submitted."""
        if self.submission is not None and tokens:
            self.granted += tokens
            self.submission.ticket.credit(tokens)

    def attach(self, out: Outgoing, boot: str, stream: int, attempt: int) -> None:
        """Send everything from now on to this connection and stream."""
        self.out, self.client_boot, self.stream, self.attempt, self.lost_at = out, boot, stream, attempt, None

    def replay(self, have: list[int]) -> None:
        """Send again what a client that has ``have`` tokens of each choice lacks. Only where the record :meth:`continues` from there."""
        if self.prompt is not None:
            self.out.add_prompt(self.stream, self.prompt)
        for index, choice in enumerate(self.choices):
            count = _count(have, index)
            if count < len(choice.tokens):
                text = "".join(text for start, text in zip(choice.starts, choice.texts, strict=True) if start >= count)
                logprobs = choice.logprobs[count - choice.base :] if choice.logprobs else None
                self._add(index, count, choice.tokens[count:], text if self.texts else None, logprobs)
            if choice.end is not None:
                self.out.end(self._addressed(choice.end))

    def stop_choice(self, choice: int) -> None:
        """A stop string has ended the choice."""
        if self.submission is not None:
            self.submission.ticket.stop_choice(choice)

    # --- Watcher

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        if logprobs is not None:
            self.choices[choice].logprobs += logprobs
        self.out.add((self.stream, self.attempt, first, tokens, choice, None, logprobs))

    def on_cached(self, choice: int, tokens: int) -> None:
        """Nothing: a call that is the watcher itself has no stop strings, so every end brings its usage."""

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        assert self._meter is not None
        self._meter.ended(reason, usage)
        self.on_end(choice, reason, usage, stop_id, "")

    # --- TextSink

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        record = self.choices[choice]
        record.starts.append(len(record.tokens))
        record.texts.append(text)
        record.tokens += tokens
        if logprobs is not None:
            record.logprobs += logprobs
        self._add(choice, first, tokens, text if self.texts else None, logprobs)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        if self.prompt is None:
            self.prompt = logprobs
            self.out.add_prompt(self.stream, logprobs)

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        stop_id = stopped_by if isinstance(stopped_by, int) else None
        text = tail if self.texts else ""
        self._finish(
            choice,
            Done(boot=self._boot, stream=0, attempt=0, reason=reason, usage=usage, stop_id=stop_id, choice=choice, text=text),
        )

    def on_failed(self, choice: int, error: TriremeError) -> None:
        if self._meter is not None:
            self._meter.failed(error.code)
        failed = Failed(
            boot=self._boot,
            stream=0,
            attempt=0,
            code=error.code,
            message=printable(error_text(error)),
            retry_after=error.retry_after,
            param=error.param,
            choice=choice,
        )
        self._finish(choice, failed)

    def _add(self, choice: int, first: int, tokens: list[int], text: str | None, logprobs: list[Logprobs] | None) -> None:
        self.out.add((self.stream, self.attempt, first, tokens, choice, text, logprobs))

    def _finish(self, choice: int, end: Done | Failed) -> None:
        self.choices[choice].end = end
        self.out.end(self._addressed(end))
        self._open -= 1
        if not self._open:
            self._ended(self)

    def _addressed(self, end: Done | Failed) -> Done | Failed:
        return msgspec.structs.replace(end, stream=self.stream, attempt=self.attempt)


def _any_given(column: list[Any]) -> bool:
    return column.count(None) < len(column)


def _count(have: list[int], index: int) -> int:
    return have[index] if index < len(have) else 0
