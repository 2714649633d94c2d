"""The Engine protocol: the interface between a leader's engine thread and every engine.

The interface works with requests and not with batches, because TensorRT-LLM batches by itself. Implemented by
``workers.engines.fake.FakeEngine``, ``workers.engines.portable.PortableEngine`` and ``workers.engines.trtllm``. All calls come from one
thread. Ids are the leader's own small integers, unique while the sequence lives.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from workers.protocol.messages import Capacity, FinishReason, Logprobs, Submit, Usage
from workers.protocol.specs import ResumeClass
from workers.protocol.status import EngineStats

#: Seconds without credit after which a sequence loses its K/V memory in the engine.
PAUSE_S = 2.0
#: Maximum age of a busy engine's statistics, seconds.
STATS_AGE_S = 0.05
#: Bound of :meth:`Engine.close`, seconds.
CLOSE_S = 5.0


class Finish(msgspec.Struct, frozen=True):
    """Why a sequence ended. ``stop_id`` is the stop token that ended it, if any (it is not among the emitted tokens)."""

    reason: FinishReason
    usage: Usage
    stop_id: int | None = None


class Fault(msgspec.Struct, frozen=True):
    """Why the engine could not continue a sequence; ``code`` as in :mod:`workers.protocol.errors`."""

    code: str
    message: str


class Emission(msgspec.Struct, frozen=True, gc=False):
    """The output of one step for one sequence: ``tokens`` at output positions ``first``.., then ``end`` if it has ended.

    ``logprobs`` has one entry per token if requested; ``prompt_logprobs`` covers the whole prompt, once, with or before the first token.
    ``cached_tokens``: prompt tokens found in the prefix cache, once, with the first token; 0 = none, or already reported.
    """

    id: int
    first: int
    tokens: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    end: Finish | Fault | None = None
    cached_tokens: int = 0


class Engine(Protocol):
    """The engine on rank 0, driven by the leader. Only ``step`` may block, and the token budget bounds a step."""

    @property
    def capacity(self) -> Capacity: ...

    @property
    def resume(self) -> ResumeClass: ...

    def submit(self, id: int, request: Submit) -> None:
        """Queue a request. Raises :class:`~workers.protocol.errors.Rejected` (TooLong, bad grammar, ...), and then keeps nothing of it."""

    def cancel(self, id: int) -> None:
        """Forget a sequence; nothing is emitted for it afterwards, and its blocks become free after the running step. Unknown ids are
        ignored."""

    def credit(self, id: int, tokens: int) -> None:
        """Allow ``tokens`` more to be emitted; a sequence without credit is paused, not ended. Unknown ids are ignored."""

    def step(self) -> list[Emission]:
        """Run one step and return what it emitted; [] also when only prefill ran. With nothing to do it returns [] at once."""

    def busy(self) -> bool:
        """Whether ``step`` would do work now: a sequence runs, waits, or has a step in flight. Paused ones count only if they are due to
        release their K/V memory."""

    def predicted_ms(self) -> float:
        """Expected milliseconds of the next ``step``, for the hang watchdog."""

    def on_idle(self) -> None:
        """Do work for which no token should wait; the leader calls it when no event has arrived for a while. Raises AssertionError if an
        invariant of the engine's state is broken."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """End the engine on every rank, within ``CLOSE_S``."""


@runtime_checkable
class Follower(Protocol):
    """A rank other than 0."""

    def run(self) -> None:
        """Apply the leader's plans until one has ``stop``."""
