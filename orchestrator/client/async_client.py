"""The asyncio client: the loop's readers around :class:`~orchestrator.client.protocol.ClientProtocol`.

Owns its sockets and one timer, which runs while anything is live. Use it from one loop; it starts no thread and no task.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import msgspec

from orchestrator.client import requests
from orchestrator.client.protocol import SILENCE_S, ClientExchange, ClientProtocol, What
from orchestrator.client.results import Piece, Reply
from orchestrator.client.sockets import ClientKeys, ClientSockets
from orchestrator.client.sync_client import QUERY_S, TICK_S
from workers.protocol.specs import RouterAddress


class AsyncCall:
    """A live request, as :class:`orchestrator.client.sync_client.Call`."""

    def __init__(self, client: AsyncClient, exchange: ClientExchange) -> None:
        self._client, self._exchange = client, exchange

    @property
    def request(self) -> str:
        return self._exchange.request

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
        while not self._exchange.ended:
            await self._client._changed(self._exchange)
        return self._exchange.reply()

    def cancel(self) -> None:
        self._client._cancel(self._exchange)


class AsyncClient:
    """As :class:`orchestrator.client.sync_client.Client`; make it inside the loop that uses it."""

    def __init__(
        self,
        routers: Sequence[RouterAddress | str],
        *,
        model: str | None = None,
        keys: ClientKeys | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._wires = ClientSockets(routers, keys)
        self._session = ClientProtocol(secrets.token_hex(8), len(self._wires), silence_s=silence_s)
        self._events: dict[ClientExchange, asyncio.Event] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed = self._closed = False
        for router in range(len(self._wires)):
            self._watch(router)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is live and close the sockets."""
        for exchange in self._session.exchanges():
            self._session.cancel(exchange)
        self._flush()
        self._wake()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for socket in self._wires.sockets:
            self._loop.remove_reader(socket.fileno())
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
    ) -> AsyncCall:
        """Start a chat completion; arguments as :meth:`orchestrator.client.sync_client.Client.chat`."""
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
    ) -> AsyncCall:
        """Start a completion of text or of token ids."""
        exchange = requests.complete(
            prompt, options, model=model or self._model, request=request, deadline=_deadline(deadline_s), texts=texts
        )
        return self._start(exchange)

    async def models(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(await self._ask("models"), type=list[dict[str, Any]])

    async def status(self) -> dict[str, Any]:
        return msgspec.json.decode(await self._ask("status"), type=dict[str, Any])

    async def metrics(self) -> str:
        return (await self._ask("metrics")).decode()

    async def _ask(self, what: What) -> bytes:
        now = time.monotonic()
        exchange = self._session.query(what, now, now + QUERY_S)
        self._flush()
        self._keep_time()
        while not exchange.ended:
            await self._changed(exchange)
        return exchange.answer()

    def _start(self, exchange: ClientExchange) -> AsyncCall:
        self._session.ask(exchange, time.monotonic())
        self._flush()
        self._keep_time()
        return AsyncCall(self, exchange)

    def _cancel(self, exchange: ClientExchange) -> None:
        self._session.cancel(exchange)
        self._flush()
        self._wake()

    async def _changed(self, exchange: ClientExchange) -> None:
        """Wait until something arrived for ``exchange`` or it ended."""
        event = self._events.setdefault(exchange, asyncio.Event())
        await event.wait()

    def _wake(self) -> None:
        for exchange in [exchange for exchange in self._events if exchange.pieces or exchange.ended]:
            self._events.pop(exchange).set()

    def _watch(self, router: int) -> None:
        self._loop.add_reader(self._wires.sockets[router].fileno(), self._drain)

    def _drain(self) -> None:
        """Read until nothing is left: the descriptors tell of changes only."""
        self._armed = False
        if self._closed:
            return
        now = time.monotonic()
        for router in range(len(self._wires)):
            while (frame := self._wires.receive(router)) is not None:
                self._session.received(router, frame, now)
        self._flush()
        self._wake()

    def _flush(self) -> None:
        session = self._session
        if session.outbox and not self._armed and not self._closed:
            # A send may process the event that would have made a descriptor readable: look once more in the next turn.
            self._armed = True
            self._loop.call_soon(self._drain)
        while session.resets or session.outbox:
            for router in session.resets:
                self._loop.remove_reader(self._wires.sockets[router].fileno())
                self._wires.reset(router)
                self._watch(router)
            session.resets.clear()
            if session.outbox:
                router, frame = session.outbox.popleft()
                if not self._wires.send(router, frame):
                    session.unreachable(router, time.monotonic())

    def _keep_time(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._session.tick(time.monotonic())
        self._flush()
        self._wake()
        if self._session.live:
            self._keep_time()


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
