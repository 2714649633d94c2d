"""The common part of all engines with their own :class:`~workers.scheduler.scheduler.Scheduler`: the handling of requests.

Owns the scheduler. Must never run a plan: a subclass does this in ``step``.
"""

from __future__ import annotations

from workers.protocol.messages import Capacity, Submit
from workers.protocol.specs import ResumeClass
from workers.scheduler.scheduler import Scheduler


class ScheduledEngine:
    """Base of an :class:`~workers.protocol.engine.Engine`; ``step``, ``busy``, ``predicted_ms``, ``stats`` and ``close`` are defined by the
    subclass."""

    def __init__(self, scheduler: Scheduler, capacity: Capacity, resume: ResumeClass) -> None:
        self._scheduler = scheduler
        self._capacity = capacity
        self._resume = resume

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def resume(self) -> ResumeClass:
        return self._resume

    def submit(self, id: int, request: Submit) -> None:
        self._scheduler.submit(id, request)

    def cancel(self, id: int) -> None:
        self._scheduler.cancel(id)

    def credit(self, id: int, tokens: int) -> None:
        self._scheduler.credit(id, tokens)

    def on_idle(self) -> None:
        self._scheduler.on_idle()
