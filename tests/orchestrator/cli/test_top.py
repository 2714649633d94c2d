"""`trireme top`: rates from two looks, one snapshot without a terminal, and a terminal left as it was."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.top import Meter, frame, plain
from orchestrator.control.host.control_socket import ControlReply, ControlServer, DeploymentStatus, ModelRow, ReplicaRow
from tests.support.gang import short_folder
from workers.protocol.messages import Capacity

CAPACITY = Capacity(block_size=16, num_blocks=100, max_batch_size=16, max_num_tokens=256, max_seq_len=512, vocab_size=320, tp=2, pp=1)


def status(admitted: int = 0, *, state: str = "READY") -> DeploymentStatus:
    here = os.uname().nodename
    left = ReplicaRow(
        name="left", model="m", state="READY", age_s=200, tp=2, pp=1, running=3, queue=1, tok_s=40.0, kv_use=0.25, capacity=CAPACITY,
        pids=((0, here, os.getpid()), (1, "node9", 4711)),
    )  # fmt: skip
    right = ReplicaRow(
        name="right", model="m", state="BACKOFF", age_s=3, tp=2, pp=1, restarts=2, cause="rank 1 (pid 7) was killed by SIGKILL"
    )
    model = ModelRow(
        name="m", state="DEGRADED", age_s=200, wanted=2, ready=1, tp=(2,), pp=(1,), queue=5, tok_s=40.0, nodes=1, replicas=(left, right),
        admitted=admitted,
    )  # fmt: skip
    return DeploymentStatus(
        name="d", state=state, age_s=7200, pid=1, launcher="local", url="http://127.0.0.1:8000", models=(model,), routers={}, rpc=(),
        run_dir="/run/d",
    )  # type: ignore[arg-type]  # fmt: skip


def test_rates_are_of_the_time_between_two_looks() -> None:
    meter = Meter()
    one = status(100)
    meter.look([one], 10.0)
    assert meter.rate(one, one.models[0]) == 0.0
    meter.look([status(130)], 12.0)
    assert meter.rate(one, one.models[0]) == 15.0
    meter.look([status(5)], 13.0)
    assert meter.rate(one, one.models[0]) == 0.0, "another router process, which began again"


def test_a_snapshot_says_all() -> None:
    shown = plain(frame([status()], Meter(), None))
    head, models, replicas, ranks = shown.split("\n\n")
    assert head.split()[:7] == ["READY", "d:", "1", "of", "2", "replicas", "ready,"] and "queue 5" in head and "up 2h" in head
    assert models.splitlines()[1].split() == ["d/m", "DEGRADED", "1/2", "0.0", "40.0", "3", "5", "25.0", "%"]
    assert "SIGKILL" in replicas and "2 (tp 2 pp 1)" in replicas and "25.0 %" in replicas
    own, other = ranks.splitlines()[1:]
    assert own.split()[-1] in ("MB", "GB") and own.split()[3] == str(os.getpid())
    assert other.split() == ["d/left", "1", "node9", "4711", "-", "-"], "nothing is said of a process of another host"
    assert "PID" not in plain(frame([status()], Meter(), False))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A control socket that answers for a deployment which admits ten requests between two looks."""
    with short_folder() as folder:
        looks = iter(range(0, 1_000_000, 10))
        (folder / "d").mkdir()
        server = ControlServer(folder / "d" / "control.sock", lambda order: ControlReply(status=status(next(looks))))
        yield folder
        server.close()


def command(run_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "trireme", "top", *flags, "--run-dir", str(run_dir)]


def test_without_a_terminal_it_is_one_snapshot(run_dir: Path) -> None:
    ran = subprocess.run(command(run_dir), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0 and "\x1b" not in ran.stdout, ran.stderr
    rate = float(ran.stdout.split("\n\n")[1].splitlines()[1].split()[3])
    assert 0 < rate <= 10, "ten requests in a second or more"
    none = subprocess.run([*command(run_dir / "none"), "--once"], capture_output=True, text=True, timeout=60, check=False)
    assert none.returncode == 2 and "no deployment runs" in none.stderr


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_it_draws_until_q(run_dir: Path, colour: bool) -> None:
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(
        command(run_dir, "--every", "0.2"), stdin=theirs, stdout=theirs, stderr=theirs, env=env | ({} if colour else {"NO_COLOR": "1"})
    )
    os.close(theirs)
    try:
        drawn = read(ours, "tok/s", "SIGKILL", "req/s", frames=3)
        os.write(ours, b"q")
        rest = read(ours, until_end=True)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
    assert "\x1b[?1049h" in drawn and "\x1b[?1049l" in drawn + rest, "the screen is as it was"
    assert ("\x1b[33m" in drawn or "\x1b[31m" in drawn) == colour


def read(terminal: int, *words: str, frames: int = 0, until_end: bool = False) -> str:
    """What is drawn until all ``words`` stand there and ``frames`` frames were drawn, or the other side is gone; bounded."""
    said = ""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:
            return said
        if not part:
            return said
        said += part.decode(errors="replace")
        if not until_end and all(word in said for word in words) and said.count("REPLICA") >= frames:
            return said
    raise AssertionError(f"not drawn: {said!r}")
