"""The dispatcher: which of its frontends' calls reach the routing core."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from orchestrator.auth.api_keys import KeyLimits
from orchestrator.control.host.router_poller import query
from orchestrator.router.core.event_record import SubmitRecord
from orchestrator.router.core.events import CancelRequest
from orchestrator.router.core.recorder import dump_lines, read_dump
from orchestrator.router.diagnostics import DumpReport
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.key_limits import KeyLimiter
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_core import ask, beat, hello_of, router
from tests.support.router_process import RouterRun
from tests.support.traced_router import Stage
from workers.protocol.messages import Done, FromReplica, KeyUse, Query, Report, Usage, encode
from workers.protocol.specs import RouterAddress
from workers.serving.router_io import KeyPair


@pytest.mark.parametrize("end", ["done", "stopped", "none"])
def test_only_a_live_request_is_cancelled_at_the_core(end: str) -> None:
    stage = Stage()

    async def play() -> None:
        stage.join("a")
        ticket = stage.submit(ask())
        (submit,) = stage.submits()
        if end == "done":
            usage = Usage(prompt_tokens=3, output_tokens=0)
            stage.hear("a", Done(boot="a1", stream=submit.stream, attempt=submit.attempt, reason="stop", usage=usage))
        elif end == "stopped":
            ticket.stop_choice(0)
        ticket.cancel()
        ticket.cancel()
        stage.dispatch.pump()

    asyncio.run(play())
    assert stage.dispatch.live == 0
    events = [record.event for record in read_dump(dump_lines(stage.dispatch.dump())).events]
    assert [type(event) for event in events].count(CancelRequest) == (end == "none")


def test_only_a_replica_that_is_trusted_is_heard_about_keys() -> None:
    """Of what others take for an API key: not an unknown connection, not another process or user, not a replica in quarantine."""
    limiter, core = KeyLimiter(), router().core

    def frame(peer: bytes, user: str, message: FromReplica) -> None:
        dispatch.hear(peer, user, message, encode(message))

    def left() -> str:
        limiter.check("k", "alice", KeyLimits(rpm=100), time.monotonic())
        return limiter.headers("k", time.monotonic())["x-ratelimit-remaining-requests"]

    dispatch = RouterDispatcher(core, name="r", send=lambda peer, message: True, clock=lambda: 0.0, limiter=limiter)
    frame(b"a", "", hello_of("a"))
    frame(b"a", "", beat(boot="a1", keys=[]))
    for peer, user, boot in ((b"x", "", "a1x"), (b"a", "", "a2"), (b"a", "mallory", "a1")):
        for uses in ([], [KeyUse("k", 50, 50, 0)]):
            frame(peer, user, beat(boot=boot, keys=uses))
    assert left() == "100"
    frame(b"a", "", beat(boot="a1", keys=[KeyUse("k", 30, 30, 0)]))
    assert left() == "70"
    frame(b"a", "", beat(boot="a1"))
    assert left() == "70", "a heartbeat may say nothing of keys"
    core.registry.replicas["a"].distrust("it lied", 0.0)
    frame(b"a", "", beat(boot="a1", keys=[KeyUse("k", 99, 99, 0)]))
    assert left() == "70"


def test_an_http_request_that_ended_normally_leaves_no_cancel_in_the_record() -> None:
    body = {"model": "m", "prompt": "hello", "n": 2, "max_tokens": 4, "ignore_eos": True}
    context: zmq.Context[Any] = zmq.Context()
    key = KeyPair(public="0" * 40, secret="0" * 40)  # without CURVE it is not used
    with short_folder() as folder, RouterRun(folder, http=True) as run, Gang(folder, [run.spec.back], name="a", tp=1, engine=FAKE):
        state = run.wait_serving()
        with httpx.Client(base_url=state.http, timeout=30, trust_env=False) as http:
            wait_for(lambda: http.get("/ready").status_code == 200, what="the replica")
            for stream in (False, True):
                assert http.post("/v1/completions", json=body | {"stream": stream}).status_code == 200
        address = RouterAddress(endpoint=run.spec.rpc)
        try:
            report = query(context, address, key, Query(boot="debug", stream=1, what="dump"), 10_000)
        finally:
            context.destroy(linger=0)
        assert isinstance(report, Report)
        dump = Path(msgspec.json.decode(report.body, type=DumpReport).path)
        events = [type(record.event) for record in read_dump(dump.read_bytes().splitlines()).events]
    assert events.count(SubmitRecord) == 2 and CancelRequest not in events
