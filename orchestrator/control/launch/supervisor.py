"""The gang supervisor: runs one mpiexec and its ranks, from the spec file until no process of the gang is left.

Owns one gang. A gang is never repaired: the first dead rank ends it. Must never wait without a bound; knows nothing of Ray
(:mod:`.ray_launcher` runs it in an actor, :mod:`.local_launcher` in its own process).

What ends a gang (docs/reliability.md has the whole table, with bounds):

    a rank dies                            RankWatch or mpiexec sees it; mpiexec ends the other ranks
    all ranks fail to load                 they agree on the error and exit
    one rank raises an error               that rank: MPI_Abort
    a step hangs, or the I/O thread fails  the leader's I/O thread: rank 0 exits
    a newer epoch has joined a router      the leader, by the router's Bye: MPI_Abort
    a TensorRT-LLM rank falls silent       rank 0 (rank_liveness): MPI_Abort; during the start each rank's deadline: it exits
    mpiexec dies                           the kernel, for every process has the death signal of its parent
    it cannot be started                   GangSupervisor: files, pre-flight, mpiexec, a node that starts no ranks
    an order to drain                      the leader finishes; the reconciler kills what is left after the grace
    lost by the routers, late, replaced    the reconciler: KillGang, and so for each gang above that has ended
    its supervisor, agent or raylet dies   the kernel and Ray; RayLauncher kills a supervisor that is silent the host ends, or is killed
    OwnReplicas.end; the kernel. On a Ray that it joined, gangs outlive a host that is killed
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from orchestrator.control.launch import gang_preflight, mpiexec
from orchestrator.control.launch.launcher import GangSpec, prepare
from orchestrator.control.launch.subprocesses import TAG, ChildProcess, death_signal, kill_tagged, tagged
from orchestrator.control.reconciler import ENDED, GangStatus
from workers.logs import stamp
from workers.protocol.errors import ConfigError, EnvironmentFault, TriremeError
from workers.protocol.specs import TrtllmSpec
from workers.protocol.status import GangPhase
from workers.serving.state_file import ReplicaState, read_state

log = logging.getLogger("trireme.launch")
#: Time for a killed mpiexec to end before its ranks are killed one by one.
_VERDICT_S = 1.0
_OUTPUT_LINES = 50


class GangNode(Protocol):
    """A node on which ranks of this gang run."""

    address: str
    ranks: int

    def run(self, tag: str, command: str, env: Mapping[str, str]) -> None:
        """Start a shell command on the node; it ends with the node's agent."""

    def ask(self, tag: str, argv: Sequence[str], env: Mapping[str, str], bound_s: float) -> tuple[int, str]:
        """Run a short command on the node to its end: (exit code, stdout). Raises :class:`EnvironmentFault` after ``bound_s`` seconds."""

    def kill(self, tag: str) -> list[int]:
        """SIGKILL all processes of the gang on the node; returns the pids that are left, after at most some seconds."""


class LocalNode:
    """This host. ``own``: variables of this node only, such as the GPUs that it may use."""

    def __init__(self, ranks: int, address: str = "127.0.0.1", own: Mapping[str, str] | None = None) -> None:
        self.address, self.ranks, self.own = address, ranks, dict(own or {})

    def run(self, tag: str, command: str, env: Mapping[str, str]) -> None:
        ChildProcess(["/bin/sh", "-c", command], env={**env, **self.own, TAG: tag}, cwd="/", log=Path(os.devnull))

    def ask(self, tag: str, argv: Sequence[str], env: Mapping[str, str], bound_s: float) -> tuple[int, str]:
        output: list[str] = []
        child = ChildProcess(argv, env={**env, **self.own, TAG: tag}, cwd="/", on_line=output.append)
        code = child.wait(bound_s)
        if code is None:
            child.signal(signal.SIGKILL, group=True)
            raise EnvironmentFault(f"node {self.address} does not answer", f"{argv[0]} took more than {bound_s:g} s", "look at that node")
        return code, "\n".join(output)

    def kill(self, tag: str) -> list[int]:
        return kill_tagged(tag)


#: If several ranks end within this time, seconds, their order is not known.
TOGETHER_S = 0.05


