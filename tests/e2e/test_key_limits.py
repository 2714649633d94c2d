"""One API key at two routers: they keep its limits together, and operators see what it used."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx

from orchestrator.auth.api_keys import KeyLimits, KeyTerms
from orchestrator.auth.keyring import ApiKeyRing
from tests.support.deployment import MODEL, deployed, write_config
from tests.support.ports import free_ports

RPM = 20
BODY = {"model": MODEL, "prompt": list(b"hello"), "max_tokens": 15, "ignore_eos": True}


async def ask(url: str, key: str) -> tuple[str, int, dict[str, str]]:
    """(router, status, headers): a connection each, so that the kernel deals the requests to both routers."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, headers={"authorization": f"Bearer {key}"}) as http:
        answer = await http.post("/v1/completions", json=BODY)
        seen = await http.get("/status")
        return seen.json()["router"], answer.status_code, dict(answer.headers)


async def steadily(url: str, key: str, count: int, pause_s: float) -> list[tuple[str, int, dict[str, str]]]:
    asked = []
    for _ in range(count):
        asked.append(asyncio.create_task(ask(url, key)))
        await asyncio.sleep(pause_s)
    return list(await asyncio.gather(*asked))


def test_two_routers_keep_one_limit_together() -> None:
    """Within a few seconds 1.5 times the limit is asked for. Each router alone would let through all that comes to it."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        ring = ApiKeyRing(folder / "api.json")
        key = ring.add("alice", (), KeyTerms(limits=KeyLimits(rpm=RPM)))
        port = free_ports(1)
        http = {"host": "127.0.0.1", "port": port, "api_keys_file": str(ring.path)}
        file = write_config(folder, deployment={"http": http, "routers": 2}, fake_step_ms=5)
        with deployed(file):
            answers = asyncio.run(steadily(f"http://127.0.0.1:{port}", key, RPM * 3 // 2, 0.2))
            assert len({router for router, _, _ in answers}) == 2, "both routers were asked"
            codes = Counter(code for _, code, _ in answers)
            # What the other router let through since its last heartbeat may come on top.
            assert set(codes) == {200, 429} and RPM <= codes[200] <= 1.1 * RPM + 2, codes
            assert all("retry-after" in headers for _, code, headers in answers if code == 429)
            command = [sys.executable, "-m", "trireme", "keys", "usage", "--run-dir", str(folder / "run")]
            (row,) = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[1:]
            admitted, refused = codes[200], codes[429]
            assert row.split()[1:7] == ["alice", *map(str, (admitted, refused, 5 * admitted, 15 * admitted, 0))]
            reports = json.loads(subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=60, check=True).stdout)
            assert len(reports) == 2 and sum(one["requests"] for report in reports for one in report["keys"]) == admitted
