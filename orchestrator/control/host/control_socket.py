"""The control socket of a deployment, through which ``trireme status``, ``drain``, ``update`` and ``down`` reach its host process.

Owns a Unix socket (0600 in a 0700 folder; peers of another user are turned away). Each connection carries one JSON request and one JSON
answer, never a token or a secret.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.config.deployment_file import DEFAULT_RUN_DIR, Config
from orchestrator.control.launch.subprocesses import alive
from orchestrator.planner.automatic import ClusterHardware
from workers.protocol.errors import EnvironmentFault, NotFound, Rejected, TriremeError, from_code
from workers.protocol.messages import Capacity
from workers.protocol.specs import RouterAddress
from workers.protocol.status import DeploymentState, ReplicaRowState, UpdatePhase

log = logging.getLogger("trireme.control")
_LIMIT = 1 << 20
_PATIENCE_S = 10.0


class ReplicaRow(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a status table. ``age_s``: in this state; ``queue``: sequences that wait in the replica; ``kv_use``: share of KV
    blocks in use, 0 to 1; ``restarts``: launches after a failure since the replica got this configuration; ``failures``: failures in a row,
    with which the wait before the next launch grows."""

    name: str
    model: str
    state: ReplicaRowState
    age_s: float
    tp: int
    pp: int
    queue: int = 0
    running: int = 0
    tok_s: float = 0.0
    kv_use: float = 0.0
    nodes: int = 0
    hosts: tuple[str, ...] = ()
    epoch: int = 0
    restarts: int = 0
    failures: int = 0
    retry_in_s: float = 0.0
    cause: str = ""
    hint: str = ""
    pids: tuple[tuple[int, str, int], ...] = ()
    capacity: Capacity | None = None
    log_dir: str = ""


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model: NAME STATE AGE REPLICAS READY TP PP QUEUE TOK/S NODES. ``wanted``: number of wanted replicas; if other deployments launch
    them, the number that is not lost. ``tp`` and ``pp``: every layout in use; ``admitted``: requests since the living routers' start."""

    name: str
    state: DeploymentState
    age_s: float
    wanted: int
    ready: int
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    queue: int
    tok_s: float
    nodes: int
    replicas: tuple[ReplicaRow, ...]
    admitted: int = 0


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an update. ``moves``: all planned steps; ``steps``: finished steps with their seconds; ``doing``: the running step;
    ``left``: number of steps that are not done. ``error``: why the update is or was rolled back."""

    phase: UpdatePhase
    moves: tuple[str, ...]
    steps: tuple[tuple[str, float], ...] = ()
    doing: str = ""
    left: int = 0
    error: str = ""
    seconds: float = 0.0


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The status of a deployment. ``routers``: name -> pid; ``rpc``: addresses for RPC clients; ``key_file``: the client's own key pair."""

    name: str
    state: DeploymentState
    age_s: float
    pid: int
    launcher: str
    url: str
    models: tuple[ModelRow, ...]
    routers: dict[str, int]
    rpc: tuple[RouterAddress, ...]
    run_dir: str
    key_file: str = ""
    error: str = ""
    update: UpdateReport | None = None


class UpdateCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An order to change the deployment to ``config``. ``said``: paths of the keys that the file or a flag sets; all others are defaults.
    ``dry_run``: return the plan and change nothing."""

    config: Config
    said: tuple[str, ...] = ()
    dry_run: bool = False


class ControlCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request. ``drain``: replace the replica ``name`` gracefully; ``down``: stop everything, with ``now`` without a grace; ``hardware``:
    return the hardware of the replicas, from which automatic settings are chosen."""

    do: Literal["status", "drain", "down", "update", "hardware"]
    name: str = ""
    now: bool = False
    update: UpdateCommand | None = None


