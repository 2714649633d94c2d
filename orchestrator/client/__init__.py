"""Client of a Trireme deployment over ZeroMQ: :class:`Client` (blocking) and :class:`AsyncClient`, the same protocol under both.

Needs pyzmq and msgspec only. An answer survives the death of a router: the client keeps the request's journal and continues at another
router.
"""

from orchestrator.client.async_client import AsyncCall, AsyncClient
from orchestrator.client.results import Choice, Piece, Reply
from orchestrator.client.sockets import ClientKeys
from orchestrator.client.sync_client import Call, Client

__all__ = ["AsyncCall", "AsyncClient", "Call", "Choice", "Client", "ClientKeys", "Piece", "Reply"]
