"""What runs on every node of a job: pre-flight, Ray, and on the first node the deployment itself, until it is drained.

The first node leads: it judges the pre-flight, starts Ray's head, hosts `trireme up` as a child, writes `endpoint.json` and decides when to
drain. The others start Ray when the first node says so, and end when it ends. Owns the order of all that; never on the token path. No
wait is without a bound, and none is for a fixed time.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from orchestrator.config import deployment_file as configs
from orchestrator.config.engine_settings import AUTO
from orchestrator.control.host.control_socket import connect
from orchestrator.control.host.deployment import INTERRUPTED
from orchestrator.control.launch.subprocesses import ChildProcess, adopt_orphans
from orchestrator.files import make_private, write_private
from orchestrator.slurm import endpoint as endpoints
from orchestrator.slurm import job_preflight
from orchestrator.slurm.endpoint import Endpoint
from orchestrator.slurm.handover import HandoverFacts, drain_reason
from orchestrator.slurm.job_env import JobPosition
from orchestrator.slurm.ray_node import RayNode, environment
from orchestrator.slurm.roll_call import PeerLost, RollCall, RollCallConnection, RollCallMessage, call
from workers.protocol.errors import ConfigError, EnvironmentFault, ReplicaLost, TriremeError

#: Bounds, seconds: entries of other nodes (prologs, containers), Ray on a node, the host's end after its drain, what is left.
_HERE_S, _RAY_S, _END_S, _KILL_S = 300.0, 240.0, 240.0, 5.0
_POLL_S = 0.5
#: Nothing of the scheduler's folder of a start is a secret but this one file.
_TOKEN = "token"


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the script says. ``lead_s``: least time between Slurm's signal and the limit, 0 = no hand-over; ``offered``: MPIs of srun."""

    name: str
    jobs: str
    file: str
    lead_s: float
    generation: int
    offered: tuple[str, ...]


class Drained(Exception):
    """The job got the order to drain before the deployment was started."""


def say(text: str) -> None:
    print(text, flush=True)


def run(spec: JobSpec, place: JobPosition, env: Mapping[str, str]) -> int:
    """This node's part of the job; returns its exit code. Raises what kept the job from starting."""
    start = place.start_folder(spec.jobs, spec.name)
    try:
        token = (start / _TOKEN).read_bytes()
    except OSError as error:
        hint = "--job-dir must be on a file system that all nodes share"
        raise EnvironmentFault(f"node {place.node} does not see {start / _TOKEN}", error.strerror or "", hint) from None
    config = configs.load(Path(spec.file), env=env).config
    if config.launcher == AUTO:
        config = msgspec.structs.replace(config, launcher="ray" if place.nodes > 1 else "local")
    if config.launcher == "local" and place.nodes > 1:
        hint = "launcher: ray, or submit with --nodes 1"
        raise ConfigError(f"launcher: local on {place.nodes} nodes", "without Ray the other nodes would idle", hint)
    probes = (start / "probe", config.cache / f".{place.deployment(spec.name)}")
    ray_env = environment(env, place, start / _TOKEN)
    adopt_orphans()  # what loses its parent stays within the step, where Slurm and the end of this function find it
    try:
        if place.index:
            return _follow(place, token, probes, ray_env, start)
        return _lead(FirstNode(spec, place, config, ray_env, start), token, probes, start / "code")
    finally:
        _kill_descendants()


def _lead(leader: FirstNode, token: bytes, probes: tuple[Path, ...], code_file: Path) -> int:
    """The first node's code is the job's: Slurm would take the largest of all nodes', of those too that it ended because of this one."""
    try:
        code = leader.run(token, probes)
    except TriremeError as error:
        write_private(code_file, str(error.exit_code).encode())
        raise
    write_private(code_file, str(code).encode())
    return code


def _kill_descendants() -> None:
    """Nothing that this process started outlives it. Bounded; what hangs in the kernel is left to Slurm."""
    deadline = time.monotonic() + _KILL_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_POLL_S)


def _look(place: JobPosition, ports: tuple[int, ...], env: Mapping[str, str]) -> job_preflight.JobNodeFacts:
    return job_preflight.look(place.node, place.gpus, ports, env.get("PATH", ""), env.get("CUDA_VISIBLE_DEVICES"))


