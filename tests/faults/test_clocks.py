"""F32: the wall clock of the host is set back by an hour, then gangs die: their successors serve at once, as usual."""

from __future__ import annotations

import os
import signal
import time

import httpx
import psutil
import pytest

from tests.faults.stage import staged
from tests.support.deployment import MODEL

pytestmark = pytest.mark.mpi


def test_successors_of_a_clock_that_was_set_back_serve() -> None:
    """Both replicas, one after the other, the first one twice: nothing that lives knows a larger epoch than the newest gang's."""
    with staged(module="tests.faults.set_back", fake_step_ms=5) as stage:
        host = next(process for process in psutil.Process().children() if "tests.faults.set_back" in process.cmdline())
        host.send_signal(signal.SIGUSR2)
        for name in ("left", "right", "left"):
            old = stage.row(name).epoch
            os.kill(stage.pid(name, 1), signal.SIGKILL)
            stage._until(lambda name=name, old=old: stage.seen(name)["epoch"] > old, f"the successor of {name}", 30.0)
            stage.ready()
            assert old < stage.row(name).epoch < old + 2**10, "it follows the last one, not the clock"
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
        begun = time.monotonic()
        assert httpx.post(f"{stage.status.url}/v1/completions", json=body, timeout=30, trust_env=False).status_code == 200
        assert time.monotonic() - begun < 20
