"""What is shipped for operators against what a router really says: every series, label and alert named there exists, and is documented."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.metrics import Metrics
from tests.support.router_core import ask, beat, join, router
from workers.protocol.messages import STEP_TOKEN_BUCKETS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/trireme.json"
RULES = sorted((ROOT / "deploy/prometheus").glob("*.rules.yml"))
DOC = ROOT / "docs/operations.md"
#: What a scraper adds, and what our recording rules make.
OUTSIDE_LABELS = {"instance", "job", "le", "engine"}
OUTSIDE_SERIES = {"up"}
NAME = re.compile(r"(?<![\w\":])((?:trireme|process)_[a-z0-9_]+|up)(?=[\s{\[),]|$)")
LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"")
GROUPED = re.compile(r"(?:by|without|ignoring|on) \(([^)]*)\)")


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    """Of a router with a replica that was heard, and with one request."""

    async def scrape() -> bytes:
        route = router()
        join(route, "a")
        counts = [1] * (len(STEP_TOKEN_BUCKETS) + 1)
        route.hear(b"a", "", beat(boot="a1", step_tokens=counts, step_tokens_total=9), 0.0)
        route.submit(ask(), 0.0)
        dispatch = RouterDispatcher(route.core, name="r", send=lambda *_: True, clock=lambda: 0.0)
        return Metrics(["m"], dispatch.status, route.stats).render()

    return list(text_string_to_metric_families(asyncio.run(scrape()).decode()))


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of every panel, annotation and rule."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    found = [(f"panel {panel['title']}", target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    found += [(f"annotation {note['name']}", note["expr"]) for note in board["annotations"]["list"]]
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            found += [(str(rule.get("record") or rule.get("alert")), rule["expr"]) for rule in group["rules"]]
    return found


def test_every_series_and_label_that_is_asked_for_exists(families: list[Metric]) -> None:
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = expressions()
    assert len(asked) > 100
    for where, text in asked:
        names = set(NAME.findall(text)) - OUTSIDE_SERIES
        assert names or "up{" in text, f"{where}: asks for nothing"
        assert names <= labels.keys(), f"{where}: {names - labels.keys()} never existed"
        known = set().union(*(labels[name] for name in names)) | OUTSIDE_LABELS
        used = set(LABEL.findall(text)) | {name.strip() for group in GROUPED.findall(text) for name in group.split(",") if name.strip()}
        assert used <= known, f"{where}: no label {used - known}"


def test_a_histogram_is_asked_for_by_its_bounds(families: list[Metric]) -> None:
    """A bound that is written out in a query is one that exists, to the letter."""
    bounds = {(sample.name, sample.labels["le"]) for family in families for sample in family.samples if "le" in sample.labels}
    for where, text in expressions():
        for name, values in re.findall(r"((?:trireme)_[a-z0-9_]+)\{[^}]*le=~?\"([^\"]*)\"", text):
            assert {(name, value) for value in values.split("|")} <= bounds, where


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and board["uid"] == "trireme"
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert panel["title"] and place["x"] + place["w"] <= 24
        taken = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not taken & cells, f"{panel['title']} lies on another panel"
        cells |= taken
        assert panel["type"] == "row" or panel["targets"], f"{panel['title']} is empty"


def test_every_family_and_alert_is_documented(families: list[Metric]) -> None:
    text = DOC.read_text()
    ours = {family.name for family in families if family.name.startswith("trireme_")}
    assert not {name for name in ours if not re.search(rf"\b{name}(_total)?\b", text)}
    told = set(re.findall(r"`(trireme_[a-z0-9_]+)`", text))
    known = {name for family in families for name in (family.name, f"{family.name}_total", *(sample.name for sample in family.samples))}
    assert told <= known, f"documented, but not there: {told - known}"
    alerts = {
        rule["alert"]
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert len(alerts) > 10 and not {alert for alert in alerts if f"`{alert}`" not in text}


def test_families_have_help_units_and_types(families: list[Metric]) -> None:
    for family in families:
        assert family.documentation, f"{family.name} says nothing"
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search(r"(_ms|_milliseconds|_mb)$", family.name), f"{family.name}: not a base unit"
        if family.type == "histogram":
            for sample in family.samples:
                assert sample.name.removeprefix(family.name) in ("_bucket", "_sum", "_count")
