"""A real Prometheus over the shipped configuration, on loopback, in a folder of its own.

Owns the process that it starts. Where there is no Prometheus on the path, `make test-operators` has put one under ``build``.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.gang import wait_for

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy/prometheus"


def tool(name: str) -> str:
    """Where ``prometheus`` or ``promtool`` is."""
    fetched = ROOT / "build/prometheus/usr/bin" / name
    found = str(fetched) if fetched.exists() else shutil.which(name)
    assert found, f"no {name}: make test-operators fetches it"
    return found


def free_ports(count: int) -> list[int]:
    """Ports of loopback that follow one another and that nobody had a moment ago."""
    for _ in range(100):
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            base = int(first.getsockname()[1])
            try:
                for port in range(base + 1, base + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(base, base + count))
    raise AssertionError("no free ports")


class Prometheus:
    """Asks one."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=20)

    def ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str, **params: str) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """What a query finds now, but for what is no number."""
        found = [float(row["value"][1]) for row in self.get("query", query=query)["result"]]
        return [value for value in found if math.isfinite(value)]

    def one(self, query: str) -> float:
        return next(iter(self.values(query)), math.nan)

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def scraping(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """The shipped configuration with these targets, every second."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(SHIPPED / file) for file in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": targets}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        tool("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    log = folder / "prometheus.log"
    asked = Prometheus(f"http://127.0.0.1:{port}")
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(asked.ready, 60.0, "Prometheus")
        yield asked
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        asked.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
