"""The load generator against real doors: what it counts is what happened, and what it cannot hide."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from orchestrator.cli.main import run as trireme
from orchestrator.loadgen.http_target import HttpTarget
from orchestrator.loadgen.rpc_target import RpcTarget
from orchestrator.loadgen.runner import LoadRun, RunOptions, clock
from orchestrator.loadgen.schedule import ContextLimit, PlannedRequest, Range, synthetic
from orchestrator.loadgen.stats import RequestSample, RunStats, Summary
from orchestrator.loadgen.target import LoadTarget, TargetRequest
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_process import RouterRun
from tests.support.scripted_router import Play, ServedDoor
from workers.protocol.errors import EngineFault, Overloaded, Rejected
from workers.protocol.specs import RouterAddress


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer")) as door:
        yield door


@pytest.fixture
def door(served: ServedDoor) -> ServedDoor:
    served.dispatcher.reset()
    return served


def plan(count: int, *, input: int = 20, output: int = 5, rate: float | None = None) -> Iterator[PlannedRequest]:
    times = (index / rate for index in range(count)) if rate is not None else None
    return islice(synthetic(Range(input, input), Range(output, output), ContextLimit(None), 1, times), count)


def options(**fields: Any) -> RunOptions:
    return RunOptions(**{"concurrency": 4, "seed": 1, "timeout_s": 20.0, **fields})


async def sent(target: LoadTarget, planned: Iterator[PlannedRequest], **fields: Any) -> Summary:
    load = LoadRun(target, planned, options(**fields), RunStats())
    try:
        await load.run()
    finally:
        await target.close()
    return load.stats.summary(0.0)


def over_http(url: str, planned: Iterator[PlannedRequest], *, model: str = "tiny", endpoint: Any = "completions", **fields: Any) -> Summary:
    async def main() -> Summary:
        return await sent(HttpTarget(url, model=model, endpoint=endpoint, clock=clock), planned, **fields)

    return asyncio.run(main())


def test_a_closed_loop_asks_what_was_planned(door: ServedDoor) -> None:
    found = over_http(f"{door.url}/v1/", plan(30, input=21, output=7))
    assert (found.sent, found.succeeded, found.failed, found.uncounted) == (30, 30, 0, 0)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (30 * 21, 30 * 7, 30 * 3)
    assert found.client.peak_in_flight == 4 and found.latency_ms["itl"].count == 30 * 6
    assert {len(ask.prompt_ids) for ask in door.dispatcher.asks} == {21} and {ask.params.max_tokens for ask in door.dispatcher.asks} == {7}
    assert all(ask.params.ignore_eos for ask in door.dispatcher.asks) and len({tuple(ask.prompt_ids) for ask in door.dispatcher.asks}) == 30
    assert found.latency_ms["e2e"].min >= found.latency_ms["ttft"].min > 0.0


def test_a_chat_in_words(door: ServedDoor) -> None:
    found = over_http(door.url, plan(3, output=4), endpoint="chat", words=True, ignore_eos=False)
    assert (found.succeeded, found.output_tokens) == (3, 12)
    assert b" the " in bytes(id for ask in door.dispatcher.asks for id in ask.prompt_ids if id < 256)
    assert not door.dispatcher.asks[0].params.ignore_eos


def test_errors_by_kind(door: ServedDoor) -> None:
    door.dispatcher.refusal = Overloaded("the queue is full", retry_after=1.0)
    found = over_http(door.url, plan(5))
    assert (found.succeeded, found.failed) == (0, 5)
    assert found.errors["overloaded"].count == 5 and "full" in found.errors["overloaded"].example
    door.dispatcher.refusal = None
    door.dispatcher.script = lambda ask, choice: Play(error=EngineFault("a rank died"))
    found = over_http(door.url, plan(3))
    assert {code: row.count for code, row in found.errors.items()} == {"engine_fault": 3}, "in mid-stream, with status 200"
    assert over_http(door.url, plan(2), model="ghost").errors["model_not_found"].count == 2
    assert over_http(door.url, plan(2, output=4000)).errors["context_length_exceeded"].count == 2


def test_an_answer_that_never_ends_is_a_failure_of_its_own(door: ServedDoor) -> None:
    door.dispatcher.script = lambda ask, choice: Play(hang=True)
    assert over_http(door.url, plan(3), timeout_s=0.3).errors["timeout"].count == 3
    wait_for(lambda: all(ticket.cancelled for ticket in door.dispatcher.tickets), what="cancelled choices")


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that gives each POST of a connection its answer, then closes it; it knows nothing else."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    for answer in answers:
                        request = peer.recv(1 << 16)
                        if not request:
                            break
                        peer.sendall(answer if request.startswith(b"POST") else response(b"no", kind="text/plain", status="404 Not Found"))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def response(body: bytes, *, kind: str = "text/event-stream", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


EVENT = b'data: {"choices":[{"text":"a"}]}\r\n\r\n'


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (response(EVENT), "broken_answer"),
        (response(b"data: {]\n\n"), "broken_answer"),
        (response(EVENT)[:-4], "connection"),
        (b"garbage\r\n\r\n", "broken_answer"),
        (response(b"{}", kind="application/json"), "not_a_stream"),
        (response(b"<html>", kind="text/html", status="502 Bad Gateway"), "http_502"),
        (response(b'{"error":{"message":"no","code":400}}', kind="application/json", status="400 Bad Request"), "http_400"),
        (response(b'data: {"error":"gone"}\n\n'), "http_200"),
    ],
)  # fmt: skip
def test_what_other_servers_may_do(answer: bytes, code: str) -> None:
    with answering(answer) as url:
        assert over_http(url, plan(2)).errors[code].count == 2


def test_a_server_without_usage_is_counted_by_events_and_its_closed_connections_are_replaced() -> None:
    whole = response(EVENT * 3 + b"data: [DONE]\n\n")
    endless = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + EVENT * 3 + b"data: [DONE]\n\n"
    with answering(whole, endless) as url:
        found = over_http(url, plan(7), concurrency=1)
    assert (found.succeeded, found.uncounted, found.output_tokens, found.prompt_tokens) == (7, 7, 21, 7 * 20)


def test_an_endpoint_that_lists_no_models(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(response(EVENT + b"data: [DONE]\n\n")) as url:
        assert trireme(["bench", "--url", url, "-n", "2"]) == 5 and "HTTP 404" in capsys.readouterr().err
        assert trireme(["bench", "--url", url, "-n", "2", "--model", "x", "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["summary"]["succeeded"] == 2 and report["settings"]["max_len"] is None


def test_nobody_there() -> None:
    assert over_http("http://127.0.0.1:9", plan(2)).errors["connection"].count == 2
    with pytest.raises(Rejected):
        HttpTarget("localhost:8000", model="m", endpoint="completions", clock=clock)


class Slow:
    """A target that answers one request after the other, each in ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._turn = seconds, asyncio.Lock()

    async def send(self, request: TargetRequest, sample: RequestSample) -> None:
        sample.sent(clock())
        async with self._turn:
            await asyncio.sleep(self._seconds)
            sample.piece(clock())

    async def close(self) -> None: ...


