"""The last replica of each session, so that the session's next request finds its prefix in that replica's cache.

Owns the table of sessions, bounded by :data:`MAX_SESSIONS`; the least recently used are dropped first. A session is a digest, so that
neither the table nor a dump of it contains data of a client.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b

from orchestrator.router.core.request import RouterRequest

#: Maximum number of sessions in the table.
MAX_SESSIONS = 4096


def session_key(request: RouterRequest) -> str:
    """A digest of model, tenant and session hint; empty for a request without a hint."""
    if not request.affinity:
        return ""
    parts = "\0".join((request.model, request.salt, request.affinity))
    return blake2b(parts.encode(errors="surrogatepass"), digest_size=12).hexdigest()


class SessionTable:
    """Last replica by session. ``known``: sessions with their replicas, least recently used first."""

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._replicas: OrderedDict[str, str] = OrderedDict(known or {})

    def replica_of(self, session: str) -> str:
        """The name of the session's last replica; empty where none is known."""
        return self._replicas.get(session, "")

    def note_sent(self, session: str, replica: str) -> None:
        """A choice of the session was sent to ``replica``."""
        if not session:
            return
        self._replicas[session] = replica
        self._replicas.move_to_end(session)
        if len(self._replicas) > MAX_SESSIONS:
            self._replicas.popitem(last=False)

    def snapshot(self) -> dict[str, str]:
        return dict(self._replicas)
