"""The shipped rules by promtool, and a real Prometheus over a real deployment: two routers, load, a replica killed, no empty panel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.control.host.control_socket import DeploymentStatus
from tests.operators.prometheus import ROOT, SHIPPED, Prometheus, free_ports, scraping, tool
from tests.support.deployment import MODEL, deployed, write_config
from tests.support.gang import short_folder, wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CLIENTS = 12
PROMPT = "The same beginning for everyone, so that a prefix cache has something to find: "


@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("check", "rules", "*.rules.yml"), ("test", "rules", "trireme.test.yml")]
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    *words, pattern = command
    files = sorted(str(path.name) for path in SHIPPED.glob(pattern))
    assert files
    ran = subprocess.run([tool("promtool"), *words, *files], cwd=SHIPPED, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


class Load:
    """Clients that ask without a pause, until they are ordered to end. ``tokens``: of the answers that came whole."""

    def __init__(self, url: str) -> None:
        self._url, self._stop, self._lock = url, threading.Event(), threading.Lock()
        self.answers = self.tokens = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(index,), daemon=True) for index in range(CLIENTS)]

    def _ask(self, index: int) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60) as http:
            turn = 0
            while not self._stop.is_set():
                turn += 1
                prompt, choices = f"{PROMPT}{index} {turn}", 1 + index % 2
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 20 + index, "ignore_eos": True, "n": choices}
                answer = http.post("/v1/completions", json=body)
                with self._lock:
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                        continue
                    self.answers += choices
                    self.tokens += answer.json()["usage"]["completion_tokens"]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in self._threads)


def panels() -> list[tuple[str, str]]:
    board: dict[str, Any] = json.loads((ROOT / "deploy/grafana/trireme.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    filled = {"$model": ".*", "$__rate_interval": "1m", "$__range": "1h"}
    for name, value in filled.items():
        found = [(title, expr.replace(name, value)) for title, expr in found]
    assert not [expr for _, expr in found if "$" in expr]
    return found


def kill_a_rank(status: DeploymentStatus) -> None:
    row = next(row for model in status.models for row in model.replicas if row.name == "left")
    os.kill(next(pid for rank, _, pid in row.pids if rank == 1), signal.SIGKILL)


def check_panels(prometheus: Prometheus) -> None:
    empty = [f"{title}: {expr}" for title, expr in panels() if not prometheus.values(expr)]
    assert not empty, "\n".join(empty)


def check_rules(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    sick = [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"]
    assert len(rules) > 50 and not sick, sick
    silent = {rule["name"] for rule in rules if rule["type"] == "recording" and not prometheus.values(rule["name"])}
    assert not silent, f"recorded nothing: {silent}"


def scraped_tokens(ports: list[int]) -> float:
    """As the routers themselves say it."""
    texts = [httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10).text for port in ports]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("trireme_generation_tokens_total{")]
    return sum(float(line.split()[-1]) for line in lines)


def test_no_panel_is_empty_and_no_number_differs(tmp_path: Path) -> None:
    http, *ports = free_ports(3)
    wanted = {"http": {"host": "127.0.0.1", "port": http}, "metrics": {"port": ports[0]}, "routers": 2}
    with (
        short_folder() as folder,
        deployed(write_config(folder, deployment=wanted)) as (_, status),
        scraping(tmp_path, [f"127.0.0.1:{port}" for port in ports]) as prometheus,
    ):
        wait_for(lambda: prometheus.one('sum(up{job="trireme"})') == 2, 30.0, "a scrape of both routers")
        assert httpx.post(f"{status.url}/v1/completions", json={"model": MODEL}, trust_env=False).status_code == 400
        load = Load(status.url)
        with load.running():
            wait_for(lambda: load.answers > CLIENTS, 60.0, "answers")
            wait_for(lambda: prometheus.one("sum(vllm:num_requests_running)") > 0, 30.0, "sequences in Prometheus")
            kill_a_rank(status)
            resumed = 'sum(trireme_router_failovers_total{outcome="resumed"})'
            wait_for(lambda: prometheus.one(resumed) > 0, 60.0, "a failover in Prometheus")
            back = 'min(max by (state, instance) (trireme_replicas{state="ready"}))'
            wait_for(lambda: prometheus.one(back) == 2, 60.0, "the replica's successor")
            alert = 'ALERTS{alertname="TriremeReplicaLost", alertstate="firing"}'
            wait_for(lambda: prometheus.one(alert) == 1, 30.0, "the alert")
            mean = "sum(rate(trireme_iteration_tokens_total_count[1m]) > bool 0)"
            wait_for(lambda: prometheus.one(mean) >= 4, 60.0, "both replicas at work, as both routers see them")
            check_panels(prometheus)
            check_rules(prometheus)
        assert not load.failures, load.failures[:3]
        assert scraped_tokens(ports) == load.tokens
        wait_for(lambda: prometheus.one("sum(vllm:generation_tokens_total)") == load.tokens, 30.0, "the last tokens in Prometheus")
        wait_for(lambda: prometheus.one("sum(vllm:request_success_total)") == load.answers, 30.0, "the last answers in Prometheus")
        assert prometheus.one('sum(trireme_router_failovers_total{outcome="failed"})') == 0
