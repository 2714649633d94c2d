"""What the fake is to do wrong, from one environment variable: ``TRIREME_FAKE_TRTLLM="oom=1,step_ms=5"``.

raise=RANK            constructing raises on that rank            oom=RANK      the same, with TensorRT-LLM's words for no memory
die=PHASE:RANK        SIGKILL itself in construct, load, or generate (after AFTER iterations)
wedge=PHASE:RANK      never come back from construct or from an iteration
after=N               iterations before generate modes act
version=TEXT          the package's version
without=executor|llm  the package lacks it
error=TOKEN           requests whose input begins with TOKEN get an error response
shutdown=hang         shutdown never returns
step_ms=N             length of an iteration
blocks=N              blocks of the cache
cumulative=1          log-probabilities of a stream repeat the earlier ones
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "TRIREME_FAKE_TRTLLM"
MODES: dict[str, str] = dict(part.partition("=")[::2] for part in os.environ.get(VARIABLE, "").split(",") if part)  # type: ignore[misc]


def number(name: str, default: float) -> float:
    return float(MODES.get(name, default))


def here(mode: str, phase: str, rank: int) -> bool:
    """Whether ``mode`` is set for this phase and rank."""
    return MODES.get(mode) == f"{phase}:{rank}"


def act(phase: str, rank: int) -> None:
    """Die or wedge where the modes say so."""
    if here("die", phase, rank):
        os.kill(os.getpid(), signal.SIGKILL)
    if here("wedge", phase, rank):
        threading.Event().wait()
