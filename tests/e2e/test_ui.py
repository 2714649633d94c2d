"""The status page in a real browser, over a real deployment with load and a killed rank: what people see is what /metrics says.

`make test-ui` runs it and leaves the pictures in build/.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.auth.keyring import ApiKeyRing
from orchestrator.config.router_spec import HttpSpec
from tests.support.browser import Browser
from tests.support.deployment import deployed, wait_for_state, write_config
from tests.support.gang import short_folder
from tests.support.router_process import RouterRun

pytestmark = pytest.mark.long
PICTURES = Path(__file__).resolve().parents[2] / "build"
#: A picture in the documentation costs every clone so many bytes at most.
LARGEST = 200_000
ELSEWHERE = {"X-Forwarded-For": "192.0.2.7"}
Series = dict[tuple[str, ...], float]


class Load:
    """Streams that follow each other, ``width`` at a time, until the end; none may fail."""

    def __init__(self, url: str, width: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.done, self.failures = 0, list[str]()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(width)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                length = 40 + 30 * (number % 4)
                body = {"model": "fake", "prompt": f"stream {number} of many", "max_tokens": length, "ignore_eos": True, "stream": True}
                try:
                    with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                        text = answer.read().decode()
                    if answer.status_code != 200 or not text.endswith("data: [DONE]\n\n"):
                        self.failures.append(text[-200:])
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.done += 1


def series(url: str) -> Series:
    """Every sample of /metrics by its name and its labels' values, in order."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}


def quantile(found: Series, name: str, share: float) -> float:
    """histogram_quantile of a model's whole history, straight from the exposition: linear within a bucket."""
    buckets = sorted((float(key[1]), value) for key, value in found.items() if key[0] == f"{name}_bucket" and key[2] == "fake")
    wanted, start, below = share * buckets[-1][1], 0.0, 0.0
    for edge, value in buckets:
        if value >= wanted:
            return start + (edge - start) * (wanted - below) / (value - below)
        start, below = edge, value
    raise AssertionError(name)


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) / (1000 if unit == "ms" else 1)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def cell(page: Browser, name: str, field: str) -> str:
    """The value in one cell of a table, as it is shown."""
    return str(page.value(f"document.querySelector('tr[data-name={name}] [data-field={field}] .value').textContent"))


def compare(page: Browser, url: str) -> None:
    """Every number on the page against /metrics, both at one moment: what changes meanwhile makes another try."""
    for _ in range(30):
        before = series(url)
        at = page.value("document.body.dataset.time")
        page.wait(f"document.body.dataset.time > {at} + 1.5")
        shown = {name: {field: cell(page, name, field) for field in fields} for name, fields in TABLES.items()}
        tiles = {name: page.value(f"document.getElementById('tile-{name}').textContent") for name in ("tokens", "running", "queue", "kv")}
        if steady(series(url)) == steady(before):
            break
    else:
        raise AssertionError("/metrics never came to rest")
    check_model(shown["fake"], before)
    for name in ("left", "right"):
        row, labels = shown[name], ("fake", name)
        assert number(row["running"]) == before["trireme_num_requests_running", *labels] == 0
        assert number(row["waiting"]) == before["trireme_num_requests_waiting", *labels] == 0
        assert number(row["tok_s"]) == before["trireme_generation_tokens_per_second", *labels]
        assert row["kv"] == f"{100 * before['trireme_kv_cache_usage_perc', *labels]:.1f} %"
        assert row["state"] == "● ready"
    assert number(tiles["tokens"]) == sum(before["trireme_generation_tokens_per_second", "fake", name] for name in ("left", "right"))
    assert number(tiles["running"]) == 0 and number(tiles["queue"]) == before["trireme_router_queued_choices", "fake"] == 0


TABLES = {
    "fake": ("ready", "queue", "in_flight", "ended", "failed", "output", "first", "inter"),
    "left": ("running", "waiting", "tok_s", "kv", "state"),
    "right": ("running", "waiting", "tok_s", "kv", "state"),
}


def steady(found: Series) -> Series:
    """What does not change by itself at rest."""
    wanted = ("trireme_generation", "trireme_request", "trireme_time_to", "trireme_inter_token", "trireme_num_requests", "trireme_kv_cache")
    return {key: value for key, value in found.items() if key[0].startswith(wanted) and not key[0].endswith("_created")}