@pytest.mark.parametrize("concurrency", [1, 100], ids=["held back", "all at once"])
def test_an_open_loop_hides_no_waiting(concurrency: int) -> None:
    """20 requests meant for one instant, 20 ms each: the last one's user waited for all of them, whoever kept it waiting."""

    async def main() -> Summary:
        return await sent(Slow(0.02), plan(20, rate=1e6), concurrency=concurrency)

    found = asyncio.run(main())
    assert found.latency_ms["ttft"].max >= 19 * 20 and found.latency_ms["ttft"].p50 >= 9 * 20
    if concurrency == 1:
        assert found.latency_ms["queue"].max >= 18 * 20 and found.client.peak_in_flight == 1
    else:
        assert found.client.peak_in_flight > 1


def test_what_was_due_in_time_is_sent_though_it_is_late() -> None:
    async def main() -> Summary:
        return await sent(Slow(0.02), plan(100, rate=200.0), concurrency=1, duration_s=0.05)

    found = asyncio.run(main())
    assert found.sent == found.succeeded == 10


def test_a_run_that_is_stopped_tells_what_it_has() -> None:
    async def main() -> tuple[Summary, bool]:
        load = LoadRun(Slow(0.02), plan(10_000), options(concurrency=8), RunStats())
        running = asyncio.create_task(load.run())
        await asyncio.to_thread(wait_for, lambda: load.stats.succeeded >= 5, what="some answers")
        load.stop()
        await asyncio.wait_for(running, 20)
        return load.stats.summary(0.0), load.stats.in_flight == 0

    found, settled = asyncio.run(main())
    assert settled and found.succeeded >= 5 and 1 <= found.abandoned <= 8 and found.sent == found.succeeded + found.abandoned


