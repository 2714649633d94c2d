"""The client's side of the protocol, without sockets or clocks: bytes in, bytes out, time as an argument.

Owns the live requests of one client and each one's journal (prompt ids, seed, tokens received), which is what lets another router go on
where one stopped. Both clients are thin shells around it. Never blocks and never forgets a request before its end.

    asked --Accepted--> streaming --every choice ended--> ended
    asked, streaming --router silent, unreachable or closing--> sent to the next router, with the journal and attempt + 1
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from orchestrator.client.results import Choice, Piece, Reply
from workers.protocol import messages
from workers.protocol.errors import Cancelled, DeadlineExceeded, Overloaded, TriremeError, Unavailable, from_code
from workers.protocol.messages import (
    Accepted,
    ApiEndpoint,
    Cancel,
    Credit,
    Done,
    Failed,
    FinishReason,
    Generate,
    Journal,
    Logprobs,
    Query,
    Report,
    Tokens,
    Usage,
)
from workers.protocol.running_clock import RunningClock

What = Literal["status", "models", "metrics"]

#: The client leaves a router that has sent nothing about a request for this time, seconds.
SILENCE_S = 2.0
#: Credit window of each choice, tokens; half of it is granted again whenever half was received.
WINDOW = 256
#: Times that one request is sent again without a token in between, per router.
ROUNDS = 5


class _ReceivedChoice:
    """The received output of one choice."""

    __slots__ = ("finish", "logprobs", "stop_id", "text", "tokens", "usage")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.finish: FinishReason | None = None
        self.usage = Usage(prompt_tokens=0, output_tokens=0)
        self.stop_id: int | None = None


class ClientExchange:
    """A live request. ``pieces`` is filled by messages and emptied by the shell; ``error`` or a full set of choices ends it."""

    def __init__(self, request: str, endpoint: ApiEndpoint, body: bytes, choices: int, *, texts: bool, deadline: float | None) -> None:
        self.request, self.endpoint, self.body, self.texts, self.deadline = request, endpoint, body, texts, deadline
        self.pieces: deque[Piece] = deque()
        self.error: TriremeError | None = None
        self.accepted: Accepted | None = None
        self.prompt_logprobs: list[Logprobs] | None = None
        #: Answer to a query.
        self.report: bytes | None = None
        self.choices = [_ReceivedChoice() for _ in range(choices)]
        self.stream = self.attempt = 0
        self.router = 0
        #: Tokens of each choice at the last send of the request, and the number of tokens since then for which credit was renewed.
        self.bases = [0] * choices
        self.renewed = 0
        #: Times that it was sent since its last token.
        self.asked = 0
        #: Routers that had no room for it.
        self.refused = 0
        #: When its router last sent something about it, by the protocol's clock.
        self.last_message_at = 0.0

    @property
    def ended(self) -> bool:
        return self.error is not None or self.report is not None or all(choice.finish is not None for choice in self.choices)

    def journal(self) -> Journal | None:
        """The data with which another router continues; None before Accepted, when the request is simply sent again."""
        if self.accepted is None:
            return None
        return Journal(prompt_ids=self.accepted.prompt_ids, seed=self.accepted.seed, emitted=[choice.tokens for choice in self.choices])

    def answer(self) -> bytes:
        """A query's answer. Raises the error that ended it."""
        if self.report is None:
            raise self.error or Unavailable("no answer")
        return self.report

    def reply(self) -> Reply:
        """The whole answer. Raises the error that ended the request."""
        if self.error is not None:
            raise self.error
        return Reply(
            request=self.request,
            seed=self.accepted.seed if self.accepted is not None else 0,
            prompt_tokens=self.accepted.prompt_tokens if self.accepted is not None else 0,
            choices=[_whole(index, choice) for index, choice in enumerate(self.choices)],
            prompt_logprobs=self.prompt_logprobs,
            attempts=self.attempt,
        )


