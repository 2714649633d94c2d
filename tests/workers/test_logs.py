"""Log lines: one JSON object each, with the process that wrote them."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.router import request_context
from orchestrator.router.request_context import RequestContextFilter
from tests.support.router_core import ask
from tests.support.traced_router import Stage
from workers.logs import JsonLines
from workers.protocol.engine import Emission, Fault
from workers.protocol.messages import Accepted, GenerateTask, SamplingParams, Submit
from workers.serving.stream_table import LogFault, StartSequence, StreamTable

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Sheet:
    """A logger, and what it has written."""

    def __init__(self) -> None:
        self.paper = io.StringIO()
        self.handler = logging.StreamHandler(self.paper)
        self.handler.addFilter(RequestContextFilter())
        self.handler.setFormatter(JsonLines(replica="a", rank=0))
        self.log = logging.Logger("t")
        self.log.addHandler(self.handler)

    def lines(self) -> list[dict[str, object]]:
        return [msgspec.json.decode(line) for line in self.paper.getvalue().splitlines()]


@pytest.fixture
def sheet() -> Iterator[Sheet]:
    made = Sheet()
    yield made
    made.handler.close()


def test_a_line_is_one_object_whatever_it_says(sheet: Sheet) -> None:
    sheet.log.warning("first\nsecond %s", '"}')
    try:
        raise ValueError("x\ny")
    except ValueError:
        sheet.log.exception("it broke")
    first, second = sheet.lines()
    assert {key: first[key] for key in ("level", "logger", "message", "replica", "rank")} == {
        "level": "WARNING", "logger": "t", "message": 'first\nsecond "}', "replica": "a", "rank": 0,
    }  # fmt: skip
    assert "request_id" not in first and "x\ny" in str(second["trace"])


def test_a_ranks_log_is_json_where_that_is_wanted(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from workers.process import open_log;"
        "open_log(sys.argv[1], 3, form=sys.argv[2], replica='a'); logging.getLogger('t').info('up')"
    )
    lines = {}
    for form in ("json", "text"):
        (tmp_path / form).mkdir()
        subprocess.run([sys.executable, "-c", code, str(tmp_path / form), form], check=True, timeout=60)
        lines[form] = (tmp_path / form / "rank3.log").read_bytes()
    found = msgspec.json.decode(lines["json"])
    assert [found[key] for key in ("level", "message", "replica", "rank")] == ["INFO", "up", "a", 3]
    assert lines["text"].endswith(b" rank 3 INFO t: up\n")


def test_lines_of_a_request_carry_its_ids_and_others_do_not(sheet: Sheet) -> None:
    async def work(name: str, traceparent: str) -> None:
        request_context.enter(name, traceparent)
        await asyncio.sleep(0)
        sheet.log.info("at work")

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(work("one", TRACEPARENT)), asyncio.create_task(work("two", "")))
        sheet.log.info("nobody's")
        sheet.log.info("another's", extra={"request_id": "three"})

    asyncio.run(main())
    assert [(line.get("request_id"), line.get("trace_id")) for line in sheet.lines()] == [
        ("one", "0af7651916cd43dd8448eb211c80319c"), ("two", None), (None, None), ("three", None),
    ]  # fmt: skip


def test_traceparent_of_a_body_counts_where_the_door_brought_none() -> None:
    async def main() -> list[tuple[str, str]]:
        found = [request_context.marks()]
        request_context.enter("r", "")
        request_context.learn({"traceparent": TRACEPARENT}, chat=False)
        found.append(request_context.marks())
        request_context.enter("r", TRACEPARENT)
        request_context.learn({"traceparent": TRACEPARENT.replace("0af7", "ffff")}, chat=True)
        found.append(request_context.marks())
        for odd in ({"traceparent": 7}, {"traceparent": "odd"}, None):
            request_context.enter("r", "")
            request_context.learn(odd, chat=False)
            found.append(request_context.marks())
        return found

    trace = "0af7651916cd43dd8448eb211c80319c"
    assert asyncio.run(main()) == [("", ""), ("r", trace), ("r", trace), ("r", ""), ("r", ""), ("r", "")]


def test_a_leader_can_tell_whose_sequence_failed() -> None:
    sessions = StreamTable(boot="b", model="m")
    submit = Submit(
        boot="r", stream=1, attempt=1, client="c", request_id="q/0", model="m", prompt_ids=[1],
        task=GenerateTask(params=SamplingParams()), marks=("mine", "t"),
    )  # fmt: skip
    (start,) = sessions.submit(submit, 0.0)
    assert isinstance(start, StartSequence)
    fault = Fault("nan_logits", "not finite")
    actions = sessions.emitted([Emission(start.id, 0, [], end=fault)])
    assert LogFault("q/0", ("mine", "t"), fault) in actions


def test_a_router_tells_of_lost_replicas_and_of_requests_that_failed_with_them(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        stage = Stage(replica_limit=1)
        request_context.enter("mine", TRACEPARENT)
        stage.join("a")
        stage.submit(ask())
        (submit,) = stage.submits()
        stage.hear("a", Accepted(boot="a1", stream=submit.stream, attempt=submit.attempt))
        stage.now += 10.0
        stage.dispatch.tick()
        stage.dispatch.tick()

    with caplog.at_level(logging.INFO, logger="trireme.dispatch"):
        asyncio.run(main())
    lost, failed = caplog.records
    assert lost.levelname == "WARNING" and "silent" in lost.getMessage() and lost.__dict__["replica"] == "a"
    assert "replica_limit" in failed.getMessage() and failed.__dict__["request_id"] == "mine"
    assert failed.__dict__["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