def _follow(place: JobPosition, token: bytes, probes: tuple[Path, ...], env: Mapping[str, str], start: Path) -> int:
    """Every node but the first. Its Ray's death ends nothing: the job goes on without this node."""
    facts = _look(place, (), env)
    # Answered once the first node has written its probes.
    first = call(place.head, place.roll_port, token, _HERE_S)
    ray: RayNode | None = None

    def end(*_: object) -> None:
        raise Drained

    signal.signal(signal.SIGTERM, end)
    try:
        facts = msgspec.structs.replace(facts, unseen=tuple(str(probe) for probe in probes if not probe.exists()))
        write_private(start / f"node-{place.index}.json", msgspec.json.encode(facts))
        first.send(RollCallMessage(kind="here", index=place.index, facts=facts, clock=time.time()))
        while (message := first.receive(_POLL_S)) is None or message.kind != "over":
            if message is not None and message.kind == "join":
                ray = _join(place, first, env, start)
            if ray is not None and not ray.runs:
                say(f"node {place.node}: Ray ended; the job goes on without this node")
                return 0
        return 0
    except Drained:
        return 0
    except PeerLost as error:
        raise EnvironmentFault("the first node of the job is gone", str(error), "the job's log says why") from None
    finally:
        first.close()
        if ray is not None:
            ray.stop()


def _join(place: JobPosition, first: RollCallConnection, env: Mapping[str, str], start: Path) -> RayNode:
    ray = RayNode(place, env, start / f"ray-{place.node}.log")
    try:
        ray.started(_RAY_S, lambda: None)
    except BaseException as error:
        first.send(RollCallMessage(kind="failed", why=str(error)))
        ray.stop()
        raise
    first.send(RollCallMessage(kind="joined"))
    return ray


