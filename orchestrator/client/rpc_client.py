"""The common part of the blocking and the asyncio client: starting requests, and moving frames between the protocol and the sockets.

Owns the sockets. It does not decide when to read: the blocking client polls, and the event loop calls the asyncio client.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from orchestrator.client import requests
from orchestrator.client.protocol import SILENCE_S, ClientExchange, ClientProtocol, What
from orchestrator.client.sockets import ClientKeys, ClientSockets
from workers.protocol.specs import RouterAddress

#: Longest time between two checks of deadlines and silent routers, seconds.
TICK_S = 0.05
#: Time-out of a query to a router, seconds.
QUERY_S = 10.0

CallT = TypeVar("CallT")


class RpcClient(ABC, Generic[CallT]):
    """A client of one or several routers. ``routers``: endpoints (``ipc://``), or addresses with the router's key (``tcp://``). ``model``:
    for requests that name none. ``silence_s``: a router that owes an answer and is silent for this time counts as lost."""

    def __init__(
        self,
        routers: Sequence[RouterAddress | str],
        *,
        model: str | None = None,
        keys: ClientKeys | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._model = model
        self._sockets = ClientSockets(routers, keys)
        self._protocol = ClientProtocol(secrets.token_hex(8), len(self._sockets), silence_s=silence_s)

    def chat(
        self,
        messages: requests.Messages,
        *,
        model: str | None = None,
        request: str | None = None,
        deadline_s: float | None = None,
        texts: bool = True,
        **options: Any,
    ) -> CallT:
        """Start a chat completion. ``options``: any other field of the HTTP body (``max_tokens``, ``temperature``, ``seed``, ``n``, ...).

        ``request``: an id of your own; repeating one attaches to the same answer. ``texts`` False = token ids only.
        """
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        return self._start(requests.chat(messages, options, model=model or self._model, request=request, deadline=deadline, texts=texts))

    def complete(
        self,
        prompt: requests.Prompt,
        *,
        model: str | None = None,
        request: str | None = None,
        deadline_s: float | None = None,
        texts: bool = True,
        **options: Any,
    ) -> CallT:
        """Start a completion of text or of token ids; otherwise as :meth:`chat`."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        return self._start(requests.complete(prompt, options, model=model or self._model, request=request, deadline=deadline, texts=texts))

    def close(self) -> None:
        """Cancel live requests and close the sockets."""
        for exchange in self._protocol.exchanges():
            self._protocol.cancel(exchange)
        self._flush()
        self._sockets.close()

    @abstractmethod
    def _call(self, exchange: ClientExchange) -> CallT:
        """The caller's handle of a request that was just started."""

    def _start(self, exchange: ClientExchange) -> CallT:
        self._protocol.ask(exchange, time.monotonic())
        self._flush()
        return self._call(exchange)

    def _query(self, what: What) -> ClientExchange:
        """Send a query to a router; the exchange ends within ``QUERY_S``."""
        now = time.monotonic()
        exchange = self._protocol.query(what, now, now + QUERY_S)
        self._flush()
        return exchange

    def _cancel(self, exchange: ClientExchange) -> None:
        self._protocol.cancel(exchange)
        self._flush()

    def _receive(self, now: float) -> None:
        """Pass every received frame to the protocol."""
        for router in range(len(self._sockets)):
            while (frame := self._sockets.receive(router)) is not None:
                self._protocol.received(router, frame, now)

    def _flush(self) -> None:
        """Renew the connections and send the frames of the protocol's outbox."""
        protocol = self._protocol
        while protocol.resets or protocol.outbox:
            for router in protocol.resets:
                self._reset(router)
            protocol.resets.clear()
            if protocol.outbox:
                router, frame = protocol.outbox.popleft()
                if not self._sockets.send(router, frame):
                    protocol.unreachable(router, time.monotonic())

    def _reset(self, router: int) -> None:
        self._sockets.reset(router)


ClientT = TypeVar("ClientT", bound=RpcClient[Any])


class LiveCall(Generic[ClientT]):
    """A live request of a client."""

    def __init__(self, client: ClientT, exchange: ClientExchange) -> None:
        self._client, self._exchange = client, exchange

    @property
    def request(self) -> str:
        """The request's id: unique, and the same at every router."""
        return self._exchange.request

    def cancel(self) -> None:
        """Stop the request; its stream and its result then raise :class:`~workers.protocol.errors.Cancelled`."""
        self._client._cancel(self._exchange)
