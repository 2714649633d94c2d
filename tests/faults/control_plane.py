"""F10, F11 on three raylets, inside a network namespace: ``python -m tests.faults.control_plane FOLDER``.

GCS keeps its tables in ``RAY_gcs_storage_path``, as a cluster must whose head may restart. Steps as :mod:`tests.faults.namespace` has them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, ReplicaRow, connect
from orchestrator.control.launch.subprocesses import alive, tagged
from tests.faults.namespace import measured, step
from tests.faults.streams import Case, counts, run_all
from tests.support.deployment import write_config
from workers.engines.fake import expected_tokens
from workers.protocol.errors import NotFound
from workers.protocol.messages import SamplingParams

BOUND_S = 120.0
#: How long GCS is away, seconds; Ray's default limit on it.
AWAY_S, LIMIT_S = 10.0, 60.0
#: Tokens of 20 ms: longer than GCS is away.
OUTPUT = 1000


def until(what: str, condition: Callable[[], object], bound_s: float = BOUND_S) -> float:
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > bound_s:
            raise TimeoutError(f"not within {bound_s} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - begin


class Daemon(msgspec.Struct, frozen=True):
    """One of Ray's own processes, and how it was started."""

    pid: int
    argv: list[str]
    env: dict[str, str]

    def start(self) -> int:
        """Another one like it."""
        return subprocess.Popen(self.argv, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True).pid


def daemon(program: str, argument: str = "") -> Daemon:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = Path("/proc", entry, "cmdline").read_bytes().decode().split("\0")[:-1]
            env = Path("/proc", entry, "environ").read_bytes().decode().split("\0")[:-1]
        except OSError:
            continue
        if argv and argv[0].endswith(program) and any(argument in word for word in argv) and alive(int(entry)):
            return Daemon(int(entry), argv, dict(pair.split("=", 1) for pair in env))
    raise LookupError(f"no {program} {argument}")


def rows(status: DeploymentStatus) -> dict[str, ReplicaRow]:
    return {row.name: row for model in status.models for row in model.replicas}


def epochs(status: DeploymentStatus) -> dict[str, int]:
    return {name: row.epoch for name, row in rows(status).items()}


