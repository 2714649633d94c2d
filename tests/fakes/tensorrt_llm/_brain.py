"""What the fake computes: one token an iteration for each request of a batch, from the oracle of ``workers.engines.fake``, and a cache of
blocks.

Owns requests, blocks, cache events and statistics; knows neither Executor nor LLM. A token is a function of the known prefix (and of the
seed when it is sampled), so a continuation can be checked to the token.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm import _modes
from workers.engines.fake import advance, pick, score, state_of
from workers.protocol.messages import SamplingParams
from workers.scheduler.block_pool import prefix_hashes

#: Our hashes and "theirs" must not be the same numbers.
_THEIRS = 0x5EED


@dataclass
class Item:
    """A request. ``out`` is told (new tokens, their log-probabilities, final, error)."""

    tokens: list[int]
    max_new: int
    out: Callable[[list[int], list[float], bool, str], None]
    greedy: bool = True
    seed: int = 0
    temperature: float = 1.0
    min_new: int = 0
    end_id: int | None = None
    stop_words: Sequence[int] = ()
    salt: str = ""
    made: int = 0
    state: int = 0
    hashes: list[int] = field(default_factory=list)


class Brain:
    """``iterate`` makes one step for at most ``max_batch`` requests; the rest wait."""

    def __init__(self, *, vocab_size: int, blocks: int, block_size: int, max_batch: int) -> None:
        self.changed = threading.Condition()
        self.items: dict[int, Item] = {}
        self.closing = False
        self.stats: deque[dict[str, Any]] = deque(maxlen=1000)
        self.events: deque[tuple[int, str, Any]] = deque(maxlen=16384)
        self.iterations = 0
        self._vocab_size, self._blocks, self._block_size, self._max_batch = vocab_size, blocks, block_size, max_batch
        self._ids = self._event_ids = self._completed = 0
        self._stored: OrderedDict[int, None] = OrderedDict()
        self._reused = self._missed = 0
        self._event("created", [blocks])

    def add(self, item: Item) -> int:
        with self.changed:
            self._ids += 1
            item.state = state_of(item.tokens)
            self._store(item, reuse=True)
            self.items[self._ids] = item
            self.changed.notify_all()
            return self._ids

    def drop(self, id: int) -> None:
        with self.changed:
            self.items.pop(id, None)

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()

    def wait_for_work(self) -> bool:
        """False = it is being closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.items or self.closing)
            return not self.closing

    def iterate(self) -> None:
        step_ms = _modes.number("step_ms", 1.0)
        time.sleep(step_ms / 1000)
        with self.changed:
            self.iterations += 1
            running = list(self.items.items())[: self._max_batch]
            for id, item in running:
                self._advance(id, item)
            self._record(len(running), step_ms)
            self.changed.notify_all()

    def _advance(self, id: int, item: Item) -> None:
        if _modes.MODES.get("error") == str(item.tokens[0]):
            del self.items[id]
            item.out([], [], True, "the fake was ordered to fail this request")
            return
        stops = (() if item.end_id is None else (item.end_id,)) + tuple(item.stop_words)
        params = SamplingParams(
            temperature=0.0 if item.greedy else item.temperature, seed=item.seed, min_tokens=item.min_new, stop_ids=stops, ignore_eos=True
        )
        token = pick(item.state, params, item.made, (), None, self._vocab_size)
        logprob = score(item.state, token, 0).logprob or 0.0
        item.made += 1
        ended = item.made > item.min_new and token == item.end_id
        final = ended or token in item.stop_words or item.made >= item.max_new
        if not ended:
            item.tokens.append(token)
            item.state = advance(item.state, token)
            self._store(item, reuse=False)
        if final:
            del self.items[id]
            self._completed += 1
        item.out([] if ended else [token], [] if ended else [logprob], final, "")

    def _store(self, item: Item, *, reuse: bool) -> None:
        """Keep the whole blocks of what is known, the oldest making room."""
        hashes = [value ^ _THEIRS for value in prefix_hashes(item.tokens, self._block_size, item.salt)]
        for i in range(len(item.hashes), len(hashes)):
            theirs = hashes[i]
            if theirs in self._stored:
                self._reused += reuse
            else:
                self._missed += 1
                tokens = item.tokens[i * self._block_size : (i + 1) * self._block_size]
                self._event("stored", (hashes[i - 1] if i else None, theirs, tokens))
            self._stored[theirs] = None
            self._stored.move_to_end(theirs)
        item.hashes = hashes
        while len(self._stored) > self._blocks:
            self._event("removed", [self._stored.popitem(last=False)[0]])

    def _event(self, kind: str, data: Any) -> None:
        self.events.append((self._event_ids, kind, data))
        self._event_ids += 1

    def _record(self, scheduled: int, step_ms: float) -> None:
        used = sum(-(-len(item.tokens) // self._block_size) for item in self.items.values())
        self.stats.append(
            {
                "iter": self.iterations,
                "iterLatencyMS": step_ms,
                "numActiveRequests": min(len(self.items), self._max_batch),
                "numQueuedRequests": max(0, len(self.items) - self._max_batch),
                "numCompletedRequests": self._completed,
                "kvCacheStats": {
                    "maxNumBlocks": self._blocks,
                    "freeNumBlocks": max(0, self._blocks - used),
                    "usedNumBlocks": used,
                    "tokensPerBlock": self._block_size,
                    "reusedBlocks": self._reused,
                    "missedBlocks": self._missed,
                },
                "inflightBatchingStats": {"numScheduledRequests": scheduled, "numPausedRequests": 0},
            }
        )

    def take(self, queue: deque[Any]) -> list[Any]:
        """Empty one of ``stats`` and ``events``."""
        with self.changed:
            found = list(queue)
            queue.clear()
            return found