def test_both_doors_of_a_real_router(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with short_folder() as folder, RouterRun(folder, http=True) as router:
        state = router.wait_serving()
        with Gang(folder, [router.spec.back], tp=1, engine=FAKE, artifact=router.spec.models[0].tokenizer) as gang:
            gang.wait_phase("ready")
            wait_for(lambda: httpx.get(state.http + "/ready", trust_env=False).status_code == 200, what="the router to hear of it")

            async def rpc() -> Summary:
                address = RouterAddress(endpoint=state.rpc)
                return await sent(RpcTarget([address], model="m", keys=None, clock=clock), plan(12, input=33, output=9))

            for found in (over_http(state.http, plan(12, input=33, output=9), model="m"), asyncio.run(rpc())):
                assert (found.succeeded, found.prompt_tokens, found.output_tokens) == (12, 12 * 33, 12 * 9), found.errors
                assert found.latency_ms["itl"].count > 0 and found.latency_ms["e2e"].min >= found.latency_ms["ttft"].min > 0.0
            status = SimpleNamespace(rpc=(RouterAddress(endpoint=state.rpc),), key_file="")
            for module in ("generate_request", "bench"):
                monkeypatch.setattr(f"orchestrator.cli.{module}.pick", lambda *_: SimpleNamespace(name="d", status=lambda: status))
            assert trireme(["bench", "--rpc", "-n", "6", "--input-len", "9", "--output-len", "3", "-o", "json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["summary"]["output_tokens"] == 18 and report["settings"]["model"] == "m"
            assert report["settings"]["max_len"] > 1024 and report["settings"]["target"] == "rpc d"


def bench(capsys: pytest.CaptureFixture[str], door: ServedDoor, *words: str) -> tuple[int, str, str]:
    code = trireme(["bench", "--url", door.url, *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_report(door: ServedDoor, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code, out, err = bench(
        capsys, door, "-n", "8", "-c", "2", "--input_len", "9", "--output-len", "3", "--slo", "ttft:60000", "--warmup", "2",
        "-o", "json", "--out", str(file),
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and json.loads(file.read_text()) == report and list(tmp_path.iterdir()) == [file]
    assert report["summary"]["succeeded"] == 8 and report["summary"]["goodput"]["share"] == 1.0 and report["summary"]["output_tokens"] == 24
    assert report["settings"]["model"] == "tiny" and report["settings"]["max_len"] == 1024 and report["date"].endswith("Z")
    assert "closed loop of 2, 8 requests" in err and "load: 8 requests" in err and len(door.dispatcher.asks) == 10
    code, out, _ = bench(capsys, door, "-n", "3", "--rate", "200", "--model", "tiny-alias", "--input-len", "9", "--output-len", "3")
    assert code == 0 and "time to first token" in out and "3 requests in" in out and "\x1b" not in out


def test_a_trace_from_the_command_line(door: ServedDoor, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000 * (index // 4), "input_length": 1200 - index, "output_length": 3, "hash_ids": [0, 1, index]}
        for index in range(8)
    ]
    packed, plain = tmp_path / "trace.jsonl.gz", tmp_path / "trace.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed.write_bytes(gzip.compress(content))
    plain.write_bytes(content)
    for file in (packed, plain):
        door.dispatcher.reset()
        code, out, _ = bench(capsys, door, "--trace", str(file), "--speed", "100")
        assert code == 0 and "8 requests in" in out and "8 requests were cut to 1024 tokens: 1404 tokens of prompts" in out
        assert len({tuple(ask.prompt_ids[:1000]) for ask in door.dispatcher.asks}) == 1, "blocks 0 and 1 are the same for all"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--slo", "speed:1"], 2, "no figure is named speed"),
        (["--rate", "0"], 2, "--rate 0 means nothing"),
        (["--trace", "/nowhere/t.jsonl"], 4, "/nowhere/t.jsonl cannot be read"),
        (["--rpc", "--chat"], 2, "--chat is asked over HTTP"),
        (["-o", "xml"], 2, "-o xml is not a form"),
        (["--model", "ghost"], 2, "The model `ghost` does not exist"),
        (["--out", "/nowhere/r.json", "-n", "1"], 4, "/nowhere/r.json cannot be written"),
    ],
)  # fmt: skip
def test_what_is_refused(door: ServedDoor, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str) -> None:
    found, _, err = bench(capsys, door, *words)
    assert found == code and says in err


def test_nothing_answered_is_an_exit_code(door: ServedDoor, capsys: pytest.CaptureFixture[str]) -> None:
    door.dispatcher.refusal = Overloaded("the queue is full")
    code, out, _ = bench(capsys, door, "-n", "2")
    assert code == 5 and "failed with overloaded: 2, the first: the queue is full" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_report(door: ServedDoor, capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    door.dispatcher.script = lambda ask, choice: Play(hang=True)

    def interrupt() -> None:
        wait_for(lambda: len(door.dispatcher.asks) == 2, what="requests that hang")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, _ = bench(capsys, door, "-n", "50", "-c", "2", "--timeout", "60")
    thread.join(60)
    assert code == 130 and "2 requests in" in out and "2 abandoned" in out
