"""The asyncio client: the loop's readers around :class:`~orchestrator.client.protocol.ClientProtocol`.

Owns one timer, which runs while any request is live. Use it from one event loop; it starts no thread and no task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import msgspec

from orchestrator.client.protocol import SILENCE_S, ClientExchange, What
from orchestrator.client.results import Piece, Reply
from orchestrator.client.rpc_client import TICK_S, LiveCall, RpcClient
from orchestrator.client.sockets import ClientKeys
from workers.protocol.specs import RouterAddress


class AsyncCall(LiveCall["AsyncClient"]):
    """A live request, as :class:`orchestrator.client.sync_client.Call`."""

    async def stream(self) -> AsyncIterator[Piece]:
        """Pieces as they arrive. Leaving the loop early does not cancel the request: :meth:`cancel` does."""
        exchange = self._exchange
        while True:
            while exchange.pieces:
                yield exchange.pieces.popleft()
            if exchange.ended:
                break
            await self._client._changed(exchange)
        if exchange.error is not None:
            raise exchange.error

    async def result(self) -> Reply:
        """The whole answer. Raises the error that ended the request."""
        while not self._exchange.ended:
            await self._client._changed(self._exchange)
        return self._exchange.reply()


class AsyncClient(RpcClient[AsyncCall]):
    """The asyncio client of one or several routers; make it inside the loop that uses it."""

    def __init__(
        self,
        routers: Sequence[RouterAddress | str],
        *,
        model: str | None = None,
        keys: ClientKeys | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(routers, model=model, keys=keys, silence_s=silence_s)
        self._loop = asyncio.get_running_loop()
        self._events: dict[ClientExchange, asyncio.Event] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._drain_is_due = self._closed = False
        for router in range(len(self._sockets)):
            self._watch(router)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is live and close the sockets."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for socket in self._sockets.sockets:
            self._loop.remove_reader(socket.fileno())
        super().close()
        self._wake()

    async def models(self) -> list[dict[str, Any]]:
        """As :meth:`orchestrator.client.sync_client.Client.models`."""
        return msgspec.json.decode(await self._answer("models"), type=list[dict[str, Any]])

    async def status(self) -> dict[str, Any]:
        """As :meth:`orchestrator.client.sync_client.Client.status`."""
        return msgspec.json.decode(await self._answer("status"), type=dict[str, Any])

    async def metrics(self) -> str:
        """As :meth:`orchestrator.client.sync_client.Client.metrics`."""
        return (await self._answer("metrics")).decode()

    async def _answer(self, what: What) -> bytes:
        exchange = self._query(what)
        while not exchange.ended:
            await self._changed(exchange)
        return exchange.answer()

    def _call(self, exchange: ClientExchange) -> AsyncCall:
        return AsyncCall(self, exchange)

    def _cancel(self, exchange: ClientExchange) -> None:
        super()._cancel(exchange)
        self._wake()

    async def _changed(self, exchange: ClientExchange) -> None:
        """Wait until something arrived for ``exchange`` or it ended."""
        event = self._events.setdefault(exchange, asyncio.Event())
        await event.wait()

    def _wake(self) -> None:
        for exchange in [exchange for exchange in self._events if exchange.pieces or exchange.ended]:
            self._events.pop(exchange).set()

    def _watch(self, router: int) -> None:
        self._loop.add_reader(self._sockets.sockets[router].fileno(), self._drain)

    def _drain(self) -> None:
        """Read every frame that has arrived. A descriptor becomes readable only once for several frames, so none may be left."""
        self._drain_is_due = False
        if self._closed:
            return
        self._receive(time.monotonic())
        self._flush()
        self._wake()

    def _flush(self) -> None:
        if not self._closed:
            if self._protocol.outbox and not self._drain_is_due:
                # A send may consume the event that would have made a descriptor readable, so poll once more in the next turn.
                self._drain_is_due = True
                self._loop.call_soon(self._drain)
            if self._protocol.live and self._timer is None:
                self._timer = self._loop.call_later(TICK_S, self._tick)
        super()._flush()

    def _reset(self, router: int) -> None:
        if not self._closed:
            self._loop.remove_reader(self._sockets.sockets[router].fileno())
        super()._reset(router)
        if not self._closed:
            self._watch(router)

    def _tick(self) -> None:
        self._timer = None
        self._protocol.tick(time.monotonic())
        self._flush()
        self._wake()
