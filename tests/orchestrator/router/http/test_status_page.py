"""The status page without a browser: what is served, how it is confined, who may see the numbers, and that they are those of /metrics."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.auth.api_keys import ApiKeys, mint
from orchestrator.router.core.replica_registry import Replica, ReplicaRegistry
from orchestrator.router.http.status_page import LossFigures, ModelFigures, ReplicaFigures, Snapshot, StatusPage, judge
from orchestrator.router.metrics import Metrics
from tests.support.scripted_router import ServedDoor
from workers.protocol.messages import PROTOCOL, Capacity, Hello
from workers.protocol.status import ReplicaStatus, RouterStatus, RoutingState

ADMIN, ADMIN_ROW = mint("admin", None, 0)
BOUND, BOUND_ROW = mint("bound", ("tiny",), 0)
ELSEWHERE = {"x-forwarded-for": "192.0.2.7"}
VOID = {"meta", "link", "input", "br", "hr", "img"}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer"), ApiKeys([ADMIN_ROW, BOUND_ROW])) as door:
        yield door


def snapshot(answer: httpx.Response) -> Snapshot:
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=Snapshot)


class Outline(HTMLParser):
    """Every element closed in its turn; ids, attributes and inline texts collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]].append(data)


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    found.close()
    assert not found.open, f"never closed: {found.open}"
    return found


def test_the_page_is_whole_and_brings_nothing_from_elsewhere(door: ServedDoor) -> None:
    answer = door.http.get("/ui", headers=ELSEWHERE)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    text = answer.text
    assert text.startswith("<!doctype html>")
    found = outline(text)
    assert len(found.ids) == len(set(found.ids)), "an id twice"
    for _, name, value in found.attributes:
        assert name not in ("src", "srcset", "action", "style") and not name.startswith("on"), f"{name}={value}"
        if name == "href":
            assert value.startswith("#") or value == "data:,", value
        if name in ("for", "aria-labelledby"):
            assert set(value.split()) <= set(found.ids), f"{name}={value} names nothing"
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"(?m)^\s*//.*$", "", text)))
    assert addresses == {"http://www.w3.org/2000/svg"}, "an address of another host (a name space is none)"
    assert "@import" not in text and "url(" not in text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "cookie"):
        assert way not in text, way


