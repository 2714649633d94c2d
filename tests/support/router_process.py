"""Real router processes for tests: ``python -m orchestrator.router`` on a tiny tokenizer, over ipc or CURVE tcp.

Owns the processes that it starts and ends them by pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from orchestrator.config.router_spec import AdmissionSpec, HttpSpec, ModelCard, RouterSpec
from tests.support.gang import MPIEXEC, processes_of, wait_for
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol.specs import FakeSpec, ReplicaSpec, RouterAddress
from workers.protocol.status import RouterState


class RouterRun:
    """One router process serving the model ``m``. As a context manager it leaves no process behind."""

    def __init__(
        self, folder: Path, name: str = "router0", *, back: str = "", rpc: str = "", http: bool | HttpSpec = False, **spec: Any
    ) -> None:
        tokenizer = folder / "tokenizer"
        if not tokenizer.exists():
            tokenizer.mkdir()
            tiny_tokenizer(tokenizer)
        self.state_file = folder / f"{name}.state"
        self.log = folder / f"{name}.log"
        self.spec = RouterSpec(
            name=name,
            back=back or f"ipc://{folder}/{name}.back",
            rpc=rpc or f"ipc://{folder}/{name}.rpc",
            models=(ModelCard(name="m", tokenizer=str(tokenizer)),),
            http=http if isinstance(http, HttpSpec) else HttpSpec(port=0) if http else None,
            admission=spec.pop("admission", AdmissionSpec()),
            state_file=str(self.state_file),
            **spec,
        )
        file = folder / f"{name}.json"
        file.write_bytes(msgspec.json.encode(self.spec))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "orchestrator.router", str(file)], stdout=log, stderr=log)

    def __enter__(self) -> RouterRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if error is not None:
            print(f"--- {self.spec.name}\n{self.log.read_text()}")

    @property
    def state(self) -> RouterState | None:
        try:
            return msgspec.json.decode(self.state_file.read_bytes(), type=RouterState)
        except FileNotFoundError:
            return None

    def wait_serving(self) -> RouterState:
        def serving() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            state = self.state
            return state is not None and state.phase == "serving" and state.pid == self.process.pid

        wait_for(serving, what="the router")
        state = self.state
        assert state is not None
        return state

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def terminate(self) -> int:
        """Exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(20)


@contextlib.contextmanager
def curve_replica(folder: Path, name: str, router: RouterAddress, key_file: Path) -> Iterator[None]:
    """A one-rank FakeEngine replica that speaks CURVE to ``router``; killed with its whole session at the end."""
    run_dir = folder / f"curve-{name}"
    run_dir.mkdir(mode=0o700)
    spec = ReplicaSpec(
        name=name,
        model="m",
        artifact="",
        epoch=1,
        engine=FakeSpec(),
        routers=(router,),
        run_dir=str(run_dir),
        key_file=str(key_file),
    )
    file = run_dir / "spec.json"
    file.write_bytes(msgspec.json.encode(spec))
    file.chmod(0o600)
    command = [MPIEXEC, "-n", "1", sys.executable, "-m", "workers", "--spec", str(file)]
    gang = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        for pid in processes_of(gang.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        gang.wait(10)
