"""What is done to a real Ray cluster of three nodes, one line of JSON a step: ``{"step", "seconds", "detail"}``; a step that fails raises.

Run by ``test_ray.py`` inside the namespace of ``three_nodes.sh``: ``python scenario.py RUN_DIR``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import ray

from orchestrator.config.deployment_file import load
from orchestrator.control.host.deployment import Deployment
from orchestrator.control.launch import ray_cluster
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.subprocesses import TAG, alive
from orchestrator.control.ray_controller import RemoteController
from orchestrator.control.reconciler import ReplicaView, RestartPolicy
from tests.reference.engine import request, serve
from tests.support.tiny_models import tiny_model
from workers.engines.portable import PortableFollower, build
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import FakeSpec, Parallel, PortableSpec, ReplicaSpec, TrtllmSpec

#: Generous: on a busy machine Ray takes ten times as long to start a worker as on an idle one.
BOUND_S = 300.0
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]
ADDRESS = "127.0.0.1:6379"


def until(what: str, condition: Callable[[], Any], bound_s: float = BOUND_S) -> Any:
    deadline = time.monotonic() + bound_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"not within {bound_s} s: {what}")


def say(step: str, begun: float, detail: object = "") -> None:
    print(json.dumps({"step": step, "seconds": round(time.monotonic() - begun, 2), "detail": detail}), flush=True)


def tell(deployment: Deployment, run_dir: Path) -> None:
    """What a person would look at when a deployment does not get ready: its table and the ends of its logs."""
    print(msgspec.json.encode(deployment.status()).decode(), file=sys.stderr)
    for log in sorted(run_dir.rglob("*.log")):
        print(f"--- {log.relative_to(run_dir)}\n{log.read_text(errors='replace')[-800:]}", file=sys.stderr)


class Fleet:
    """Gangs under a controller actor, without routers."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.policy = RestartPolicy(drain_grace_s=5.0, backoff_s=0.1)
        self.controller = RemoteController("fleet", run_dir / "target.json", self.policy)

    def spec(self, name: str, parallel: Parallel, *, spread: bool = False) -> GangSpec:
        engine = FakeSpec(kv_tokens=1024, max_seq_len=256)
        replica = ReplicaSpec(name=name, model="fake", artifact=str(self.run_dir), parallel=parallel, engine=engine)
        return GangSpec(deployment="fleet", replica=replica, run_dir=str(self.run_dir / "gangs"), spread=spread)

    def views(self) -> dict[str, ReplicaView]:
        self.controller.tick()
        return {view.name: view for view in self.controller.views()}

    def pid(self) -> int:
        """The controller's process, by the title that Ray gives to an actor's worker; 0 while there is none."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                title = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::ControllerActor") and alive(int(entry)):
                return int(entry)
        return 0

    def ready(self, name: str, *, after: int = 0) -> ReplicaView:
        def check() -> ReplicaView | None:
            view = self.views().get(name)
            return view if view is not None and view.phase == "ready" and view.epoch > after else None

        try:
            view: ReplicaView = until(f"{name} ready", check)
        except TimeoutError:
            print(self.views(), file=sys.stderr)
            raise
        return view


def pids(view: ReplicaView) -> list[int]:
    assert view.gang is not None
    return [pid for _, _, pid in view.gang.pids]


def gone(view: ReplicaView) -> bool:
    return not any(map(alive, pids(view)))


def tagged_processes() -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{TAG}=".encode() in Path(f"/proc/{entry}/environ").read_bytes() and alive(int(entry)):
                found.append(int(entry))
        except OSError:
            continue
    return found


def two_gangs(fleet: Fleet) -> None:
    begun = time.monotonic()
    fleet.controller.apply([fleet.spec(name, Parallel(tp=2)) for name in ("a", "b")])
    a, b = fleet.ready("a"), fleet.ready("b")
    assert len(pids(a)) == len(pids(b)) == 2
    say("two gangs", begun)

    begun = time.monotonic()
    os.kill(pids(a)[1], signal.SIGKILL)
    again = fleet.ready("a", after=a.epoch)
    assert gone(a) and fleet.views()["b"].epoch == b.epoch
    assert f"rank 1 (pid {pids(a)[1]})" in again.cause, again.cause
    say("rank killed", begun, again.cause)

    begun = time.monotonic()
    before = {name: fleet.ready(name).epoch for name in ("a", "b")}
    living = pids(fleet.ready("a")) + pids(fleet.ready("b"))
    controller = fleet.pid()
    os.kill(controller, signal.SIGKILL)
    until("a new controller", lambda: (new := fleet.pid()) and new != controller)
    assert {name: fleet.ready(name).epoch for name in ("a", "b")} == before
    assert all(map(alive, living))
    say("controller killed", begun)

    begun = time.monotonic()
    b = fleet.ready("b")
    ray.kill(ray.get_actor(f"trireme/fleet/b/{b.epoch}"))
    until("the gang of a dead supervisor gone", lambda: gone(b), 60.0)
    new = fleet.ready("b", after=b.epoch)
    assert "supervisor died" in new.cause, new.cause
    say("supervisor killed", begun, new.cause)


def three_hosts(fleet: Fleet) -> None:
    begun = time.monotonic()
    fleet.controller.apply([fleet.spec("wide", Parallel(pp=3), spread=True)])
    wide = fleet.ready("wide")
    assert wide.gang is not None and sorted(wide.gang.hosts) == ["127.0.0.1", "127.0.0.2", "127.0.0.3"], wide.gang
    say("three hosts", begun, list(wide.gang.hosts))

    begun = time.monotonic()
    os.kill(pids(wide)[2], signal.SIGKILL)
    again = fleet.ready("wide", after=wide.epoch)
    assert gone(wide)
    say("far rank killed", begun, again.cause)

    begun = time.monotonic()
    spec = fleet.spec("engine", Parallel(pp=3), spread=True)
    wanted = msgspec.structs.replace(spec.replica, engine=TrtllmSpec(), artifact=str(fleet.run_dir / "nowhere"))
    fleet.controller.apply([msgspec.structs.replace(spec, replica=wanted)])
    until("a refusal", lambda: (view := fleet.views().get("engine")) is not None and view.phase == "failed")
    refused = fleet.views()["engine"]
    assert "node 127.0.0." in refused.cause and "no such folder" in refused.cause, refused.cause
    say("pre-flight refuses", begun, refused.cause)

    begun = time.monotonic()
    fleet.controller.abort()
    assert not tagged_processes()
    say("abort", begun)
    fleet.controller.apply([])
    until("all gangs gone", lambda: not fleet.views())
    until("no process", lambda: not tagged_processes(), 60.0)
    fleet.controller.close()
    groups = [row["name"] for row in ray.util.placement_group_table().values() if row["state"] != "REMOVED"]
    assert not groups, groups
    say("nothing left", begun)


def alone(folder: Path, sizes: dict[str, int]) -> list[float | None]:
    """Logprobs of what one process without MPI answers to the same request."""
    engine = build(ReplicaSpec(name="alone", model="tiny", artifact=str(folder), engine=PortableSpec(**sizes)), None)
    assert not isinstance(engine, PortableFollower)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True, logprobs=0)
    return [entry.logprob for entry in serve(engine, [request(PROMPT, params)])[0].logprobs]


def whole_deployment(run_dir: Path) -> None:
    """Routers on this host, a pipeline's ranks on three: tcp with CURVE in between, and the tokens of one process without any of it."""
    begun = time.monotonic()
    folder = tiny_model(run_dir / "tiny")
    sizes = {"kv_tokens": 1024, "max_seq_len": 256}
    model = {"name": "tiny", "path": str(folder), "engine": "portable", "pp_size": 3, "spread": True, **sizes}
    tree = {"name": "net", "run_dir": str(run_dir), "ray": {"address": ADDRESS}, "http": {"port": 0}, "drain_grace_s": 5, "models": [model]}
    deployment = Deployment(load(tree).config)
    codes: list[int] = []
    host = threading.Thread(target=lambda: codes.append(deployment.run()))
    host.start()
    try:
        try:
            until("ready", lambda: not host.is_alive() or deployment.status().state == "READY")
        except TimeoutError:
            tell(deployment, run_dir)
            raise
        assert deployment._routers is not None and deployment._desired is not None

        def heard() -> bool:
            rows = [row for report in deployment._routers.reports() for row in report.replicas]  # type: ignore[union-attr]
            return [row.state for row in rows] == ["ready"]

        until("the router has heard Hello over CURVE", heard)
        assert all(spec.replica.routers[0].endpoint.startswith("tcp://127.0.0.1:") for spec in deployment._desired.gangs)
        assert all(spec.replica.routers[0].server_key for spec in deployment._desired.gangs)
        say("curve over tcp", begun)
        begun = time.monotonic()
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 5, "ignore_eos": True, "logprobs": 0}
        answer = httpx.post(f"{deployment.status().url}/v1/completions", json=body, timeout=60, trust_env=False)
        answer.raise_for_status()
        found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert found == alone(folder, sizes), "a pipeline over hosts is not bitwise equal to one process"
        say("answer over three hosts", begun)
    finally:
        begun = time.monotonic()
        deployment.stop()
        host.join(BOUND_S)
    assert codes == [0] and not tagged_processes()
    say("deployment down", begun)


def main() -> None:
    run_dir = Path(sys.argv[1])
    (run_dir / "fleet").mkdir()
    config = load({"models": [{"name": "x"}], "ray": {"address": ADDRESS}}).config.ray
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    joined = ray_cluster.join(config, run_dir, os.environ, cpus=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers, "Ray ends the host at SIGTERM"
    assert sorted(joined.addresses) == ["127.0.0.1", "127.0.0.2", "127.0.0.3"], joined
    ray_cluster.leave()
    whole_deployment(run_dir)
    ray_cluster.join(config, run_dir, os.environ, cpus=1)
    fleet = Fleet(run_dir / "fleet")
    two_gangs(fleet)
    three_hosts(fleet)


if __name__ == "__main__":
    main()
