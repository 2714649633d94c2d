"""Router processes of one deployment: child processes that are restarted with back-off.

Owns the processes. They are never children of Ray. No token passes through this module.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from orchestrator.auth.keyring import LOCAL_CLIENT, KeyRing
from orchestrator.config.router_spec import RouterSpec
from orchestrator.control.host.router_poller import RouterPoller
from orchestrator.control.launch.subprocesses import ChildProcess
from orchestrator.files import write_private
from orchestrator.router.signals import STOP
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.specs import RouterAddress
from workers.protocol.status import RouterState, RouterStatus

log = logging.getLogger("trireme.routers")
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_S = 30.0
#: Additional time after the grace, in which the router sends every client the end of its requests, seconds.
_LAST_MESSAGES_S = 3.0


class _Router:
    """One router: its process and the successors."""

    def __init__(self, spec: RouterSpec, folder: Path, env: Mapping[str, str]) -> None:
        self.spec, self._env = spec, env
        self._file = folder / f"{spec.name}.json"
        self.log = folder / f"{spec.name}.log"
        self.child: ChildProcess | None = None
        self.begun = 0.0
        self.deaths = 0
        self.due = 0.0
        self.was_ready = False

    def start(self) -> None:
        Path(self.spec.state_file).unlink(missing_ok=True)
        write_private(self._file, msgspec.json.encode(self.spec))
        argv = [sys.executable, "-m", "orchestrator.router", str(self._file)]
        self.child = ChildProcess(argv, env=self._env, cwd="/", log=self.log)
        self.begun = time.monotonic()

    def state(self) -> RouterState | None:
        """The state file of the living process; None before the process has written it."""
        try:
            state = msgspec.json.decode(Path(self.spec.state_file).read_bytes(), type=RouterState)
        except (OSError, msgspec.DecodeError):
            return None
        return state if self.child is not None and state.pid == self.child.pid else None

    def last_error(self) -> tuple[str, str, str]:
        """(error, why, hint) from the end of its log."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-30:]
        except OSError:
            lines = []
        said = {label: text.strip() for line in lines for label, _, text in [line.partition(":")] if label in ("error", "why", "hint")}
        return said.get("error", lines[-1] if lines else "it said nothing"), said.get("why", ""), said.get("hint", f"see {self.log}")


class OwnRouters:
    """All routers of a deployment. ``tick`` is called by the deployment's loop. ``keys``: the key ring with the routers' key pair and a
    client's."""

    def __init__(self, specs: Sequence[RouterSpec], folder: Path, *, env: Mapping[str, str], keys: KeyRing) -> None:
        self._routers = [_Router(spec, folder, env) for spec in specs]
        self._server_key = keys.pair("router", "all").public
        self._reports = RouterPoller(self._serving, keys.pair("client", LOCAL_CLIENT))
        #: The key file for RPC clients on this host.
        self.key_file = keys.path("client", LOCAL_CLIENT)

    def start(self) -> None:
        for router in self._routers:
            router.start()
        self._reports.start()

    def tick(self) -> None:
        """Restart dead routers. Raises the router's own error if it died before it was ever ready, because a retry would not help (a port
        in use)."""
        now = time.monotonic()
        for router in self._routers:
            child = router.child
            state = router.state()
            router.was_ready |= state is not None and state.phase in ("serving", "draining")
            if child is not None and child.returncode is not None:
                if not router.was_ready:
                    what, why, hint = router.last_error()
                    kind = ConfigError if child.returncode == ConfigError.exit_code else EnvironmentFault
                    raise kind(f"router {router.spec.name} does not start: {what}", why, hint)
                router.deaths = 0 if now - router.begun > _STABLE_S else router.deaths + 1
                router.due = now + _BACKOFF_S[min(router.deaths, len(_BACKOFF_S) - 1)]
                log.error("router %s (pid %d) ended with %d; starting it again", router.spec.name, child.pid, child.returncode)
                router.child = None
            if router.child is None and now >= router.due:
                self._restart(router, now)

    @staticmethod
    def _restart(router: _Router, now: float) -> None:
        try:
            router.start()
        except EnvironmentFault as fault:  # a full disk must not end the living routers
            router.deaths += 1
            router.due = now + _BACKOFF_S[min(router.deaths, len(_BACKOFF_S) - 1)]
            log.error("router %s cannot be started again: %s", router.spec.name, fault)

    def ready(self) -> bool:
        return all((state := router.state()) is not None and state.phase == "serving" for router in self._routers)

    def url(self) -> str:
        """The HTTP address, empty before a router is up."""
        states = [router.state() for router in self._routers]
        return next((state.http for state in states if state is not None and state.http), "")

    def addresses(self) -> tuple[RouterAddress, ...]:
        """The addresses of the RPC servers."""
        key = self._server_key
        return tuple(RouterAddress(endpoint=r.spec.rpc, server_key=key if r.spec.rpc.startswith("tcp") else "") for r in self._routers)

    def pids(self) -> dict[str, int]:
        return {router.spec.name: router.child.pid for router in self._routers if router.child is not None}

    def reports(self) -> list[RouterStatus]:
        """Reports of living routers from the last seconds."""
        return self._reports.fresh()

    def hung(self, ready: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """As :meth:`RouterPoller.hung`."""
        return self._reports.hung(ready, routers=len(self._routers))

    def stop(self, grace_s: float) -> None:
        """Send :data:`STOP`, so that routers finish running requests; after the grace send it again, so that they end them; then
        SIGKILL."""
        self._reports.close()
        living = [router.child for router in self._routers if router.child is not None]
        for child in living:
            child.signal(STOP)
        for bound_s in (grace_s, _LAST_MESSAGES_S if grace_s else 0.0):
            deadline = time.monotonic() + bound_s
            late = [child for child in living if child.wait(max(0.0, deadline - time.monotonic())) is None]
            for child in late:
                child.signal(STOP)
        for child in late:
            child.signal(signal.SIGKILL, group=True)
            child.wait(5.0)
        for router in self._routers:
            # A killed process leaves its socket files. They are removed here, because there is no successor that would reuse them.
            for endpoint in (router.spec.back, router.spec.rpc):
                if endpoint.startswith("ipc://"):
                    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        self._reports.join()

    def _serving(self) -> Iterator[tuple[str, RouterAddress]]:
        for address, router in zip(self.addresses(), self._routers, strict=True):
            state = router.state()
            if state is not None and state.phase == "serving":
                yield router.spec.name, address
