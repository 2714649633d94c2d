"""One RPC request inside the router: what its client has been sent, so that it can be sent again.

Owns the record of one :class:`~workers.protocol.messages.Generate` from receipt to its last terminal message, and the parallel lists of
what the next message to each client holds. Never touches a socket: :mod:`orchestrator.router.rpc.server` flushes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from orchestrator.router.interfaces import Ticket
from orchestrator.router.metrics import RequestMeter
from workers.protocol.errors import TriremeError, printable
from workers.protocol.messages import Accepted, Done, Failed, FinishReason, Logprobs, Tokens, Usage

#: (client key, the client's own request id): the lasting name of a request.
Name: TypeAlias = tuple[str, str]


class Outgoing:
    """What one client gets next: tokens of all its streams in one message, then the terminal messages behind them. ``wake`` is told when
    there is something again."""

    __slots__ = ("_others", "_prompts", "_rows", "_scored", "_spoken", "_waits", "_wake", "peer")

    def __init__(self, peer: bytes, wake: Callable[[Outgoing], None]) -> None:
        self.peer, self._wake, self._waits = peer, wake, False
        self._others: list[Done | Failed] = []
        self._clear()

    def _clear(self) -> None:
        #: (stream, attempt, first, tokens, choice, text, logprobs): one tuple a row now, columns at the end.
        self._rows: list[tuple[int, int, int, list[int], int, str, list[Logprobs] | None]] = []
        self._prompts: list[tuple[int, list[Logprobs]]] = []
        self._scored = self._spoken = False

    def add(
        self, stream: int, attempt: int, choice: int, first: int, tokens: list[int], text: str | None, logprobs: list[Logprobs] | None
    ) -> None:
        if not self._waits:
            self._rise()
        self._rows.append((stream, attempt, first, tokens, choice, text or "", logprobs))
        if text is not None:
            self._spoken = True
        if logprobs is not None:
            self._scored = True

    def add_prompt(self, stream: int, logprobs: list[Logprobs]) -> None:
        self._rise()
        self._prompts.append((stream, logprobs))

    def end(self, message: Done | Failed) -> None:
        self._rise()
        self._others.append(message)

    def _rise(self) -> None:
        if not self._waits:
            self._waits = True
            self._wake(self)

    def take(self, boot: str) -> list[Tokens | Done | Failed]:
        """The messages, in order; afterwards it is empty."""
        self._waits = False
        messages: list[Tokens | Done | Failed] = []
        if self._rows or self._prompts:
            columns = [list(column) for column in zip(*self._rows, strict=True)] or [[] for _ in range(7)]
            streams, attempts, firsts, tokens, choices, texts, logprobs = columns
            messages.append(
                Tokens(
                    boot=boot,
                    streams=streams,
                    attempts=attempts,
                    firsts=firsts,
                    tokens=tokens,
                    logprobs=logprobs if self._scored else None,
                    prompt_logprobs=self._prompts or None,
                    texts=texts if self._spoken else None,
                    choices=choices if any(choices) else None,
                )
            )
            self._clear()
        messages += self._others
        self._others = []
        return messages


class _CallChoice:
    """All that one choice has produced. ``tokens``: what its client held at the start (``base`` of them) and all since. ``starts`` and
    ``texts``: how many tokens were there before each delivery, and its text."""

    __slots__ = ("base", "end", "logprobs", "starts", "texts", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.base = tokens, len(tokens)
        self.logprobs: list[Logprobs] = []
        self.starts: list[int] = []
        self.texts: list[str] = []
        self.end: Done | Failed | None = None


class RpcCall:
    """A client's request, and what its watcher tells (a TextSink). ``stream`` and ``attempt`` are those of the client's last Generate,
    ``out`` leads to where it came from. ``spoken``: the client wants text. ``ids``: nobody reads text, so it is the watcher itself, an
    object less on the way of every token; its choices' records are then the dispatcher's."""

    __slots__ = (
        "_boot", "_ended", "_open", "accepted", "attempt", "cancelled", "choices", "client_boot", "granted", "ids", "lost_at", "meter",
        "name", "out", "prompt", "spoken", "stream", "ticket",
    )  # fmt: skip

    def __init__(self, name: Name, boot: str, spoken: bool, out: Outgoing, ended: Callable[[RpcCall], None]) -> None:
        self.name, self._boot, self.spoken, self.out, self._ended = name, boot, spoken, out, ended
        self.client_boot, self.stream, self.attempt = "", 0, 0
        self.accepted: Accepted | None = None
        self.ticket: Ticket | None = None
        self.meter: RequestMeter | None = None
        self.ids = False
        self.choices: list[_CallChoice] = []
        self.prompt: list[Logprobs] | None = None
        self._open = 0
        #: Tokens granted to each choice, beyond those that its client held at the start.
        self.granted = 0
        #: Cancelled before it was submitted.
        self.cancelled = False
        #: When its client was first found gone; None = it is there.
        self.lost_at: float | None = None

    def open(self, records: list[list[int]]) -> None:
        """Its choices begin; ``records``: a list for each that holds the tokens that the client has already."""
        self.choices = [_CallChoice(record) for record in records]
        self._open = len(records)

    @property
    def repeatable(self) -> bool:
        """Whether it ended well: a failure may pass, so a repeat of one is a new request."""
        return all(isinstance(choice.end, Done) for choice in self.choices)

    @property
    def size(self) -> int:
        """Tokens kept."""
        return sum(len(choice.tokens) for choice in self.choices)

    def _held(self, have: list[int], index: int) -> int:
        return have[index] if index < len(have) else 0

    def continues(self, have: list[int]) -> bool:
        """Whether :meth:`replay` would leave no gap for a client that holds ``have`` tokens of each choice."""
        if not self.choices:
            return not any(have)
        for index, choice in enumerate(self.choices):
            held = self._held(have, index)
            if not choice.base <= held <= len(choice.tokens) or (self.spoken and held < len(choice.tokens) and held not in choice.starts):
                return False
        return True

    def lacking(self, have: list[int], credit: int) -> int:
        """Tokens to grant, so that a client that holds ``have`` tokens may get ``credit`` more: what it granted before may be lost."""
        taken = max((self._held(have, index) - choice.base for index, choice in enumerate(self.choices)), default=0)
        return max(0, taken + credit - self.granted)

    def attach(self, out: Outgoing, boot: str, stream: int, attempt: int) -> None:
        """From now on this connection and stream get what happens."""
        self.out, self.client_boot, self.stream, self.attempt, self.lost_at = out, boot, stream, attempt, None

    def replay(self, have: list[int]) -> None:
        """Send again what a client that holds ``have`` tokens of each choice does not; only where that :meth:`continues`."""
        if self.prompt is not None:
            self.out.add_prompt(self.stream, self.prompt)
        for index, choice in enumerate(self.choices):
            held = self._held(have, index)
            if held < len(choice.tokens):
                text = "".join(text for start, text in zip(choice.starts, choice.texts, strict=True) if start >= held)
                scores = choice.logprobs[held - choice.base :] if choice.logprobs else None
                self._add(index, held, choice.tokens[held:], text if self.spoken else None, scores)
            if choice.end is not None:
                self.out.end(self._addressed(choice.end))

    # --- Watcher

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        if logprobs is not None:
            self.choices[choice].logprobs += logprobs
        self.out.add(self.stream, self.attempt, choice, first, tokens, None, logprobs)

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        assert self.meter is not None
        self.meter.ended(reason, usage)
        self.on_end(choice, reason, usage, stop_id, "")

    # --- TextSink

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        record = self.choices[choice]
        record.starts.append(len(record.tokens))
        record.texts.append(text)
        record.tokens += tokens
        if logprobs is not None:
            record.logprobs += logprobs
        self._add(choice, first, tokens, text if self.spoken else None, logprobs)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        if self.prompt is None:
            self.prompt = logprobs
            self.out.add_prompt(self.stream, logprobs)

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        stop_id = stopped_by if isinstance(stopped_by, int) else None
        text = tail if self.spoken else ""
        self._finish(
            choice,
            Done(boot=self._boot, stream=0, attempt=0, reason=reason, usage=usage, stop_id=stop_id, choice=choice, text=text),
        )

    def on_failed(self, choice: int, error: TriremeError) -> None:
        if self.ids and self.meter is not None:
            self.meter.failed(error.code)
        failed = Failed(
            boot=self._boot,
            stream=0,
            attempt=0,
            code=error.code,
            message=printable(str(error)),
            retry_after=error.retry_after,
            param=error.param,
            choice=choice,
        )
        self._finish(choice, failed)

    def _add(self, choice: int, first: int, tokens: list[int], text: str | None, logprobs: list[Logprobs] | None) -> None:
        self.out.add(self.stream, self.attempt, choice, first, tokens, text, logprobs)

    def _finish(self, choice: int, end: Done | Failed) -> None:
        self.choices[choice].end = end
        self.out.end(self._addressed(end))
        self._open -= 1
        if not self._open:
            self._ended(self)

    def _addressed(self, end: Done | Failed) -> Done | Failed:
        return msgspec.structs.replace(end, stream=self.stream, attempt=self.attempt)
