"""What a runner gives back for a plan: a StepResult, now or when the device gets there.

Owns the two kinds of answer. Taking one waits, bounded; asking whether it is there does not.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from workers.distributed.group import Waiter
from workers.runner.host_device_rings import Completion
from workers.scheduler.step_plan import F32, Ints, StepPlan, StepResult


class PendingResult(Protocol):
    """One plan's result."""

    def ready(self) -> bool:
        """Whether :meth:`result` returns at once."""

    def result(self) -> StepResult:
        """Raises :class:`~workers.protocol.errors.EngineFault` when the device does not get there within the bound of a step."""


class PlanRunner(Protocol):
    """One rank's part of every step: applies plans in order."""

    def issue(self, plan: StepPlan) -> PendingResult | None:
        """Start ``plan``; a rank of the last stage answers."""

    def close(self) -> None:
        """Finish what was started and give up graphs; the groups must still live."""


class ReadyResult:
    """An answer that is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


class SamplingExtras:
    """What rows with more than a temperature got: ``places`` [n] among the sampled rows, their ``tokens`` [n]; ``logprobs`` [n] of these,
    None where nobody asked; ``top`` and ``prompt`` as in a StepResult."""

    __slots__ = ("logprobs", "places", "prompt", "tokens", "top")

    def __init__(
        self,
        places: np.ndarray,
        tokens: Ints,
        logprobs: np.ndarray | None,
        top: list[tuple[int, bytes, bytes]],
        prompt: list[tuple[int, bytes, bytes, bytes]],
    ) -> None:
        self.places, self.tokens, self.logprobs, self.top, self.prompt = places, tokens, logprobs, top, prompt


class DeviceResult:
    """An answer on its way."""

    def __init__(self, step: int, completion: Completion, waiter: Waiter, extras: SamplingExtras | None) -> None:
        self._step, self._completion, self._waiter, self._extras = step, completion, waiter, extras

    def ready(self) -> bool:
        return self._completion.ready()

    def result(self) -> StepResult:
        self._waiter.until(self._completion.ready)
        extras = self._extras
        if extras is None:
            return StepResult(step=self._step, tokens=self._completion.tokens.tobytes())
        tokens = self._completion.tokens.copy()
        tokens[extras.places] = extras.tokens
        logprobs = b""
        if extras.logprobs is not None:
            own = np.zeros(len(tokens), F32)
            own[extras.places] = extras.logprobs
            logprobs = own.tobytes()
        return StepResult(step=self._step, tokens=tokens.tobytes(), logprobs=logprobs, top=extras.top, prompt=extras.prompt)
