"""Results of a runner for a plan: a StepResult, at once or when the device has finished the step.

Owns the kinds of pending results. :meth:`PendingResult.result` waits, with a bound; :meth:`PendingResult.ready` never waits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from workers.distributed.group import Waiter
from workers.runner.host_device_rings import Completion
from workers.scheduler.step_plan import F32, Ints, StepPlan, StepResult


class PendingResult(Protocol):
    """The result of one plan."""

    def ready(self) -> bool:
        """Whether :meth:`result` returns at once."""

    def result(self) -> StepResult:
        """Wait for the result. Raises :class:`~workers.protocol.errors.EngineFault` when the step exceeds its bound."""


class PlanRunner(Protocol):
    """One rank's part of every step: applies plans in order."""

    def issue(self, plan: StepPlan) -> PendingResult | None:
        """Start ``plan``. Returns its result on the ranks of the last stage that report one, else None."""

    def close(self) -> None:
        """Finish started steps and drop captured graphs; the rank's groups must still exist."""


class ReadyResult:
    """A result that is already available."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


class SamplingExtras:
    """The torch sampler's part of a result: ``tokens`` [n] and ``logprobs`` [n] (None = not requested) of the sampled sequences at
    ``indices`` [n]; ``top`` and ``prompt_logprobs`` as in a StepResult."""

    __slots__ = ("indices", "logprobs", "prompt_logprobs", "tokens", "top")

    def __init__(
        self,
        indices: np.ndarray,
        tokens: Ints,
        logprobs: np.ndarray | None,
        top: list[tuple[int, bytes, bytes]],
        prompt_logprobs: list[tuple[int, bytes, bytes, bytes]],
    ) -> None:
        self.indices, self.tokens, self.logprobs = indices, tokens, logprobs
        self.top, self.prompt_logprobs = top, prompt_logprobs


class DeviceResult:
    """A result that the device still computes."""

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
        tokens[extras.indices] = extras.tokens
        logprobs = b""
        if extras.logprobs is not None:
            all_logprobs = np.zeros(len(tokens), F32)
            all_logprobs[extras.indices] = extras.logprobs
            logprobs = all_logprobs.tobytes()
        return StepResult(
            step=self._step, tokens=tokens.tobytes(), logprobs=logprobs, top=extras.top, prompt_logprobs=extras.prompt_logprobs
        )
