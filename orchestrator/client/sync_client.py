"""The blocking client: a poll loop around :class:`~orchestrator.client.protocol.ClientProtocol`.

One thread at a time may use it; it starts none. While the caller waits for one call, all live calls make progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import msgspec
import zmq

from orchestrator.client.protocol import ClientExchange, What
from orchestrator.client.results import Piece, Reply
from orchestrator.client.rpc_client import TICK_S, LiveCall, RpcClient


class Call(LiveCall["Client"]):
    """A live request. Iterate :meth:`stream`, or wait for the whole with :meth:`result`; either may be called at any time."""

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


class Client(RpcClient[Call]):
    """The blocking client of one or several routers."""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def models(self) -> list[dict[str, Any]]:
        """The served models: ``id``, ``aliases``, ``status`` (ready replicas, context length, ...)."""
        return msgspec.json.decode(self._answer("models"), type=list[dict[str, Any]])

    def status(self) -> dict[str, Any]:
        """The router's own view: queue, running choices, replicas."""
        return msgspec.json.decode(self._answer("status"), type=dict[str, Any])

    def metrics(self) -> str:
        """Prometheus text."""
        return self._answer("metrics").decode()

    def _answer(self, what: What) -> bytes:
        exchange = self._query(what)
        self._wait(lambda: exchange.ended)
        return exchange.answer()

    def _call(self, exchange: ClientExchange) -> Call:
        return Call(self, exchange)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Process all exchanges until ``done``. Bounded: each exchange ends by its answer, its deadline or its routers' silence."""
        self._flush()
        while not done():
            poller = zmq.Poller()
            for socket in self._sockets.sockets:
                poller.register(socket, zmq.POLLIN)
            poller.poll(int(TICK_S * 1000))
            now = time.monotonic()
            self._receive(now)
            self._protocol.tick(now)
            self._flush()
