"""F15, in a mount namespace: ``python -m tests.faults.full_disk FOLDER``; the run folder is a tmpfs of 1 MiB that fills up and is emptied.

Steps as :mod:`tests.faults.namespace` has them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, ReplicaRow, connect
from tests.faults.namespace import measured, step
from tests.support.deployment import MODEL, write_config
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

BOUND_S = 120.0
SIZE = 1 << 20


def until(what: str, condition: Callable[[], object], bound_s: float = BOUND_S) -> float:
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > bound_s:
            raise TimeoutError(f"not within {bound_s} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - begin


class Disk:
    """The tmpfs, and the file that takes what is left of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "tmpfs", str(folder)], check=True)
        self._filler = folder / "filler"

    def fill(self) -> None:
        with open(self._filler, "ab", buffering=0) as out:
            for size in (4096, 1):
                try:
                    while out.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def empty(self) -> None:
        self._filler.unlink()


def replica(status: DeploymentStatus, name: str) -> ReplicaRow:
    return next(row for model in status.models for row in model.replicas if row.name == name)


def ask(control: ControlClient, prompt: str) -> None:
    """An answer that must be exact."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    answer = httpx.post(f"{control.status().url}/v1/completions", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    want = expected_tokens(prompt.encode(), SamplingParams(max_tokens=40, temperature=0.0))
    assert answer.json()["choices"][0]["text"] == bytes(want).decode()


def serve(disk: Disk, file: Path) -> None:
    log = file.with_suffix(".log")
    with open(log, "wb") as output:
        host = subprocess.Popen([sys.executable, "-m", "trireme", "up", str(file)], stdout=output, stderr=output)
    control = connect("e2e", file.parent / "run")
    try:
        until("serving", lambda: host.poll() is None and file.exists() and (file.parent / "run/e2e/control.sock").exists())
        until("READY", lambda: control.status().state == "READY")
        first = control.status()
        disk.fill()
        for index in range(20):
            ask(control, f"full {index}")
        step("serving goes on")

        os.kill(replica(first, "left").pids[0][2], signal.SIGKILL)
        until("the loss is told", lambda: "No space left" in (row := replica(control.status(), "left")).cause and row.state == "BACKOFF")
        for index in range(20):
            ask(control, f"one left {index}")
        step("a replica that cannot start says why", replica(control.status(), "left").cause)

        (router,) = first.routers.values()
        os.kill(router, signal.SIGKILL)
        tried: set[tuple[int, ...]] = set()

        def tried_often() -> bool:
            disk.fill()  # what a dead router's files gave back
            tried.add(tuple(control.status().routers.values()))
            return len(tried) > 2

        until("it is tried again", tried_often)
        assert host.poll() is None, "the host ended"
        step("a router that cannot start does not end the others")

        disk.empty()
        measured("F15 room again -> all whole (back-off included)", until("whole again", lambda: control.status().state == "READY"), 40.0)
        ask(control, "whole again")
        disk.fill()
        ask(control, "full again")
        host.send_signal(signal.SIGTERM)
        assert host.wait(BOUND_S) == 0, log.read_text()
        warnings = sum("No space left" in line for line in log.read_text().splitlines())
        assert warnings < 40, f"{warnings} lines about one full disk"
        step("a full disk is no reason not to end well", warnings)
    except BaseException:
        print(log.read_text(), file=sys.stderr)
        host.kill()
        host.wait()
        raise
    disk.empty()


def refuse(disk: Disk, file: Path) -> None:
    disk.fill()
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "trireme", "up", str(file)], capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert ended.returncode == 4 and "No space left on device" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    measured("F15 start on a full disk -> refused", time.monotonic() - begin, 5.0)
    step("a start says ENOSPC", ended.stderr.splitlines())


def main(folder: Path) -> None:
    file = write_config(folder, replicas=[{"name": "left"}, {"name": "right"}], deployment={"drain_grace_s": 5})
    disk = Disk(folder / "run")
    serve(disk, file)
    refuse(disk, write_config(folder / "second", deployment={"run_dir": str(folder / "run"), "name": "late"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
