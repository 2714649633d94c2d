"""The blocking client: a poll loop around :class:`~orchestrator.client.protocol.ClientProtocol`.

Owns its sockets. One thread at a time may use it; it starts none. While one call is waited for, all live calls move on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import msgspec
import zmq

from orchestrator.client import requests
from orchestrator.client.protocol import SILENCE_S, ClientExchange, ClientProtocol, What
from orchestrator.client.results import Piece, Reply
from orchestrator.client.sockets import ClientKeys, ClientSockets
from workers.protocol.specs import RouterAddress

#: Longest wait in one poll, seconds: deadlines and silent routers are looked at this often.
TICK_S = 0.05
#: Bound of a question about a router itself, seconds.
QUERY_S = 10.0


class Call:
    """A live request. Iterate :meth:`stream`, or wait for the whole with :meth:`result`; either may be called at any time."""

    def __init__(self, client: Client, exchange: ClientExchange) -> None:
        self._client, self._exchange = client, exchange

    @property
    def request(self) -> str:
        """The request's id: unique, and the same at every router that it went to."""
        return self._exchange.request

    def stream(self) -> Iterator[Piece]:
        """Pieces as they arrive, until the last choice ends. Raises the error that ended the request, its id in ``error.request``."""
        exchange = self._exchange
        while True:
            while exchange.pieces:
                yield exchange.pieces.popleft()
            if exchange.ended:
                break
            self._client._wait(lambda: bool(exchange.pieces) or exchange.ended)
        if exchange.error is not None:
            raise exchange.error

    def result(self) -> Reply:
        """The whole answer. Raises as :meth:`stream`."""
        self._client._wait(lambda: self._exchange.ended)
        return self._exchange.reply()

    def cancel(self) -> None:
        """Stop the request; :meth:`stream` and :meth:`result` then raise :class:`~workers.protocol.errors.Cancelled`."""
        self._client._cancel(self._exchange)


class Client:
    """``routers``: endpoints (``ipc://``), or addresses with the router's key (``tcp://``). ``model``: default for calls that name none."""

    def __init__(
        self,
        routers: Sequence[RouterAddress | str],
        *,
        model: str | None = None,
        keys: ClientKeys | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._model = model
        self._wires = ClientSockets(routers, keys)
        self._session = ClientProtocol(secrets.token_hex(8), len(self._wires), silence_s=silence_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is live and close the sockets."""
        for exchange in self._session.exchanges():
            self._session.cancel(exchange)
        self._flush()
        self._wires.close()

    def chat(
        self,
        messages: requests.Messages,
        *,
        model: str | None = None,
        request: str | None = None,
        deadline_s: float | None = None,
        texts: bool = True,
        **options: Any,
    ) -> Call:
        """Start a chat completion. ``options``: any other field of the HTTP body (``max_tokens``, ``temperature``, ``seed``, ``n``, ...).

        ``request``: an id of your own; repeating one attaches to the same answer. ``texts`` False = token ids only.
        """
        exchange = requests.chat(
            messages, options, model=model or self._model, request=request, deadline=_deadline(deadline_s), texts=texts
        )
        return self._start(exchange)

    def complete(
        self,
        prompt: requests.Prompt,
        *,
        model: str | None = None,
        request: str | None = None,
        deadline_s: float | None = None,
        texts: bool = True,
        **options: Any,
    ) -> Call:
        """Start a completion of text or of token ids; otherwise as :meth:`chat`."""
        exchange = requests.complete(
            prompt, options, model=model or self._model, request=request, deadline=_deadline(deadline_s), texts=texts
        )
        return self._start(exchange)

    def models(self) -> list[dict[str, Any]]:
        """What is served: ``id``, ``aliases``, ``status`` (ready replicas, context length, ...)."""
        return msgspec.json.decode(self._ask("models"), type=list[dict[str, Any]])

    def status(self) -> dict[str, Any]:
        """The router's own view: queue, running rows, replicas."""
        return msgspec.json.decode(self._ask("status"), type=dict[str, Any])

    def metrics(self) -> str:
        """Prometheus text."""
        return self._ask("metrics").decode()

    def _ask(self, what: What) -> bytes:
        now = time.monotonic()
        exchange = self._session.query(what, now, now + QUERY_S)
        self._wait(lambda: exchange.ended)
        return exchange.answer()

    def _start(self, exchange: ClientExchange) -> Call:
        self._session.ask(exchange, time.monotonic())
        self._flush()
        return Call(self, exchange)

    def _cancel(self, exchange: ClientExchange) -> None:
        self._session.cancel(exchange)
        self._flush()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Move everything on until ``done``. Bounded: each exchange ends by its answer, its deadline or its routers' silence."""
        self._flush()
        while not done():
            poller = zmq.Poller()
            for socket in self._wires.sockets:
                poller.register(socket, zmq.POLLIN)
            poller.poll(int(TICK_S * 1000))
            now = time.monotonic()
            for router in range(len(self._wires)):
                while (frame := self._wires.receive(router)) is not None:
                    self._session.received(router, frame, now)
            self._session.tick(now)
            self._flush()

    def _flush(self) -> None:
        session = self._session
        while session.resets or session.outbox:
            for router in session.resets:
                self._wires.reset(router)
            session.resets.clear()
            if session.outbox:
                router, frame = session.outbox.popleft()
                if not self._wires.send(router, frame):
                    session.unreachable(router, time.monotonic())


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
