"""Standing routers and two jobs made of one file: a hand-over under constant load, the routers' own restart, a pass that is taken back."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import yaml

from orchestrator.auth.keyring import KeyRing
from orchestrator.client import Client, ClientKeys
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, connect
from orchestrator.files import make_private
from tests.e2e.load import ASKERS, Load, expected
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from tests.support.gang import wait_for
from tests.support.ports import free_ports
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

FRONT = "front"
BOUND_S = 60.0
LONG, LONG_PROMPT = 1900, list(b"long")


def command(*line: str, run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "trireme", *line, "--run-dir", str(run_dir)]


def trireme(*line: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*line, run_dir=run_dir), capture_output=True, text=True, timeout=120, check=False)


class Front:
    """``trireme router`` on ports that stay; started and killed as a test wants it."""

    def __init__(self, folder: Path) -> None:
        first = free_ports(3)
        self.folder, self.run_dir, self.file = folder, folder / "front", folder / "front.yaml"
        self.home = self.run_dir / FRONT
        self.file.write_text(
            yaml.safe_dump(
                {
                    "name": FRONT,
                    "http": {"host": "127.0.0.1", "port": first},
                    "rpc": {"host": "127.0.0.1", "port": first + 1},
                    "back": {"host": "127.0.0.1", "port": first + 2},
                    "models": [{"name": MODEL, "path": str(folder / "tokenizer")}],
                }
            )
        )
        make_private(self.run_dir)
        make_private(self.home)
        self.keys = KeyRing(self.home / "keys")
        self.control = connect(FRONT, self.run_dir)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> DeploymentStatus:
        with open(self.folder / "front.log", "ab") as log:
            self.process = subprocess.Popen(command("router", str(self.file), run_dir=self.run_dir), stdout=log, stderr=log)
        return wait_for_state(self.control, "READY", BOUND_S, self.process)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(BOUND_S)
        finally:
            self.process.kill()

    def rows(self, url: str) -> dict[str, dict[str, Any]]:
        """Replicas in the router's eyes, by name."""
        try:
            return {row["name"]: row for row in httpx.get(f"{url}/status", trust_env=False).json()["replicas"]}
        except httpx.TransportError:
            return {}


@contextmanager
def job(front: Front, which: str, key: Path) -> Iterator[tuple[ControlClient, DeploymentStatus]]:
    """``trireme up`` of the one job file in a run folder of its own; SIGTERM at the end must exit 0."""
    folder = front.folder / which
    folder.mkdir()
    settings = {"JOIN_FILE": str(front.home / "join.json"), "JOIN_KEY_FILE": str(key)}
    with deployed(front.folder / "deployment.yaml", folder=folder, settings=settings, ready_s=BOUND_S) as made:
        yield made


def refused(front: Front, which: str, key: Path) -> str:
    """What a job says that must not start."""
    line = ("up", str(front.folder / "deployment.yaml"), "--join-file", str(front.home / "join.json"), "--join-key-file", str(key))
    ended = trireme(*line, run_dir=front.folder / which)
    assert ended.returncode == 3, ended.stderr
    return ended.stderr


class LongAnswer:
    """One answer that goes on as long as the test needs: it begins at the only replica there is, so that one must hand it over."""

    def __init__(self, status: DeploymentStatus, keys: ClientKeys) -> None:
        self.tokens: list[int] = []
        self._client = Client(status.rpc, model=MODEL, keys=keys)
        self._call = self._client.complete(LONG_PROMPT, max_tokens=LONG, temperature=0.0, ignore_eos=True, texts=False)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for piece in self._call.stream():
            if piece.first != len(self.tokens):
                return  # a gap or a repeat: it comes to nothing
            self.tokens += piece.tokens
            if self._enough.is_set():
                return

    def close(self) -> None:
        self._enough.set()
        self._thread.join(BOUND_S)
        self._call.cancel()
        self._client.close()


def hand_over(front: Front, key: Path) -> None:
    """The old job serves, the new one joins, the old one drains, all under load. What follows needs the new one alone."""
    with ExitStack() as new:
        with ExitStack() as old:
            _, before = old.enter_context(job(front, "old", key))
            keys = msgspec.json.decode(Path(before.key_file).read_bytes(), type=ClientKeys)
            load = Load(before.url, before.rpc, keys)
            long = LongAnswer(before, keys)

            def change() -> ControlClient:
                wait_for(lambda: load.answered >= ASKERS and long.tokens, BOUND_S, "the load")
                control, _ = new.enter_context(job(front, "new", key))
                names = [name for name, row in front.rows(before.url).items() if row["state"] == "ready"]
                assert len(names) == 2 and all(name.startswith("slurm/e2e-") and name.endswith("/only") for name in names)
                wait_for(lambda: front.control.status().models[0].ready == 2, BOUND_S, "both in the front's table")
                assert len(long.tokens) < LONG, "the long answer was too short to be handed over"
                old.close()
                answered, got = load.answered, len(long.tokens)
                wait_for(lambda: load.answered >= answered + 2 * ASKERS, BOUND_S, "answers of the new job alone")
                wait_for(lambda: len(long.tokens) > min(got, LONG - 1), BOUND_S, "more of the long answer")
                return control

            try:
                control = asyncio.run(load.during(change))
            finally:
                long.close()
        oracle = expected_tokens(LONG_PROMPT, SamplingParams(max_tokens=LONG, temperature=0.0))
        assert long.tokens == oracle[: len(long.tokens)]
        found = httpx.get(f"{before.url}/status", trust_env=False).json()
        counts = found["counts"]
        assert counts["failed"] == counts["gaps"] == 0
        assert counts["resubmitted"] > 0, "nothing was handed over in the middle"
        assert sorted(row["state"] for row in found["replicas"]) == ["lost", "ready"]
        restart(front, control, keys)
        take_back(front)


def restart(front: Front, control: ControlClient, keys: ClientKeys) -> None:
    """Killed with all that it started, and started again: the replicas come back by themselves, as they were."""
    before = wait_for_state(control, "READY", BOUND_S)
    assert front.end(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: control.status().state == "DEGRADED", BOUND_S, "a job that nobody serves")
    assert control.status().models[0].replicas[0].state == "JOINING"
    front.start()
    after = wait_for_state(control, "READY", BOUND_S)
    assert [row.epoch for row in after.models[0].replicas] == [row.epoch for row in before.models[0].replicas], "it was launched again"
    with Client(after.rpc, model=MODEL, keys=keys) as client:
        reply = client.complete("again", max_tokens=60, temperature=0.0, ignore_eos=True).result()
        assert reply.choices[0].text == expected("again")


def take_back(front: Front) -> None:
    """Routers drop the replicas of a pass that is gone."""
    front.keys.remove_pass("slurm")
    wait_for(lambda: front.control.status().models[0].ready == 0, BOUND_S, "the end of the pass")


def test_a_hand_over_that_no_client_sees() -> None:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as place:
        folder = Path(place)
        write_config(folder, deployment={"drain_grace_s": 0.5}, replicas=[{"name": "only"}], max_batch_size=24)
        front = Front(folder)
        key = front.keys.admit_replicas("slurm", [MODEL])
        try:
            status = front.start()
            assert status.models[0].state == "DEGRADED"
            assert httpx.get(f"{status.url}/ready", trust_env=False).status_code == 503
            kept = Path(shutil.copy(key, folder / "kept.json"))
            hand_over(front, key)
            assert "does not know this key" in refused(front, "late", kept)
        except BaseException:
            print((folder / "front.log").read_text())
            front.end(signal.SIGKILL)
            raise
        assert front.end(signal.SIGTERM) == 0