def test_the_policy_admits_what_is_in_the_page_and_nothing_else(door: ServedDoor) -> None:
    answer = door.http.get("/ui")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    found = outline(answer.text)
    for kind in ("script", "style"):
        (text,) = found.texts[kind]
        assert policy[f"{kind}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_text_can_be_read_in_both_schemes(door: ServedDoor, scheme: int) -> None:
    (style,) = outline(door.http.get("/ui").text).texts["style"]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", blocks[scheme]))
    pairs = [(text, ground) for text in ("text", "muted", "good", "warn", "bad", "accent") for ground in ("surface", "ground")]
    for text, ground in [*pairs, *((look, f"{look}-fill") for look in ("good", "warn", "bad")), ("muted", "line")]:
        low, high = sorted(luminance(colours[name]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"


def test_the_page_is_open_and_its_data_is_not(door: ServedDoor) -> None:
    bearer = {name: {"authorization": f"Bearer {key}"} for name, key in (("admin", ADMIN), ("bound", BOUND))}
    nobody = door.http.get("/nothing")
    assert nobody.status_code == 401
    assert door.http.get("/ui", headers=ELSEWHERE).status_code == 200
    assert door.http.get("/ui/data").status_code == 200, "open to this host, as /metrics is"
    refused = door.http.get("/ui/data", headers=ELSEWHERE)
    assert (refused.status_code, refused.content) == (401, nobody.content), "a stranger can tell paths apart"
    assert door.http.get("/ui/data", headers=ELSEWHERE | bearer["admin"]).status_code == 200
    assert door.http.get("/ui/data", headers=ELSEWHERE | bearer["bound"]).status_code == 404
    assert door.http.get("/ui/", headers=ELSEWHERE).status_code == 401
    assert door.http.post("/ui/data", headers=bearer["admin"]).status_code == 405


def test_its_numbers_are_those_of_metrics(door: ServedDoor) -> None:
    bearer = {"authorization": f"Bearer {ADMIN}"}
    for _ in range(3):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        assert door.http.post("/v1/chat/completions", json=body, headers=bearer).status_code == 200
    answer = door.http.get("/ui/data")
    assert answer.headers["cache-control"] == "no-store"
    data = snapshot(answer)
    series = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(door.http.get("/metrics").text)
        for sample in family.samples
    }
    (model,) = data.models
    assert model.success["stop"] == series["trireme_request_success_total", "stop", "tiny"] == 3
    assert model.generation_tokens == series["trireme_generation_tokens_total", "tiny"] > 0
    assert model.queue == series["trireme_router_queued_choices", "tiny"]
    for latency, name in ((model.first_token, "time_to_first_token"), (model.inter_token, "inter_token_latency")):
        edges = [*map(str, data.bounds), "+Inf"]
        assert list(latency.counts) == [series[f"trireme_{name}_seconds_bucket", edge, "tiny"] for edge in edges]
        assert latency.total_s == series[f"trireme_{name}_seconds_sum", "tiny"]
    (replica,) = data.replicas
    assert (replica.running, replica.waiting) == (2, 1)
    assert 1 - replica.free_blocks / replica.num_blocks == series["trireme_kv_cache_usage_perc", "r0", "tiny"]
    assert data.router == "test" and data.verdict.state == "READY"


def figures(state: RoutingState = "ready", **facts: Any) -> ReplicaFigures:
    return ReplicaFigures(name=facts.pop("name", "left"), model="m", state=state, **facts)


def model(ready: int) -> ModelFigures:
    page = StatusPage("r", 1, Metrics(["m"]), lambda: RouterStatus(router="r"))
    return msgspec.structs.replace(page.snapshot().models[0], ready=ready)


@pytest.mark.parametrize(
    ("replicas", "drained", "state", "told"),
    [
        ([], False, "STARTING", "no replica was heard of yet"),
        ([figures()], False, "READY", "1 replica ready, every model served"),
        ([figures(), figures("lost", name="right", reason="silent for 2.1 s")], False, "DEGRADED", "right is lost: silent for 2.1 s"),
        ([figures(), figures("lost", name="right", reason="said goodbye")], True, "READY", "1 replica ready, every model served"),
        ([figures(), figures("draining", name="right")], False, "DEGRADED", "right drains"),
        ([figures(quarantined=True)], False, "DEGRADED", "left is in quarantine"),
        ([figures("lost", reason="unreachable")], False, "UNAVAILABLE", "no replica of m is ready"),
        ([figures("draining")], False, "UNAVAILABLE", "no replica of m is ready"),
    ],
)
def test_the_verdict_names_what_is_wrong(replicas: list[ReplicaFigures], drained: bool, state: str, told: str) -> None:
    models = (model(sum(replica.state == "ready" for replica in replicas)),)
    losses = [LossFigures(replica="right", model="m", epoch="1", reason="r", choices=1, drained=drained, age_s=1.0)]
    verdict = judge(False, models, replicas, losses)
    assert verdict.state == state and told in "; ".join(verdict.why)
    assert judge(True, models, replicas, losses).state == "DRAINING"


def test_losses_are_remembered_with_what_ran_there() -> None:
    fleet = ReplicaRegistry(2.0, 10.0)
    capacity = Capacity(
        block_size=16, num_blocks=8, max_batch_size=4, max_num_tokens=64, max_seq_len=128, vocab_size=256, tp=2, pp=1
    )  # fmt: skip

    def join(epoch: int, now: float) -> Replica:
        hello = Hello(
            boot=f"boot{epoch}",
            protocol=PROTOCOL,
            replica="left",
            model="m",
            epoch=epoch,
            resume="bitwise",
            capacity=capacity,
        )
        return fleet.hello(b"peer", "", hello, now).replica  # type: ignore[union-attr]

    for epoch in range(1, 41):
        replica = join(epoch, float(epoch))
        replica.add_stream(1, 0)
        replica.add_stream(2, 0)
        assert fleet.lose(replica, "silent", epoch + 0.5) and not fleet.lose(replica, "again", epoch + 0.6)
    assert len(fleet.losses) == 32, "bounded"
    last = fleet.losses[-1]
    assert (last.replica, last.epoch, last.reason, last.choices, last.drained, last.at) == ("left", 40, "silent", 2, False, 40.5)


def test_a_name_from_elsewhere_stays_text() -> None:
    name = "</script><img src=x onerror=alert(1)>"
    epoch = (1_700_000_000_000 << 16) + 7
    status = RouterStatus(router="r", replicas=(ReplicaStatus(name=name, model="m", state="ready", epoch=epoch),))
    page = StatusPage("r", 1, Metrics(["m"]), lambda: status)
    (replica,) = msgspec.json.decode(msgspec.json.encode(page.snapshot()), type=Snapshot).replicas
    assert replica.name == name and replica.launched == 1_700_000_000.0
    assert replica.epoch == str(epoch), "every digit: JavaScript's numbers would lose some"
    assert name.encode() not in page.html


def test_the_page_travels_with_the_package() -> None:
    project = (Path(__file__).resolve().parents[4] / "pyproject.toml").read_text()
    assert '"orchestrator.router.http" = ["ui.html"]' in project