def check_model(row: dict[str, str], found: Series) -> None:
    ended = sum(value for key, value in found.items() if key[0] == "trireme_request_success_total")
    assert number(row["ended"]) == ended > 0
    assert number(row["failed"]) == sum(value for key, value in found.items() if key[0] == "trireme_request_error_total") == 0
    assert number(row["output"]) == found["trireme_generation_tokens_total", "fake"] > 0
    assert number(row["in_flight"]) == found["trireme_router_inflight_requests", "fake"] == 0
    assert row["ready"] == "2 of 2"
    for field, name in (("first", "trireme_time_to_first_token_seconds"), ("inter", "trireme_inter_token_latency_seconds")):
        for text, share in zip(row[field].split(" / "), (0.5, 0.95, 0.99), strict=True):
            expected = quantile(found, name, share)
            assert seconds(text) == pytest.approx(expected, rel=0.01), f"{field} p{100 * share:.0f}"


@contextmanager
def looking(url: str) -> Iterator[Browser]:
    """The page, opened; at the end there was no complaint and no request to another server."""
    with short_folder() as folder, Browser(folder) as page:
        page.look(1280, 900)
        page.open(f"{url}/ui")
        yield page
        others = [address for address in page.asked if not address.startswith((f"{url}/", "data:", "about:"))]
        assert not others, f"asked elsewhere: {others}"


def test_what_is_shown_is_what_metrics_say(tmp_path: Path) -> None:
    with deployed(write_config(tmp_path)) as (control, status), looking(status.url) as page:
        page.wait("document.getElementById('badge').textContent === '● READY'")
        with Load(status.url, 8) as load:
            page.wait("parseFloat(document.getElementById('tile-tokens').textContent) > 0")
            page.wait("document.querySelectorAll('.trace').length === 6 && document.querySelector('.trace').getAttribute('d').length > 60")
            right = next(row for row in status.models[0].replicas if row.name == "right")
            # While its host is stopped, nobody launches the gang again: the page has time to tell.
            os.kill(status.pid, signal.SIGSTOP)
            try:
                os.kill(right.pids[1][2], signal.SIGKILL)
                page.wait("document.getElementById('badge').textContent === '▲ DEGRADED'")
                assert page.value("document.getElementById('why').textContent").startswith("right is lost: ")
                assert cell(page, "right", "state") == "✕ lost" and cell(page, "fake", "ready") == "1 of 2"
            finally:
                os.kill(status.pid, signal.SIGCONT)
            wait_for_state(control, "READY", 60)
            page.wait("document.getElementById('badge').textContent === '● READY'")
            moved = page.wait("(/(\\d+) requests? moved · back after \\d+ s/.exec(document.getElementById('losses').innerText) || [])[1]")
            page.wait("document.querySelector('.mark').getAttribute('d').startsWith('M')")
            before = load.done
            page.wait("parseFloat(document.getElementById('tile-running').textContent) >= 6")
            deadline = time.monotonic() + 60
            while load.done < before + 24:
                assert time.monotonic() < deadline, "the load stands still"
                time.sleep(0.1)
            pictures(page)
        assert not load.failures, load.failures[0]
        assert int(moved) > 0, "the gang that died ran nothing"
        page.wait("document.querySelector('[data-name=right] [data-field=cause] .value').textContent.length > 3")
        compare(page, status.url)
        long_names(page)
        hostile_names(page)
        assert page.complaints == []


def pictures(page: Browser) -> None:
    """As a laptop and a phone show it, in both schemes; nothing is wider than its window."""
    for name, width, height, dark in (
        ("light", 1280, 720, False), ("dark", 1280, 720, True), ("tablet", 820, 1100, False), ("phone", 390, 844, False),
        ("phone-dark", 390, 844, True),
    ):  # fmt: skip
        page.look(width, height, dark=dark)
        at = page.value("document.body.dataset.time")
        page.wait(f"document.body.dataset.time > {at}")
        size = page.shoot(PICTURES / f"status-page-{name}.png")
        assert size < LARGEST, f"{name}: {size} bytes"
        assert fits(page), f"{name} is wider than its window"
    page.look(1280, 900)
    assert page.value("document.querySelectorAll('.cards').length") == 0, "usual names stand in tables on a laptop"
    page.press("Tab")
    assert page.value("document.activeElement.getAttribute('href')") == "#replicas", "the first stop leads past the tiles"
    unnamed = ":is([role=img], [role=group], table, section):not([aria-label], [aria-labelledby])"
    assert page.value(f'document.querySelectorAll("{unnamed}").length') == 0, "a screen reader has nothing to say"


def fits(page: Browser) -> bool:
    """Whether neither the page nor a table in it has to be scrolled sideways."""
    wide = "[document.documentElement, ...document.querySelectorAll('.sheet')].filter(box => box.scrollWidth > box.clientWidth).length"
    return bool(page.value(wide) == 0)


