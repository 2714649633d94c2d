"""Which replica a row goes to: the one where it is expected to wait least, cached prefixes counted.

Owns what the choice is learnt from: per model the measured service, per session the last replica (bounded), per request its prefix hashes.
Never changes a row's or a replica's place; :mod:`orchestrator.core.places` does that and reports it here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import inf

from orchestrator.core.fleet import Replica
from orchestrator.core.prefixes import expected_wait_ms
from orchestrator.core.request import Request, Row
from orchestrator.core.service import ServiceRate
from workers.core.blocks import prefix_hashes

#: Sessions whose last replica is remembered.
MAX_SESSIONS = 4096


class Chooser:
    """One router's memory of where things ran."""

    def __init__(self, models: Iterable[str]) -> None:
        self._rates = {name: ServiceRate() for name in models}
        self._sessions: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    def choose(self, row: Row, replicas: list[Replica]) -> Replica | None:
        """The replica with a free place where ``row`` waits least. Within a step a session's last replica wins, then the longest unused."""
        open_to = [replica for replica in replicas if replica.free_rows]
        if len(open_to) <= 1:
            return open_to[0] if open_to else None
        request = row.request
        last = self._sessions.get(_session(request)) if request.ask.affinity else None
        output_tokens = self._rates[request.model].output_tokens
        best, best_key = None, (inf, 0)
        # One that has run nothing yet is as fast as the others: taken for faster, it would get a whole burst.
        measured = [replica.step_ms for replica in open_to if replica.step_ms]
        typical = sum(measured) / len(measured) if measured else 1.0
        for replica in open_to:
            step_ms = max(0.1, replica.step_ms or typical)
            wait = expected_wait_ms(
                step_ms=step_ms,
                rows=replica.rows,
                max_rows=replica.capacity.max_batch_size,
                step_tokens=replica.capacity.max_num_tokens,
                queued_tokens=replica.queued_tokens,
                own_tokens=row.known,
                cached_tokens=_cached(row, replica),
                row_ms=replica.row_ms,
                output_tokens=output_tokens,
            )
            key = (wait - step_ms * (replica.name == last), replica.chosen)
            if key < best_key:
                best, best_key = replica, key
        return best

    def placed(self, row: Row, replica: Replica, *, alone: bool) -> int:
        """Note a placement; returns the prompt tokens that it probably has to compute. ``alone``: there is no other replica to choose, so
        nothing need be remembered."""
        if alone:
            return row.known
        tokens = max(1, row.known - _cached(row, replica))
        if replica.prefixes.limit:
            replica.prefixes.add(_chain(row.request, replica.capacity.block_size))
        if row.request.ask.affinity:
            key = _session(row.request)
            self._sessions[key] = replica.name
            self._sessions.move_to_end(key)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return tokens

    def finished(self, row: Row, replica: Replica, now: float, *, alone: bool) -> None:
        """Note an end. The answer is in the cache now too, and a chat's next turn starts with it."""
        self._rates[row.request.model].ended(len(row.emitted), now)
        replica.row_ms += ((now - row.sent_at) * 1000.0 - replica.row_ms) / 16
        if replica.prefixes.limit and not alone:
            ask = row.request.ask
            replica.prefixes.add(prefix_hashes(ask.prompt_ids + row.emitted, replica.capacity.block_size, ask.salt))

    def retry_after(self, model: str, waiting: int, now: float) -> float:
        """Seconds after which a place in the queue is likely."""
        return self._rates[model].retry_after(waiting, now)


def _session(request: Request) -> tuple[str, str, str]:
    return (request.model, request.ask.salt, request.ask.affinity)


def _cached(row: Row, replica: Replica) -> int:
    if not replica.prefixes.limit:
        return 0
    size = replica.capacity.block_size
    return replica.prefixes.matched(_chain(row.request, size)) * size


def _chain(request: Request, block_size: int) -> list[int]:
    chain = request.chains.get(block_size)
    if chain is None:
        chain = request.chains[block_size] = prefix_hashes(request.ask.prompt_ids, block_size, request.ask.salt)
    return chain