class ControlReply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a command: the ``status``, or the plan of the ordered ``update``, or an error (``code``, ``message``, ``hint``)."""

    status: DeploymentStatus | None = None
    update: UpdateReport | None = None
    hardware: ClusterHardware | None = None
    code: str = ""
    message: str = ""
    hint: str = ""


class ControlServer:
    """Serves commands in a separate thread; ``handle`` runs there and may raise :class:`TriremeError`."""

    def __init__(self, path: Path, handle: Callable[[ControlCommand], ControlReply]) -> None:
        self._path, self._handle = path, handle
        path.unlink(missing_ok=True)  # this process has the lock, so an existing socket file belongs to a dead process
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(8)
        except OSError as error:
            raise EnvironmentFault(f"cannot listen on {path}", str(error), "choose a shorter --run-dir") from None
        threading.Thread(target=self._serve, name="control socket", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection:
                try:
                    self._answer(connection)
                except OSError as error:
                    log.debug("control connection: %s", error)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_PATIENCE_S)
        uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in (0, os.geteuid()):
            return
        try:
            answer = self._handle(msgspec.json.decode(_receive(connection), type=ControlCommand))
        except msgspec.DecodeError as error:
            answer = ControlReply(code=Rejected.code, message=str(error))
        except TriremeError as error:
            answer = ControlReply(code=error.code, message=str(error), hint=error.hint)
        connection.sendall(msgspec.json.encode(answer) + b"\n")

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _receive(connection: socket.socket) -> bytes:
    """One line, bounded."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            break
        data += part
        if len(data) > _LIMIT:
            raise OSError("a control message is too long")
    return bytes(data)


class ControlClient:
    """Client of a running deployment in another process. Every call raises :class:`EnvironmentFault` if the deployment does not answer."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path

    def _ask(self, command: ControlCommand) -> ControlReply:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PATIENCE_S)
                connection.connect(str(self._path))
                connection.sendall(msgspec.json.encode(command) + b"\n")
                answer = msgspec.json.decode(_receive(connection), type=ControlReply)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NotFound(
                f"the deployment {self.name} does not run", f"nobody listens on {self._path}", "`trireme status` shows what runs"
            ) from None
        except (OSError, msgspec.DecodeError) as error:
            raise EnvironmentFault(
                f"the deployment {self.name} does not answer", str(error), f"ask again; its log is {self._path.parent / 'host.log'}"
            ) from None
        if answer.code:
            fault = from_code(answer.code, answer.message)
            fault.hint = answer.hint
            raise fault
        return answer

    def status(self) -> DeploymentStatus:
        answer = self._ask(ControlCommand(do="status"))
        assert answer.status is not None
        return answer.status

    def hardware(self) -> ClusterHardware:
        """The hardware of the replicas. Raises :class:`Rejected` before it is known."""
        answer = self._ask(ControlCommand(do="hardware"))
        assert answer.hardware is not None
        return answer.hardware

    def drain(self, replica: str) -> None:
        """Let one replica finish its requests and end, then launch it again. Raises :class:`NotFound` if it does not run."""
        self._ask(ControlCommand(do="drain", name=replica))

    def update(self, config: Config, said: Sequence[str], *, dry_run: bool = False) -> UpdateReport:
        """Begin an update to ``config``; ``status`` shows its progress. Raises :class:`ConfigError` naming what cannot be changed in place,
        :class:`Rejected` while another update runs."""
        answer = self._ask(ControlCommand(do="update", update=UpdateCommand(config=config, said=tuple(said), dry_run=dry_run)))
        assert answer.update is not None
        return answer.update

    def down(self, *, now: bool = False, timeout_s: float = 120.0) -> None:
        """Stop the deployment and wait until its process is gone."""
        pid = self.status().pid
        self._ask(ControlCommand(do="down", now=now))
        deadline = time.monotonic() + timeout_s
        while alive(pid):
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"the deployment {self.name} still runs",
                    f"pid {pid} did not end within {timeout_s:.0f} s",
                    f"trireme down {self.name} --now",
                )
            time.sleep(0.05)


def connect(name: str, run_dir: str | Path = DEFAULT_RUN_DIR) -> ControlClient:
    """The deployment ``name`` under ``run_dir``. Does not connect: the first call fails if the deployment does not run."""
    return ControlClient(name, Path(run_dir).expanduser().absolute() / name / "control.sock")
