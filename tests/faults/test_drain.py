"""F27: SIGTERM to everything at once, in the middle of answers: they are finished, the host exits 0 and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from orchestrator.control.launch.subprocesses import alive
from tests.faults.streams import Case, run_all
from tests.support.deployment import deployed, write_config
from tests.support.figures import figure
from tests.support.gang import short_folder, wait_for
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

pytestmark = pytest.mark.mpi
OUTPUT = 60


@pytest.mark.parametrize("tree", [False, True], ids=["the host alone", "each of its processes"])
def test_a_deployment_that_is_told_to_end_finishes_what_runs(tree: bool) -> None:
    """The second is how a stopped Ray job is told: the host, its routers and theirs, all at once."""
    told = "to each process" if tree else "to the host"
    cases = [
        Case(prompt=f"stream {index}", body={"max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True}, door=("http", "rpc")[index % 2])
        for index in range(16)
    ]

    def end() -> float:
        at = time.monotonic()
        routers = [psutil.Process(pid) for pid in status.routers.values()]
        family = [process.pid for router in routers for process in (router, *router.children(recursive=True))]
        for pid in (status.pid, *(family if tree else ())):
            os.kill(pid, signal.SIGTERM)
        return at

    # That the host exits with 0 is seen to by ``deployed``.
    with short_folder() as folder, deployed(write_config(folder, deployment={"drain_grace_s": 20})) as (_, status):
        run = asyncio.run(run_all(status, cases, end, enough=64))
        figure(f"F27 SIGTERM {told} under load -> every answer whole", time.monotonic() - run.verdict, 5.0)
        wait_for(lambda: not alive(status.pid), 30.0, "the host's end")
        figure(f"F27 SIGTERM {told} under load -> host gone", time.monotonic() - run.verdict, 8.0)
    for case, (choice,) in zip(cases, run.answers, strict=True):
        oracle = expected_tokens(case.prompt.encode(), SamplingParams(max_tokens=OUTPUT, temperature=0.0))
        assert (choice.tokens, choice.reason) == (oracle, "length")
