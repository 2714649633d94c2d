"""Which replica a row goes to: the one where it is expected to wait least, cached prefixes counted.

Owns what the choice is learnt from: per model the measured service, per session the last replica (bounded), per request its prefix hashes.
Never changes a row's or a replica's place; :mod:`orchestrator.router.core.transitions` does that and reports it here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import inf

from orchestrator.router.core.prefix_index import expected_wait_ms, first_token_ms
from orchestrator.router.core.replica_registry import Kind, Replica
from orchestrator.router.core.request_state import ChoiceState, RequestState
from orchestrator.router.core.service_rate import ServiceRate
from orchestrator.router.core.stats import Attempt, Reason
from workers.scheduler.block_pool import prefix_hashes

#: Sessions whose last replica is remembered.
MAX_SESSIONS = 4096


class LeastWaitPolicy:
    """One router's memory of where things ran."""

    def __init__(self, models: Iterable[str]) -> None:
        self._rates = {name: ServiceRate() for name in models}
        self._sessions: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    def choose(self, row: ChoiceState, replicas: list[Replica]) -> tuple[Replica, Reason] | None:
        """The replica with a free place where ``row`` waits least, and why it is that one. Within a step a session's last replica wins,
        then the longest unused."""
        open_to = [replica for replica in replicas if replica.free_rows]
        if len(open_to) <= 1:
            return (open_to[0], "only") if open_to else None
        request = row.request
        last = self._sessions.get(_session(request)) if request.ask.affinity else None
        output_tokens = self._rates[request.model].output_tokens
        best, best_key, best_cached = open_to[0], (inf, 0), 0
        paces = _paces(open_to)
        for replica in open_to:
            step_ms, cached = paces[replica.kind], _cached(row, replica)
            wait = expected_wait_ms(
                step_ms=step_ms,
                rows=replica.rows,
                max_rows=replica.capacity.max_batch_size,
                step_tokens=replica.capacity.max_num_tokens,
                queued_tokens=replica.queued_tokens,
                own_tokens=row.known,
                cached_tokens=cached,
                row_ms=replica.row_ms,
                output_tokens=output_tokens,
            )
            key = (wait - step_ms * (replica.name == last), replica.chosen)
            if key < best_key:
                best, best_key, best_cached = replica, key, cached
        return best, "session" if best.name == last else "prefix" if best_cached else "load"

    def placed(self, row: ChoiceState, replica: Replica, reason: Reason, *, alone: bool) -> Attempt:
        """Note a placement, with what is expected of it. ``alone``: there is no other replica to choose, so nothing need be remembered."""
        if alone:
            return _placement(row, replica, reason, None)
        placement = _placement(row, replica, reason, _cached(row, replica))
        if replica.prefixes.limit:
            replica.prefixes.add(_chain(row.request, replica.capacity.block_size))
        if row.request.ask.affinity:
            key = _session(row.request)
            self._sessions[key] = replica.name
            self._sessions.move_to_end(key)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return placement

    def finished(self, row: ChoiceState, replica: Replica, now: float, *, alone: bool) -> None:
        """Note an end. The answer is in the cache now too, and a chat's next turn starts with it."""
        self._rates[row.request.model].ended(len(row.emitted), now)
        replica.row_ms += ((now - row.sent_at) * 1000.0 - replica.row_ms) / 16
        if replica.prefixes.limit and not alone:
            ask = row.request.ask
            replica.prefixes.add(prefix_hashes(ask.prompt_ids + row.emitted, replica.capacity.block_size, ask.salt))

    def retry_after(self, model: str, waiting: int, now: float) -> float:
        """Seconds after which a place in the queue is likely."""
        return self._rates[model].retry_after(waiting, now)


def _paces(replicas: list[Replica]) -> dict[Kind, float]:
    """Usual length of a step of each kind of replica, ms. One for all of a kind: between equals, the length of a step of late tells what
    was in it, a prompt or one token, and who was taken for the faster would get a whole burst. One that is slow keeps its rows for longer,
    and so gets fewer. A kind that has run nothing yet is as fast as the others."""
    steps: dict[Kind, list[float]] = {}
    for replica in replicas:
        heard = steps.setdefault(replica.kind, [])
        if replica.step_ms:
            heard.append(replica.step_ms)
    paces = {kind: sum(heard) / len(heard) for kind, heard in steps.items() if heard}
    typical = sum(paces.values()) / len(paces) if paces else 1.0
    return {kind: max(0.1, paces.get(kind, typical)) for kind in steps}


def _placement(row: ChoiceState, replica: Replica, reason: Reason, cached: int | None) -> Attempt:
    tokens = max(1, row.known - (cached or 0))
    wait_ms = first_token_ms(
        step_ms=replica.step_ms, rows=replica.rows, max_rows=replica.capacity.max_batch_size, step_tokens=replica.capacity.max_num_tokens,
        queued_tokens=replica.queued_tokens, new_tokens=tokens, row_ms=replica.row_ms,
    )  # fmt: skip
    # The choice compares shares of steps; a clock sees whole ones: what is left of the running step, then at least one with the row in it.
    wait_ms = max(wait_ms, replica.step_ms) + (replica.step_ms / 2 if replica.rows else 0.0)
    return Attempt(replica.name, replica.epoch, reason, tokens=tokens, cached=cached, expected_s=wait_ms / 1000.0)


def _session(request: RequestState) -> tuple[str, str, str]:
    return (request.model, request.ask.salt, request.ask.affinity)


def _cached(row: ChoiceState, replica: Replica) -> int:
    if not replica.prefixes.limit:
        return 0
    size = replica.capacity.block_size
    return replica.prefixes.matched(_chain(row.request, size)) * size


def _chain(request: RequestState, block_size: int) -> list[int]:
    chain = request.chains.get(block_size)
    if chain is None:
        chain = request.chains[block_size] = prefix_hashes(request.ask.prompt_ids, block_size, request.ask.salt)
    return chain