class RankWatch:
    """Finds the rank of this host that dies first, and its signal: mpiexec may name a rank that it killed itself."""

    def __init__(self, pids: Sequence[tuple[int, str, int]]) -> None:
        self.deaths: list[tuple[int, int, int | None]] = []
        here = socket.gethostname()
        self._files: dict[int, tuple[int, int]] = {}
        for rank, host, pid in pids:
            if host == here:
                try:
                    self._files[os.pidfd_open(pid)] = (rank, pid)
                except OSError:
                    self.deaths.append((rank, pid, None))
        self._settled = threading.Event()
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def _watch(self) -> None:
        poller = select.poll()
        for file in self._files:
            poller.register(file, select.POLLIN)
        if self._files and not self.deaths:
            poller.poll()
            # The end of a process takes time, especially for the first one: its sockets are closed and its memory is freed before it counts
            # as ended.
            time.sleep(TOGETHER_S)
            dead = [self._files[file] for file, _ in poller.poll(0)]
            self.deaths = [(rank, pid, death_signal(pid)) for rank, pid in dead]
        self._settled.set()
        for file in self._files:
            os.close(file)

    def cause(self, wait_s: float = 0.0) -> str:
        """``rank 1 (pid 4711) was killed by SIGKILL``; empty while all live. ``wait_s``: how long to wait for a rank to end."""
        self._settled.wait(wait_s)
        # Their order is not known. mpiexec sends SIGKILL, so a rank with another signal was the first one; otherwise all are named.
        first = [death for death in self.deaths if death[2] not in (None, signal.SIGKILL)] or self.deaths
        return "; ".join(self._describe(*death) for death in first[:3])

    @staticmethod
    def _describe(rank: int, pid: int, number: int | None) -> str:
        if number is None:
            return f"rank {rank} (pid {pid}) ended"
        suspicion = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"rank {rank} (pid {pid}) was killed by {mpiexec.signal_name(number)}{suspicion}"


