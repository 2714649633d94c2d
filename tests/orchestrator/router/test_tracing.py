"""Traces: what a request's spans say, what they never say, and that a request which is not sampled costs nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from orchestrator.client import Client
from orchestrator.config.router_spec import MetricsSpec, TracingSpec
from orchestrator.router import request_context, span_names, tracing
from orchestrator.router.request_context import Trace, parse_traceparent
from orchestrator.router.tracing import EXPORT_S, Traces
from tests.support.gang import FAKE, Gang, short_folder, wait_for
from tests.support.router_core import ask, tokens
from tests.support.router_process import RouterRun
from tests.support.traced_router import Stage
from workers.protocol.errors import ConfigError, Overloaded
from workers.protocol.messages import Done, Submit, Usage

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


def test_names_are_those_of_the_conventions() -> None:
    """As OpenTelemetry's own package spells them; they are in development, and may move out of it."""
    conventions = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for value in vars(conventions).values() if isinstance(value, str)} | {"error.type"}
    known |= {value.value for value in conventions.GenAiOperationNameValues}
    ours = {value for name, value in vars(span_names).items() if name.isupper() and isinstance(value, str)}
    theirs = {value for value in ours if value.startswith("gen_ai.")} | {span_names.ERROR_TYPE, span_names.CHAT, span_names.TEXT}
    assert theirs <= known
    assert not any(word in value for value in ours for word in ("message", "content", "instructions"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TRACEPARENT, Trace(TRACE, CALLER, True)),
        (f"00-{TRACE}-{CALLER}-00", Trace(TRACE, CALLER, False)),
        (f"cc-{TRACE}-{CALLER}-03-what-the-future-has", Trace(TRACE, CALLER, True)),
        (f"00-{TRACE}-{CALLER}-01-more", None),
        (f"ff-{TRACE}-{CALLER}-01", None),
        (f"00-{'0' * 32}-{CALLER}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{CALLER}-01", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_traceparent(text: str, found: Trace | None) -> None:
    assert parse_traceparent(text) == found


def staged(play: Callable[[Stage], Awaitable[None]], **admission: Any) -> Stage:
    async def main() -> Stage:
        stage = Stage(**admission)
        await play(stage)
        return stage

    return asyncio.run(main())


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return round(span.start_time / 1e9, 6), round(span.end_time / 1e9, 6)


def done(stage: Stage, place: str, submit: Submit, output: int) -> None:
    usage = Usage(prompt_tokens=3, output_tokens=output, cached_tokens=1)
    stage.hear(place, Done(boot=f"{place}1", stream=submit.stream, attempt=submit.attempt, reason="length", usage=usage))


def test_a_request_is_one_trace_from_the_door_through_a_failover_to_its_end() -> None:
    async def play(stage: Stage) -> None:
        request_context.enter("my-request", TRACEPARENT)
        request_context.learn(None, chat=True)
        stage.submit(ask())
        stage.now = 101.0
        stage.join("a")
        (first,) = stage.submits()
        stage.now = 101.5
        stage.hear("a", tokens("a1", first, 0, [5, 6]))
        stage.now = 104.0
        stage.dispatch.tick()
        stage.now = 105.0
        stage.join("b")
        (second,) = stage.submits()
        stage.now = 105.25
        stage.hear("b", tokens("b1", second, 2, [7]))
        stage.now = 106.0
        done(stage, "b", second, 3)

    stage = staged(play)
    spans = stage.kept.get_finished_spans()
    root = next(span for span in spans if span.name == "chat m")
    assert root.context is not None and root.context.trace_id == int(TRACE, 16)
    assert root.parent is not None and root.parent.span_id == int(CALLER, 16) and root.kind == SpanKind.SERVER
    assert root.status.status_code == StatusCode.UNSET and seconds(root)[1] == 106.0
    assert dict(root.attributes or {}) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "trireme", "gen_ai.request.model": "m", "gen_ai.response.id": "q",
        "gen_ai.request.max_tokens": 8, "gen_ai.request.choice.count": 1, "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 1, "gen_ai.response.finish_reasons": ("length",), "trireme.request_id": "my-request",
    }  # fmt: skip
    children = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    assert [span.name for span in sorted(children, key=lambda span: span.start_time or 0) if span.name != "prepare"] == [
        "queue", "replica a", "queue", "replica b",
    ]  # fmt: skip
    lost, taken = (next(span for span in spans if span.name == f"replica {name}") for name in "ab")
    assert seconds(lost) == (101.0, 104.0) and seconds(taken) == (105.0, 106.0)
    assert lost.status.status_code == StatusCode.ERROR and [event.name for event in lost.events] == ["failover"]
    assert dict(lost.events[0].attributes or {}) == {"trireme.cause": "silent"}
    assert [span.attributes and span.attributes["trireme.tokens"] for span in (lost, taken)] == [2, 1]
    assert [span.attributes and span.attributes["trireme.attempt"] for span in (lost, taken)] == [1, 2]
    assert taken.status.status_code == StatusCode.UNSET and not taken.events
    parts = {(span.name, span.parent and span.parent.span_id): seconds(span) for span in spans if span.name in ("prefill", "decode")}
    assert lost.context is not None and taken.context is not None
    assert parts == {
        ("prefill", lost.context.span_id): (101.0, 101.5), ("decode", lost.context.span_id): (101.5, 104.0),
        ("prefill", taken.context.span_id): (105.0, 105.25), ("decode", taken.context.span_id): (105.25, 106.0),
    }  # fmt: skip
    assert {span.context.trace_id for span in spans if span.context} == {int(TRACE, 16)}


def test_a_stop_string_a_cancel_and_a_refusal_end_it_too() -> None:
    async def play(stage: Stage) -> None:
        stage.join("a")
        stopped, left = stage.submit(ask(n=2)), stage.submit(ask(request_id="left"))
        stage.submits()
        stopped.stop_choice(0)
        assert not stage.kept.get_finished_spans(), "one choice is still open"
        stopped.stop_choice(1)
        left.cancel()
        left.cancel()
        stage.dispatch.stop_accepting()
        with pytest.raises(Overloaded):
            stage.submit(ask(request_id="late"))

    roots = [span for span in staged(play).kept.get_finished_spans() if span.name == "text_completion m"]
    told = {str((span.attributes or {})["gen_ai.response.id"]): span for span in roots}
    assert {id: (span.attributes or {})["gen_ai.response.finish_reasons"] for id, span in told.items()} == {
        "q": ("stop", "stop"), "left": ("cancelled",), "late": (),
    }  # fmt: skip
    assert (told["late"].attributes or {})["error.type"] == "unavailable" and told["late"].status.status_code == StatusCode.ERROR


def test_what_is_not_sampled_passes_untouched() -> None:
    async def play(stage: Stage) -> None:
        request_context.enter("quiet", f"00-{TRACE}-{CALLER}-00")
        stage.join("a")
        seen: list[tuple[object, object]] = []
        stage.dispatch.submit = lambda asked, watcher, meter: seen.append((asked, watcher))  # type: ignore
        asked = ask()
        stage.submit(asked)
        assert len(seen) == 1 and seen[0][0] is asked and seen[0][1] is stage.ears

    assert not staged(play).kept.get_finished_spans()


def test_a_collector_is_named_by_its_url() -> None:
    with pytest.raises(ConfigError, match="tracing"):
        TracingSpec(endpoint="localhost:4318")


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP/HTTP receiver: its URL, and the spans that came."""
    spans: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(span for group in body.resource_spans for scope in group.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_real_router_sends_both_doors_requests_and_no_text() -> None:
    """Also: the id comes back, log lines are JSON, and ``/metrics`` has a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics = MetricsSpec(port=probe.getsockname()[1])
    with (
        collector() as (url, spans),
        short_folder() as folder,
        RouterRun(folder, http=True, tracing=TracingSpec(endpoint=url), metrics=metrics, log_format="json") as run,
        Gang(folder, [run.spec.back], name="a", tp=1, engine=FAKE),
    ):
        state = run.wait_serving()
        with httpx.Client(base_url=state.http, timeout=30, trust_env=False) as http:
            wait_for(lambda: http.get("/ready").status_code == 200, what="the replica")
            headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
            body = {"model": "m", "prompt": "SECRET-PROMPT", "max_tokens": 8, "ignore_eos": True}
            answer = http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
        with Client([run.spec.rpc], model="m") as client:
            metadata = {"traceparent": TRACEPARENT}
            call = client.complete("SECRET-PROMPT", max_tokens=8, ignore_eos=True, request="by-rpc", metadata=metadata)
            call.result()
        scraped = httpx.get(f"http://127.0.0.1:{metrics.port}/metrics", trust_env=False)
        assert 'trireme_request_success_total{finished_reason="length",model_name="m"} 2.0' in scraped.text
        assert httpx.get(f"http://127.0.0.1:{metrics.port}/v1/models", trust_env=False).status_code == 404
        assert run.terminate() == 0, "what is left is sent at the end"
        roots = [span for span in spans if span.name == "text_completion m"]
        assert {span.trace_id.hex() for span in spans} == {TRACE} and len(roots) == 2
        ids = {value.value.string_value for span in roots for value in span.attributes if value.key == span_names.REQUEST_ID}
        assert ids == {"mine", "by-rpc"}
        assert {span.name for span in spans} == {"text_completion m", "prepare", "queue", "replica a", "prefill", "decode"}
        assert b"SECRET" not in b"".join(span.SerializeToString() for span in spans)
        lines = [msgspec.json.decode(line) for line in run.log.read_bytes().splitlines()]
        assert lines and all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_a_collector_that_never_answers_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans wait for it, requests do not, and a router's end does for a bounded time."""

    monkeypatch.setattr(tracing, "CLOSE_S", 0.2)

    async def play(stage: Stage) -> None:
        with socket.socket() as hole:
            hole.bind(("127.0.0.1", 0))
            hole.listen()
            traces = Traces(TracingSpec(endpoint=f"http://127.0.0.1:{hole.getsockname()[1]}/v1/traces"), "r")
            stage.traced = traces.around(stage.dispatch, time.monotonic)
            stage.submit(ask()).cancel()
            begun = time.monotonic()
            traces.close()
            assert time.monotonic() - begun < EXPORT_S, "it waits for its own bound, not for the collector's"

    staged(play)