class FirstNode:
    """The first node. ``run`` is its life."""

    def __init__(self, spec: JobSpec, place: JobPosition, config: configs.Config, env: Mapping[str, str], start: Path) -> None:
        self._spec, self._place, self._config, self._env, self._start = spec, place, config, env, start
        self._name = place.deployment(spec.name)
        self._folder = place.folder(spec.jobs, spec.name)
        self._pointer = endpoints.pointer(spec.jobs, spec.name, place.task)
        self._signalled = False
        self._limit_since: float | None = None
        self._endpoint: Endpoint | None = None
        self._draining_since: float | None = None

    def run(self, token: bytes, probes: tuple[Path, ...]) -> int:
        """Returns the exit code of the job."""
        signal.signal(signal.SIGTERM, self._signal)
        make_private(self._folder)
        (self._folder / endpoints.FILE).unlink(missing_ok=True)  # an earlier start's
        again = f", start {self._place.start + 1}" if self._place.start else ""
        say(f"job {self._place.job}{again}: {self._name} on {self._place.nodes} nodes, generation {self._spec.generation}; {self._folder}")
        try:
            with self._roll(token) as roll, self._probed(probes):
                self._check(roll)
                if self._config.launcher == "local":
                    return self._host(roll, None)
                with self._ray(roll) as ray:
                    return self._host(roll, ray)
        except Drained:
            say(f"{self._name}: ordered to end before it was ready")
            return INTERRUPTED

    def _signal(self, *_: object) -> None:
        self._signalled = True

    def _drain_ordered(self) -> bool:
        return self._signalled or (self._start / "drain").exists()

    def _check_stop(self) -> None:
        if self._drain_ordered():
            raise Drained

    @contextlib.contextmanager
    def _roll(self, token: bytes) -> Iterator[RollCall]:
        roll = RollCall(self._place.roll_port, token, self._place.nodes - 1, self._check_stop)
        try:
            yield roll
        finally:
            roll.close()

    @contextlib.contextmanager
    def _probed(self, probes: tuple[Path, ...]) -> Iterator[None]:
        """Files that the other nodes must see."""
        try:
            for probe in probes:
                probe.parent.mkdir(parents=True, exist_ok=True)
                write_private(probe, b"")
            yield
        finally:
            for probe in probes:
                probe.unlink(missing_ok=True)

    def _check(self, roll: RollCall) -> None:
        """Raises :class:`EnvironmentFault` with the first refusal."""
        own = _look(self._place, (self._place.ray_port,), self._env)
        others = roll.gather(_HERE_S)
        unseen = [
            msgspec.structs.replace(facts, unseen=(*facts.unseen, f"what {facts.node} wrote"))
            if not (self._start / f"node-{index}.json").exists() else facts
            for index, facts in enumerate(others, 1)
        ]  # fmt: skip
        wants_gpus = any(gang.settings.device == "cuda" for model in self._config.models for gang in model.gangs())
        wants_ray = self._config.launcher == "ray"
        verdicts = job_preflight.judge([own, *unseen], offered=self._spec.offered, wants_gpus=wants_gpus, wants_ray=wants_ray)
        write_private(self._start / "preflight.json", msgspec.json.format(msgspec.json.encode(verdicts)) + b"\n")
        for verdict in verdicts:
            say(f"pre-flight {verdict.state:4} {verdict.what}: {verdict.found}" + (f" ({verdict.hint})" if verdict.hint else ""))
        if refused := next((verdict for verdict in verdicts if verdict.state == "fail"), None):
            raise EnvironmentFault(f"pre-flight refuses: {refused.what}", refused.found, refused.hint)

    @contextlib.contextmanager
    def _ray(self, roll: RollCall) -> Iterator[RayNode]:
        begun = time.monotonic()
        ray = RayNode(self._place, self._env, self._start / f"ray-{self._place.node}.log")
        try:
            ray.started(_RAY_S, self._check_stop)
            roll.join(_RAY_S)
            say(f"Ray runs on {self._place.nodes} nodes at {self._env['RAY_ADDRESS']}, {time.monotonic() - begun:.1f} s")
            yield ray
        finally:
            roll.close()  # first: to the others this end is none of Ray's
            ray.stop()

    def _host(self, roll: RollCall, ray: RayNode | None) -> int:
        """`trireme up` from its start to its end, watched. ``ray`` None: the file's launcher is this node's own."""
        argv = [sys.executable, "-m", "trireme", "up", self._spec.file, "--name", self._name, "--run-dir", self._spec.jobs]
        argv += ["--launcher", self._config.launcher]
        host = ChildProcess(argv, env=self._env, on_line=say)
        try:
            while host.wait(_POLL_S) is None:
                for node in roll.lost():
                    say(f"node {node} left the job; its replicas are placed again where there is room")
                if ray is not None and not ray.runs:
                    raise ReplicaLost("Ray's head ended", "its replicas have ended with it", f"its log is in {self._start}")
                self._watch(host)
            code = host.returncode
            assert code is not None
            say(f"{self._name} ended with {code}")
            return code if code >= 0 else ReplicaLost.exit_code
        finally:
            if host.returncode is None:
                host.signal(signal.SIGKILL, group=True)
            self._withdraw()

    def _watch(self, host: ChildProcess) -> None:
        """Look once at the deployment and at the orders that the job got, and act on both."""
        if self._draining_since is not None:
            if time.monotonic() > self._draining_since + self._config.drain_grace_s + _END_S:
                host.signal(signal.SIGKILL, group=True)
            return
        if self._endpoint is None:
            self._publish()
        now = time.monotonic()
        if self._limit_since is None and (self._start / "limit").exists():
            self._limit_since = now
            say(f"the time limit is near; successor: job {self._successor() or 'none'}")
        facts = HandoverFacts(
            now=now,
            drain_ordered=self._drain_ordered(),
            limit_since=self._limit_since,
            successor_ready=self._successor_ready(),
            lead_s=self._spec.lead_s,
            grace_s=self._config.drain_grace_s,
        )
        if why := drain_reason(facts):
            say(f"draining: {why}")
            self._draining_since = now
            if self._endpoint is not None:
                self._endpoint = msgspec.structs.replace(self._endpoint, state="draining")
                endpoints.write(self._folder / endpoints.FILE, self._endpoint)
            host.signal(signal.SIGTERM)

    def _successor(self) -> int:
        """The job that is to follow; 0 without one."""
        try:
            return int((self._folder / "successor" / "job").read_text().partition(";")[0])
        except (OSError, ValueError):
            return 0

    def _successor_ready(self) -> bool:
        if self._limit_since is None or not (job := self._successor()):
            return False
        place = msgspec.structs.replace(self._place, job=job)
        found = endpoints.read(place.folder(self._spec.jobs, self._spec.name) / endpoints.FILE)
        return found is not None and found.state == "ready"

    def _publish(self) -> None:
        """Write the endpoint as soon as the deployment is ready, and say it."""
        try:
            status = connect(self._name, self._spec.jobs).status()
        except TriremeError:
            return  # it has not come so far yet
        if status.state != "READY":
            return
        self._endpoint = Endpoint(
            state="ready",
            deployment=self._name,
            job=self._place.job,
            start=self._place.start,
            generation=self._spec.generation,
            node=self._place.node,
            url=endpoints.reachable(status.url, self._place.head),
            rpc=status.rpc,
            models=tuple(model.name for model in status.models),
            key_file=status.key_file,
            folder=str(self._folder),
            time=time.time(),
        )
        endpoints.write(self._folder / endpoints.FILE, self._endpoint)
        endpoints.write(self._pointer, self._endpoint)
        say(f"endpoint: {self._endpoint.url} ({self._folder / endpoints.FILE})")

    def _withdraw(self) -> None:
        """Take the endpoint back, and the pointer unless it names a successor by now."""
        (self._folder / endpoints.FILE).unlink(missing_ok=True)
        pointed = endpoints.read(self._pointer)
        if pointed is not None and pointed.job == self._place.job:
            self._pointer.unlink(missing_ok=True)