@contextmanager
def up(file: Path) -> Iterator[tuple[subprocess.Popen[bytes], ControlClient]]:
    """The host process, READY; killed at the end if it lives."""
    log = file.with_suffix(".log")
    with open(log, "ab") as output:
        host = subprocess.Popen([sys.executable, "-m", "trireme", "up", str(file)], stdout=output, stderr=output)
    control = connect("e2e", file.parent / "run")

    def ready() -> bool:
        if host.poll() is not None:
            raise ChildProcessError(f"the host ended with {host.returncode}")
        try:
            return control.status().state == "READY"
        except NotFound:  # not yet, or the socket is a dead host's
            return False

    try:
        until("READY", ready)
        yield host, control
    except BaseException:
        print(log.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        if host.poll() is None:
            host.kill()
        host.wait()


def cases(output: int) -> list[Case]:
    body = {"max_tokens": output, "temperature": 0.0, "ignore_eos": True}
    return [Case(prompt=f"stream {i}", body=body, door=("http", "rpc")[i % 2]) for i in range(12)]


def exactly(control: ControlClient, output: int, disturb: Callable[[], float]) -> tuple[float, float]:
    """Streams of ``output`` tokens around a disturbance: (what it measured, the longest pause of a client in its first 5 s). All exact."""
    status = control.status()
    before = asyncio.run(counts(status))
    begun: list[float] = []

    def noted() -> float:
        begun.append(time.monotonic())
        return disturb()

    run = asyncio.run(run_all(status, cases(output), noted, enough=120))
    for case, (choice,) in zip(cases(output), run.answers, strict=True):
        want = expected_tokens(case.prompt.encode(), SamplingParams(max_tokens=output, temperature=0.0))
        assert (choice.tokens, choice.reason) == (want, "length"), case.prompt
    assert asyncio.run(counts(status))["failed"] == before["failed"]
    return run.verdict, run.arrivals.pause(begun[0], begun[0] + 5.0)


def gcs_restarts(control: ControlClient) -> None:
    before = epochs(control.status())
    gcs = daemon("gcs_server")

    def outage() -> float:
        os.kill(gcs.pid, signal.SIGKILL)
        gone = time.monotonic()
        # The length of the fault itself, not a wait for anything.
        time.sleep(AWAY_S)
        gcs.start()
        return gone

    _, pause = exactly(control, OUTPUT, outage)
    measured(f"F10 GCS away for {AWAY_S:g} s: longest pause at a client", pause, 1.0)
    assert epochs(control.status()) == before, "a gang was touched"
    step("streams finish without GCS", sorted(before))
    control.drain("left")
    took = until("a replica is replaced", lambda: (s := control.status()).state == "READY" and rows(s)["left"].epoch > before["left"])
    measured("F10 GCS is back: drain -> replica replaced", took, 20.0)
    assert rows(control.status())["right"].epoch == before["right"]
    step("the control plane works again")


def raylet_dies(control: ControlClient) -> None:
    status = control.status()
    victim = next(row for row in rows(status).values() if row.hosts != ("127.0.0.1",))
    pids = [pid for _, _, pid in victim.pids]
    tag = f"{status.name}/{victim.name}/{victim.epoch}"
    raylet = daemon("/raylet", f"--node_ip_address={victim.hosts[0]}")

    def kill() -> float:
        begun = time.monotonic()
        os.kill(raylet.pid, signal.SIGKILL)
        until("its ranks are gone", lambda: not any(map(alive, pids)) and not tagged(tag), 30.0)
        return time.monotonic() - begun

    begun = time.monotonic()
    gone, pause = exactly(control, 400, kill)
    measured("F10 raylet killed -> its ranks are gone", gone, 5.0)
    measured("F10 raylet killed -> next token at the client", pause, 1.0)
    until("placed again", lambda: (s := control.status()).state == "READY" and rows(s)[victim.name].epoch > victim.epoch)
    measured("F10 raylet killed -> replica placed again on another node", time.monotonic() - begun, 30.0)
    again = rows(control.status())
    assert again[victim.name].hosts != victim.hosts, "placed on a dead node"
    assert all(row.epoch == again[name].epoch for name, row in rows(status).items() if name != victim.name), "another gang was touched"
    step("a raylet's death moves its gang", [victim.hosts, again[victim.name].hosts, again[victim.name].cause])


def host_dies(file: Path, host: subprocess.Popen[bytes], control: ControlClient) -> None:
    before = control.status()
    pids = [pid for row in rows(before).values() for _, _, pid in row.pids]
    host.kill()
    host.wait()
    until("routers end with their host", lambda: not any(map(alive, before.routers.values())), 10.0)
    assert all(map(alive, pids)), "a gang ended with the host"
    begun = time.monotonic()
    with up(file) as (again, control):
        assert epochs(control.status()) == epochs(before), "a gang was replaced"
        measured("F11 host killed and started again -> every gang adopted", time.monotonic() - begun, 15.0)
        exactly(control, 50, lambda: 0.0)
        step("a new host adopts the gangs", epochs(before))
        gcs_stays_away(control)
        until("the host ends with Ray", lambda: again.poll() is not None)
        step("the host ends when Ray gives up", again.returncode)


def gcs_stays_away(control: ControlClient) -> None:
    """How long raylets wait for GCS: Ray's ``gcs_rpc_server_reconnect_timeout_s``. Until then answers go on."""
    raylets = [daemon("/raylet", f"--node_ip_address={host}").pid for row in rows(control.status()).values() for host in row.hosts]
    os.kill(daemon("gcs_server").pid, signal.SIGKILL)
    begun = time.monotonic()
    while time.monotonic() < begun + LIMIT_S / 2:
        exactly(control, 100, lambda: 0.0)
    assert all(map(alive, raylets))
    until("the raylets give up", lambda: not any(map(alive, raylets)), 3 * LIMIT_S)
    measured("F10 GCS gone -> raylets give up (Ray's reconnect limit)", time.monotonic() - begun, 1.1 * LIMIT_S)
    step("the reconnect limit")


def main(folder: Path) -> None:
    deployment = {"launcher": "ray", "ray": {"address": "127.0.0.1:6379"}, "drain_grace_s": 5, "replica_timeout_s": 1.0}
    # Four shares a gang and four a node: every gang has a node of its own, and one node is left.
    file = write_config(folder, deployment=deployment, cpus_per_rank=2, max_batch_size=16, kv_tokens=65536)
    with up(file) as (host, control):
        step("two gangs on three nodes", [row.hosts for row in rows(control.status()).values()])
        gcs_restarts(control)
        raylet_dies(control)
        host_dies(file, host, control)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