class ClientProtocol:
    """All exchanges of one client. ``routers``: how many there are. The shell renews the connections named in ``resets``, then sends
    ``outbox``: (router, frame)."""

    def __init__(self, boot: str, routers: int, *, silence_s: float = SILENCE_S) -> None:
        self._boot, self._routers, self._silence_s = boot, routers, silence_s
        self._live: dict[int, ClientExchange] = {}
        #: The clock for time-outs of routers; only differences of its times have a meaning.
        self._clock = RunningClock(0.0)
        self._next_stream = 0
        self._preferred = 0
        self.outbox: deque[tuple[int, bytes]] = deque()
        self.resets: dict[int, None] = {}

    @property
    def live(self) -> int:
        return len(self._live)

    # --- what the caller does

    def ask(self, exchange: ClientExchange, now: float) -> None:
        exchange.router = self._preferred
        self._send(exchange, now)

    def query(self, what: What, now: float, deadline: float) -> ClientExchange:
        """``report`` of the result is the answer."""
        exchange = ClientExchange("", "chat", what.encode(), 1, texts=False, deadline=deadline)
        exchange.router = self._preferred
        self._send(exchange, now)
        return exchange

    def cancel(self, exchange: ClientExchange) -> None:
        """End it at once as cancelled; does nothing if it has ended."""
        if self._live.pop(exchange.stream, None) is not None:
            self._post(exchange, Cancel(boot=self._boot, stream=exchange.stream))
            self._end(exchange, Cancelled("the request was cancelled"))

    def exchanges(self) -> list[ClientExchange]:
        """The live ones."""
        return list(self._live.values())

    # --- what routers say

    def received(self, router: int, frame: bytes, now: float) -> None:
        """Raises :class:`~workers.protocol.messages.Malformed` for a frame that is not a router's message."""
        message = messages.decode_to_client(frame)
        if isinstance(message, Tokens):
            self._tokens(router, message, now)
            return
        exchange = self._live.get(message.stream)
        if exchange is None or exchange.router != router:
            return
        exchange.last_message_at = self._clock.at(now)
        if isinstance(message, Report):
            exchange.report = message.body
        elif isinstance(message, Accepted):
            if exchange.accepted is None:
                exchange.accepted = message
        elif isinstance(message, Done):
            self._done(exchange, message, now)
        else:
            self._failed(exchange, message, now)
        if exchange.ended:
            self._live.pop(message.stream, None)

    def unreachable(self, router: int, now: float) -> None:
        """A frame could not be sent to this router."""
        for exchange in [exchange for exchange in self._live.values() if exchange.router == router]:
            self._leave(exchange, "it cannot be reached", now)

    def tick(self, now: float) -> None:
        """Act on the time that has passed, by deadlines, or by silence while this client ran."""
        self._clock.turn(now)
        for exchange in list(self._live.values()):
            if exchange.deadline is not None and now >= exchange.deadline:
                self._post(exchange, Cancel(boot=self._boot, stream=exchange.stream))
                self._end(exchange, DeadlineExceeded("the request's deadline passed"))
            elif self._clock.at(now) - exchange.last_message_at > self._silence_s:
                self._leave(exchange, f"silent for {self._silence_s:.1f} s", now)

    def _tokens(self, router: int, message: Tokens, now: float) -> None:
        """A router's keepalive has this type too: it names every stream that has not ended, without tokens."""
        for stream, prompt_logprobs in message.prompt_logprobs or ():
            exchange = self._live.get(stream)
            if exchange is not None and exchange.prompt_logprobs is None:
                exchange.prompt_logprobs = prompt_logprobs
        grants: dict[int, int] = {}
        for i, stream in enumerate(message.streams):
            exchange = self._live.get(stream)
            index = message.choices[i] if message.choices is not None else 0
            if exchange is None or exchange.router != router or message.attempts[i] != exchange.attempt or index >= len(exchange.choices):
                continue
            exchange.last_message_at = self._clock.at(now)
            choice, tokens, first = exchange.choices[index], message.tokens[i], message.firsts[i]
            # Routers send in order and a journal ends where a message ends, so other tokens belong to an abandoned stream.
            if not tokens or first != len(choice.tokens) or choice.finish is not None:
                continue
            text = message.texts[i] if message.texts is not None else ""
            logprobs = message.logprobs[i] if message.logprobs is not None else None
            choice.tokens += tokens
            choice.text.append(text)
            if logprobs is not None:
                choice.logprobs += logprobs
            exchange.asked = exchange.refused = 0
            exchange.pieces.append(Piece(choice=index, first=first, tokens=tokens, text=text, logprobs=logprobs))
            # Credit is granted to all choices equally, so the choice that is furthest decides.
            taken = len(choice.tokens) - exchange.bases[index]
            if taken - exchange.renewed >= WINDOW // 2:
                grants[stream] = grants.get(stream, 0) + taken - exchange.renewed
                exchange.renewed = taken
        if grants:
            self.outbox.append((router, messages.encode(Credit(boot=self._boot, streams=list(grants), tokens=list(grants.values())))))

    def _done(self, exchange: ClientExchange, done: Done, now: float) -> None:
        if done.attempt != exchange.attempt or done.choice >= len(exchange.choices):
            return
        choice = exchange.choices[done.choice]
        if choice.finish is None and done.usage.output_tokens > len(choice.tokens):
            self._leave(exchange, "it ended the answer before its last token", now)
        elif choice.finish is None:
            choice.finish, choice.usage, choice.stop_id = done.reason, done.usage, done.stop_id
            choice.text.append(done.text)
            exchange.pieces.append(
                Piece(choice=done.choice, first=len(choice.tokens), tokens=[], text=done.text, finish_reason=done.reason)
            )

    def _failed(self, exchange: ClientExchange, failed: Failed, now: float) -> None:
        if failed.attempt != exchange.attempt:
            return
        error = from_code(failed.code, failed.message, retry_after=failed.retry_after)
        error.param = failed.param
        if isinstance(error, Overloaded) and exchange.refused < self._routers - 1:
            exchange.refused += 1
            self._move(exchange, now)
        else:
            self._end(exchange, error)

    # --- which router

    def _leave(self, exchange: ClientExchange, why: str, now: float) -> None:
        """Its router does not answer. Frames queued for that router must never reach it, because it would run the request again."""
        self.resets[exchange.router] = None
        if exchange.asked >= ROUNDS * self._routers:
            self._end(exchange, Unavailable("no router answers", f"the last one: {why}", "is the deployment up?"))
        else:
            self._move(exchange, now)

    def _move(self, exchange: ClientExchange, now: float) -> None:
        """Send the request to the next router, which continues after the received tokens."""
        self._live.pop(exchange.stream, None)
        if self._preferred == exchange.router:
            self._preferred = (exchange.router + 1) % self._routers
        exchange.router = (exchange.router + 1) % self._routers
        exchange.attempt += 1
        self._send(exchange, now)

    def _send(self, exchange: ClientExchange, now: float) -> None:
        self._next_stream += 1
        exchange.stream, exchange.last_message_at = self._next_stream, self._clock.at(now)
        exchange.asked += 1
        exchange.bases, exchange.renewed = [len(choice.tokens) for choice in exchange.choices], 0
        self._live[exchange.stream] = exchange
        left = None if exchange.deadline is None else max(1, int((exchange.deadline - now) * 1000))
        if not exchange.request:
            what = msgspec.convert(exchange.body.decode(), What)
            self._post(exchange, Query(boot=self._boot, stream=exchange.stream, what=what))
            return
        self._post(
            exchange,
            Generate(
                boot=self._boot, stream=exchange.stream, request_id=exchange.request, endpoint=exchange.endpoint, body=exchange.body,
                attempt=exchange.attempt, journal=exchange.journal(), texts=exchange.texts, deadline_ms=left, credit=WINDOW,
            ),
        )  # fmt: skip

    def _post(self, exchange: ClientExchange, message: messages.FromClient) -> None:
        self.outbox.append((exchange.router, messages.encode(message)))

    def _end(self, exchange: ClientExchange, error: TriremeError) -> None:
        error.request = exchange.request
        exchange.error = error
        self._live.pop(exchange.stream, None)


def _whole(index: int, choice: _ReceivedChoice) -> Choice:
    assert choice.finish is not None
    return Choice(
        index=index, text="".join(choice.text), tokens=choice.tokens, finish_reason=choice.finish, usage=choice.usage,
        stop_id=choice.stop_id, logprobs=choice.logprobs or None,
    )  # fmt: skip