def long_names(page: Browser) -> None:
    """Names, causes and counts of a large deployment, on each window."""
    planted = """(() => { const data = structuredClone(shown[shown.length - 1].data);
        const name = 'nvidia/Llama-3_1-Nemotron-Ultra-253B-v1-FP8-long-context-experiment';
        data.models[0].name = name; data.models[0].generation_tokens = 123456789012; data.models[0].queue = 1234567;
        for (const one of data.replicas) {
            one.name = `${name.toLowerCase()}-${one.name}`; one.tok_s = 123456.7; one.reason = name.repeat(3);
        }
        for (const one of data.losses) { one.replica = name; one.reason = name.repeat(3); }
        show(data); })()"""
    for width, height in ((1280, 720), (1920, 1080), (820, 1100), (390, 844)):
        page.look(width, height)
        page.value(planted)
        assert fits(page), f"{width} px"
        page.shoot(PICTURES / f"status-page-long-{width}.png")


def hostile_names(page: Browser) -> None:
    """Names, reasons and codes are text, whatever stands in them."""
    name = "<img src=x onerror=alert(1)>'\"</script>"
    planted = f"""(() => {{ const name = {json.dumps(name)}, data = structuredClone(shown[shown.length - 1].data);
        data.router = data.verdict.why[0] = data.models[0].name = data.replicas[0].name = data.replicas[0].reason = name;
        data.models[0].errors = {{[name]: 1}}; data.losses[0].replica = data.losses[0].reason = name; show(data);
        return [document.querySelectorAll('img, script').length, document.body.innerText.split(name).length - 1]; }})()"""
    elements, shown = page.value(planted)
    assert elements == 1, "a name became an element"
    assert shown >= 6, "a name is not shown as it is"


def test_a_key_is_asked_for_and_stays_in_the_tab() -> None:
    with short_folder() as folder:
        ring = ApiKeyRing(folder / "api.json")
        admin, bound = ring.add("admin", ()), ring.add("bound", ("m",))
        http = HttpSpec(port=0, api_keys_file=str(folder / "api.json"))
        with RouterRun(folder, http=http) as router:
            url = router.wait_serving().http
            with looking(url) as page:
                # As a proxy on this host brings the request of somebody far away.
                page.call("Network.setExtraHTTPHeaders", headers=ELSEWHERE)
                page.open(f"{url}/ui")
                page.wait("!document.getElementById('sign-in').hidden && document.activeElement.id === 'key'")
                assert page.value("document.getElementById('main').hidden && document.getElementById('refusal').textContent === ''")
                for key, why in (("trireme-000000000000-wrong", "does not open"), (bound, "bound to some models")):
                    page.type(key)
                    page.press("Enter")
                    page.wait(f"document.getElementById('refusal').textContent.includes('{why}')")
                    assert page.value("sessionStorage.length") == 0, "a key that opens nothing is not kept"
                page.type(admin)
                page.press("Enter")
                page.wait("!document.getElementById('main').hidden && document.getElementById('badge').textContent === '◌ STARTING'")
                assert page.value("document.getElementById('sign-in').hidden && document.getElementById('key').value === ''")
                page.open(f"{url}/ui")
                page.wait("!document.getElementById('main').hidden")
                assert page.value("document.cookie + localStorage.length + location.href") == f"0{url}/ui", "the key is nowhere else"
                page.value("document.getElementById('forget').click()")
                page.wait("!document.getElementById('sign-in').hidden && sessionStorage.length === 0")
                assert all(re.search(r"40[14]|ERR_", complaint) for complaint in page.complaints), page.complaints


def test_a_router_that_is_gone_is_said_so_and_found_again() -> None:
    with short_folder() as folder, RouterRun(folder, http=True) as router:
        state = router.wait_serving()
        port = int(state.http.rpartition(":")[2])
        with looking(state.http) as page:
            page.wait("document.getElementById('badge').textContent === '◌ STARTING'")
            router.kill()
            page.wait("document.getElementById('badge').textContent === '■ NO ANSWER' && document.body.classList.contains('stale')")
            with RouterRun(folder, "router1", http=HttpSpec(port=port)) as other:
                other.wait_serving()
                page.wait("document.getElementById('badge').textContent === '◌ STARTING'")
                page.wait("document.getElementById('who').textContent.startsWith('router1') && !document.body.classList.contains('stale')")
                assert "also led to router0" in page.value("document.getElementById('note').textContent")