class GangSupervisor:
    """One launch of one replica. ``nodes``: in rank order; the first one is this host and holds rank 0. ``mpi`` None: no MPI is installed,
    and rank 0 is started without mpiexec, for a replica that needs no MPI.

    Methods may be called from any thread. States: starting → loading → ready → draining → stopped | failed.
    """

    def __init__(
        self, spec: GangSpec, epoch: int, nodes: Sequence[GangNode], *, mpi: mpiexec.MpiInstall | None, env: Mapping[str, str]
    ) -> None:
        self.spec, self.epoch, self._nodes, self._mpi, self._env = spec, epoch, list(nodes), mpi, env
        self._program = "rank 0" if mpi is None else "mpiexec"
        self.tag = spec.tag(epoch)
        self._started_at = time.time()
        self._ended_at = 0.0
        self._folder = Path(spec.run_dir, spec.replica.name, str(epoch))
        self._child: ChildProcess | None = None
        self._watch: RankWatch | None = None
        self._fault: TriremeError | None = None
        self._output: deque[tuple[float, str]] = deque(maxlen=_OUTPUT_LINES)
        self._failure_logged = False
        #: Held while mpiexec is started: a gang that was killed during its pre-flight must not start.
        self._starting = threading.Lock()
        self._killed = False

    def start(self) -> None:
        """Write the files and start mpiexec, after a pre-flight in a thread if the engine needs one. :meth:`status` reports an error."""
        if gang_preflight.needed(self.spec):
            threading.Thread(target=self._start, name="gang start", daemon=True).start()
        else:
            self._start()

    def _start(self) -> None:
        try:
            self._folder = prepare(self.spec, self.epoch)
            if self._mpi is None and self.spec.replica.needs_mpi:
                raise mpiexec.none_found()
            if self._mpi is not None and gang_preflight.needed(self.spec):
                gang_preflight.inspect(self.spec, self._nodes, family=self._mpi.family, tag=self.tag, env=self._env)
            with self._starting:
                if not self._killed:
                    self._child = self._launch()
        except TriremeError as fault:
            self._fault, self._ended_at = fault, time.time()

    def _launch(self) -> ChildProcess:
        hosts = [mpiexec.MpiHost(address=node.address, ranks=node.ranks) for node in self._nodes]
        command = [*self.spec.command, "--spec", str(self._folder / "spec.json")]
        if isinstance(self.spec.replica.engine, TrtllmSpec):
            command.append("--mpi-multiple")  # every rank must know it before rank 0 sends it the spec
        argv = command if self._mpi is None else mpiexec.argv(self._mpi, hosts, command, control=self._nodes[0].address)
        env = mpiexec.environment(self._mpi, self._env, cuda=self.spec.replica.engine.device == "cuda")
        if len(hosts) == 1:
            env |= {name: self._env[name] for name in mpiexec.NODE_NAMES if name in self._env}
            env |= self._nodes[0].own if isinstance(self._nodes[0], LocalNode) else {}
        return ChildProcess(
            argv, env={**env, TAG: self.tag}, cwd="/", on_line=lambda line: self._on_output(line, env), on_exit=self._on_exit
        )

    def _on_output(self, line: str, env: Mapping[str, str]) -> None:
        proxy = mpiexec.proxy_line(line, [node.address for node in self._nodes])
        if proxy is None:
            self._output.append((time.time(), line))
            return
        index, command = proxy
        try:
            self._nodes[index].run(self.tag, command, env)
        except TriremeError as fault:
            self._fault = self._fault or fault

    def _on_exit(self, code: int) -> None:
        self._ended_at = time.time()
        lines = [*self._output, (self._ended_at, f"{self._program} returned {code}")]
        try:
            (self._folder / "mpiexec.log").write_text("".join(f"{stamp(at)} {line}\n" for at, line in lines))
        except OSError as error:
            log.warning("gang %s: cannot keep mpiexec's output: %s", self.tag, error.strerror)

    def status(self) -> GangStatus:
        """The gang's status. Logs the cause of a failure once."""
        state = self._state()
        if self._watch is None and state is not None and self._child is not None:
            self._watch = RankWatch(state.pids)
        phase, cause, hint, exit_code = self._verdict(state)
        if phase == "failed" and not self._failure_logged:
            self._failure_logged = True
            log.error("replica %s epoch %d failed: %s", self.spec.replica.name, self.epoch, cause)
        since = self._ended_at if phase in ENDED and self._ended_at else state.since if state is not None else self._started_at
        return GangStatus(
            name=self.spec.replica.name,
            epoch=self.epoch,
            revision=self.spec.revision,
            phase=phase,
            since=since,
            pids=tuple(state.pids) if state is not None else (),
            hosts=tuple(dict.fromkeys(node.address for node in self._nodes)),
            capacity=state.capacity if state is not None else None,
            cause=cause,
            hint=hint,
            permanent=exit_code == ConfigError.exit_code,
            exit_code=exit_code,
            log_dir=str(self._folder),
            restarts=self.spec.restarts,
        )

    def _state(self) -> ReplicaState | None:
        try:
            return read_state(str(self._folder))
        except EnvironmentFault as fault:
            self._fault = self._fault or fault
            return None

    def _verdict(self, state: ReplicaState | None) -> tuple[GangPhase, str, str, int]:
        """(phase, cause, hint, exit code of the cause; 0 = not known)."""
        if self._fault is not None:
            return "failed", str(self._fault), self._fault.hint, self._fault.exit_code
        if state is not None and state.error is not None:
            error = state.error
            return "failed", f"{error.what}: {error.why}" if error.why else error.what, error.hint, error.exit_code
        code = self._child.returncode if self._child is not None else None
        if code is None:
            seen = self._watch.cause() if self._watch is not None else ""
            leaving = state is not None and state.phase in ("draining", "stopped")
            if seen and not leaving:
                # mpiexec itself may be stopped or busy: the gang is lost in either case.
                return "failed", *self._with_own_error(seen, ""), 0
            phase: GangPhase = "starting" if state is None else "draining" if state.phase == "stopped" else state.phase
            return phase, "", "", 0
        if code == 0:
            return "stopped", "", "", 0
        return "failed", *self._with_own_error(self._death_cause(code), f"see {self._folder}"), 0

    def _death_cause(self, code: int) -> str:
        assert self._child is not None
        if code < 0:
            return f"{self._program} (pid {self._child.pid}) was killed by {mpiexec.signal_name(-code)}"
        seen = self._watch.cause(4 * TOGETHER_S) if self._watch is not None else ""
        if seen:
            return seen
        number = None if self._mpi is None else mpiexec.exit_signal(self._mpi, code)
        return f"a rank was killed by {mpiexec.signal_name(number)}" if number else f"a rank exited with code {code}"

    def _with_own_error(self, what: str, hint: str) -> tuple[str, str]:
        """(cause, hint): the error that a rank printed, then ``what``, the way in which it ended; else ``what`` and a line of MPI or
        Python."""
        lines = [line.strip() for _, line in self._output]
        own = {name: text for name, colon, text in (line.partition(": ") for line in lines) if colon and name in ("error", "why", "hint")}
        if "error" in own:
            return ": ".join(filter(None, (own["error"], own.get("why")))) + f" ({what})", own.get("hint", hint)
        line = next((line for head in ("ModuleNotFoundError", "Abort(") for line in reversed(lines) if line.startswith(head)), "")
        return f"{what}: {line}" if line else what, hint

    def drain(self) -> None:
        """Send SIGTERM to rank 0 only: it finishes running requests within its grace, then ends the other ranks. Kills a gang without a
        rank 0."""
        state = self._state()
        leader = next((pid for rank, _, pid in state.pids if rank == 0), None) if state is not None else None
        if leader is None or self._child is None or self._child.returncode is not None:
            self.kill()
            return
        try:
            os.kill(leader, signal.SIGTERM)
        except ProcessLookupError:
            return

    def kill(self) -> list[int]:
        """End every process of the gang on every node and return the remaining pids: none, unless a process hangs in the kernel."""
        with self._starting:
            self._killed = True
        if self._child is not None:
            self._child.signal(signal.SIGKILL, group=True)
            self._child.wait(_VERDICT_S)
        left = kill_tagged(self.tag)
        for node in self._nodes:
            if not isinstance(node, LocalNode):
                left += node.kill(self.tag)
        return left


def sweep(gangs: Iterable[GangSpec]) -> list[int]:
    """Kill every process on this host with the tag of one of these gangs, whatever its epoch; returns those that do not die."""
    left = []
    for spec in gangs:
        folder = Path(spec.run_dir, spec.replica.name)
        for epoch in folder.iterdir() if folder.is_dir() else ():
            if epoch.name.isdigit() and tagged(tag := spec.tag(int(epoch.name))):
                left += kill_tagged(tag)
    return left
