"""Real gangs for tests: ``mpiexec -n N python -m workers``, and a scripted router end that speaks the wire to them.

Owns the processes and folders that it starts and ends them all, by pid. A :class:`RouterEnd` has no thread: it answers a leader only while
a test waits in :meth:`RouterEnd.until`, so a test that stops waiting is a silent router.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import zmq

from workers.protocol import messages
from workers.protocol.messages import (
    Accepted,
    Done,
    Failed,
    GenerateTask,
    Heartbeat,
    Hello,
    RouterHeartbeat,
    SamplingParams,
    Submit,
    Tokens,
)
from workers.protocol.specs import EngineSpec, FakeSpec, Parallel, ReplicaSpec, RouterAddress, TrtllmSpec
from workers.serving.state_file import ReplicaState, read_state

BOUND_S = 120.0
FAKE = FakeSpec()
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")


def wait_for(ready: Callable[[], object], bound_s: float = BOUND_S, what: str = "the condition") -> float:
    """Seconds until ``ready()`` was true; fails the test after ``bound_s``."""
    begin = time.monotonic()
    while not ready():
        assert time.monotonic() - begin < bound_s, f"{what} did not come within {bound_s} s"
        time.sleep(0.005)
    return time.monotonic() - begin


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose socket paths stay below the kernel's 100 bytes."""
    folder = tempfile.mkdtemp(prefix="tri", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(session: int) -> list[int]:
    """Living processes of a POSIX session, zombies left out."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Gang:
    """One replica. As a context manager it leaves no process behind."""

    def __init__(
        self,
        folder: Path,
        routers: Sequence[str | RouterAddress],
        *,
        name: str = "r0",
        tp: int = 2,
        pp: int = 1,
        engine: EngineSpec = FAKE,
        artifact: str = "",
        epoch: int = 1,
        hang_floor_s: float = 10.0,
        drain_grace_s: float = 30.0,
        ranks: int | None = None,
        key_file: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        self.run_dir = folder / name
        self.run_dir.mkdir(mode=0o700)
        self.spec = ReplicaSpec(
            name=name,
            model="m",
            artifact=artifact,
            epoch=epoch,
            parallel=Parallel(tp=tp, pp=pp),
            engine=engine,
            routers=tuple(RouterAddress(endpoint=router) if isinstance(router, str) else router for router in routers),
            run_dir=str(self.run_dir),
            hang_floor_s=hang_floor_s,
            drain_grace_s=drain_grace_s,
            key_file=key_file,
        )
        file = self.run_dir / "spec.json"
        file.write_bytes(msgspec.json.encode(self.spec))
        command = [MPIEXEC, "-n", str(ranks or tp * pp), sys.executable, "-m", "workers", "--spec", str(file)]
        if isinstance(engine, TrtllmSpec):
            command.append("--mpi-multiple")
        self._terminal = open(self.run_dir / "terminal", "wb")  # noqa: SIM115 - closed by __exit__
        self.mpiexec = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._terminal,
            stderr=self._terminal,
            start_new_session=True,
            env=os.environ | (env or {}),
        )

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pid in processes_of(self.mpiexec.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.mpiexec.wait(10)
        self._terminal.close()
        if error is not None:
            print(self.logs())

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.run_dir.glob("rank*.log"))) + self.terminal()

    def terminal(self) -> str:
        """The output of mpiexec."""
        return (self.run_dir / "terminal").read_text()

    @property
    def state(self) -> ReplicaState:
        state = read_state(str(self.run_dir))
        assert state is not None
        return state

    def pid(self, rank: int) -> int:
        return self.state.pids[rank][2]

    def wait_phase(self, *phases: str) -> ReplicaState:
        wait_for(lambda: (state := read_state(str(self.run_dir))) and state.phase in phases, what=f"phase {phases}")
        return self.state

    def wait_gone(self, bound_s: float = 2.0) -> float:
        """Seconds until no process of the gang lived."""

        def gone() -> bool:
            return self.mpiexec.poll() is not None and not processes_of(self.mpiexec.pid)

        return wait_for(gone, bound_s, "the end of the gang")

    def wait_exit(self, bound_s: float = BOUND_S) -> int:
        return self.mpiexec.wait(bound_s)


class Stream:
    """All messages for one (stream, attempt), in order."""

    def __init__(self, have: int) -> None:
        self.accepted: list[Accepted] = []
        self.tokens: list[int] = []
        self.first = have
        self.ends: list[Done | Failed] = []

    @property
    def end(self) -> Done | Failed | None:
        assert len(self.ends) <= 1, "more than one terminal message"
        return self.ends[0] if self.ends else None

    def take(self, first: int, tokens: list[int]) -> None:
        assert not self.ends, "tokens after the terminal message"
        assert first == self.first + len(self.tokens), "a gap or a repeat"
        self.tokens += tokens


class RouterEnd:
    """One router's back socket, scripted. ``streams`` fills while :meth:`until` waits."""

    def __init__(
        self, endpoint: str, *, name: str = "router", boot: str = "router-1", peers: list[str] | None = None, high_water: int = 1000
    ) -> None:
        self.endpoint, self.boot, self.name = endpoint, boot, name
        self._peers = tuple(RouterAddress(endpoint=peer) for peer in peers or [])
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.sndhwm = self._socket.rcvhwm = high_water
        self._socket.bind(endpoint)
        self._next_peers = 0.0
        self.replicas: dict[str, bytes] = {}
        self.hellos: list[Hello] = []
        self.beats: list[Heartbeat] = []
        self.byes: list[str] = []
        self.frames = 0
        self.streams: dict[tuple[int, int], Stream] = {}
        #: Whether messages for unknown streams are a fault.
        self.strict = True

    def __enter__(self) -> RouterEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def send(self, message: messages.Message, replica: str = "r0") -> None:
        self.send_raw(messages.encode(message), replica=replica)

    def send_raw(self, *frames: bytes, replica: str = "r0") -> None:
        self._socket.send_multipart([self.replicas[replica], *frames])

    def submit(
        self,
        stream: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        request: str = "",
        attempt: int = 0,
        emitted: list[int] | None = None,
        credit: int = messages.UNLIMITED,
        deadline_ms: int | None = None,
        replica: str = "r0",
    ) -> Stream:
        """Send a Submit; the answers fill the returned Stream."""
        message = Submit(
            boot=self.boot, stream=stream, attempt=attempt, client="c", request_id=request or f"q{stream}", model="m", prompt_ids=prompt,
            task=GenerateTask(params=params, emitted=emitted or [], credit=credit), deadline_ms=deadline_ms,
        )  # fmt: skip
        self.send(message, replica)
        return self.watch(stream, attempt, len(emitted or []))

    def watch(self, stream: int, attempt: int, have: int = 0) -> Stream:
        found = self.streams[stream, attempt] = Stream(have)
        return found

    def until(self, ready: Callable[[], object], bound_s: float = BOUND_S) -> float:
        """Serve until ``ready()``; returns the seconds that it took."""
        begin = time.monotonic()
        while not ready():
            assert time.monotonic() - begin < bound_s, f"not within {bound_s} s"
            self.turn()
        return time.monotonic() - begin

    def turn(self) -> None:
        """Send a heartbeat to the leaders when it is due, and handle one message if one arrives within 5 ms."""
        if time.monotonic() >= self._next_peers:
            self._next_peers = time.monotonic() + 0.2
            self._greet(list(self.replicas.values()))
        if self._socket.poll(5):
            self._take(*self._socket.recv_multipart())

    def ready(self, replica: str = "r0") -> RouterEnd:
        """Wait for the replica's Hello and a first heartbeat."""
        self.until(lambda: replica in self.replicas and self.beats)
        return self

    def _greet(self, identities: list[bytes]) -> None:
        for identity in identities:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart(
                    [identity, messages.encode(RouterHeartbeat(boot=self.boot, router=self.name, routers=self._peers))], zmq.DONTWAIT
                )

    def _take(self, identity: bytes, frame: bytes) -> None:
        message = messages.decode_from_replica(frame)
        self.frames += 1
        match message:
            case Hello():
                self.hellos.append(message)
                self.replicas[message.replica] = identity
                self._greet([identity])
            case Heartbeat():
                self.beats.append(message)
            case Accepted():
                self._stream(message.stream, message.attempt).accepted.append(message)
            case Tokens():
                for stream, attempt, first, tokens in zip(message.streams, message.attempts, message.firsts, message.tokens, strict=True):
                    self._stream(stream, attempt, first).take(first, tokens)
            case Done() | Failed():
                self._stream(message.stream, message.attempt).ends.append(message)
            case _:
                self.byes.append(message.reason)

    def _stream(self, stream: int, attempt: int, first: int = 0) -> Stream:
        if self.strict or (stream, attempt) in self.streams:
            return self.streams[stream, attempt]
        return Stream(first)
