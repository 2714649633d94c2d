"""Router processes of one deployment: plain children, started again with back-off, asked about themselves over their own RPC door.

Owns the processes and what they last said. Never a child of Ray, never between a client and its tokens.
"""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from orchestrator.launch.child import Child
from orchestrator.launch.gang import write_private
from orchestrator.spec import RouterSpec
from workers.errors import ConfigError, EnvironmentFault, TriremeError
from workers.sockets import KeyPair
from workers.spec import RouterAddress
from workers.wire import HIGH_WATER, MAX_FRAME, Query, Report, decode_to_client, encode

log = logging.getLogger("trireme.routers")
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_S = 30.0
_ASK_EVERY_S = 0.5
_ANSWER_MS = 1000
#: After the grace: to tell every client that it is over.
_LAST_WORD_S = 3.0
#: Longer than a leader needs to find a new router.
_UNHEARD_S = 10.0


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    """What a router writes into its state file."""

    name: str
    pid: int
    phase: Literal["starting", "serving", "draining", "stopped"]
    http: str = ""


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """One replica in one router's eyes (the router says more)."""

    name: str
    state: str
    epoch: int
    reason: str = ""
    quarantined: bool = False
    tok_s: float = 0.0
    running: int = 0
    waiting: int = 0


class RouterReport(msgspec.Struct, frozen=True, kw_only=True):
    """One router's answer: requests that wait for a replica by model, requests placed, replicas."""

    router: str
    queue: dict[str, int] = {}
    running: int = 0
    replicas: list[ReplicaReport] = []


class _Router:
    """One process and its successors."""

    def __init__(self, spec: RouterSpec, folder: Path, env: Mapping[str, str]) -> None:
        self.spec, self._env = spec, env
        self._file = folder / f"{spec.name}.json"
        self.log = folder / f"{spec.name}.log"
        self.child: Child | None = None
        self.begun = 0.0
        self.deaths = 0
        self.due = 0.0
        self.was_ready = False

    def start(self) -> None:
        Path(self.spec.state_file).unlink(missing_ok=True)
        write_private(self._file, msgspec.json.encode(self.spec))
        argv = [sys.executable, "-m", "orchestrator.cli.router", str(self._file)]
        self.child = Child(argv, env=self._env, cwd="/", log=self.log)
        self.begun = time.monotonic()

    def state(self) -> RouterState | None:
        """What the living process says; None before it said anything."""
        try:
            state = msgspec.json.decode(Path(self.spec.state_file).read_bytes(), type=RouterState)
        except (OSError, msgspec.DecodeError):
            return None
        return state if self.child is not None and state.pid == self.child.pid else None

    def last_words(self) -> tuple[str, str, str]:
        """(error, why, hint) of the log's end."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-30:]
        except OSError:
            lines = []
        said = {label: text.strip() for line in lines for label, _, text in [line.partition(":")] if label in ("error", "why", "hint")}
        return said.get("error", lines[-1] if lines else "it said nothing"), said.get("why", ""), said.get("hint", f"see {self.log}")


class RouterGroup:
    """All routers of a deployment. ``tick`` is called by the deployment's loop; a thread of its own asks them how they are."""

    def __init__(self, specs: Sequence[RouterSpec], folder: Path, *, env: Mapping[str, str], client: KeyPair, router: KeyPair) -> None:
        self._routers = [_Router(spec, folder, env) for spec in specs]
        self._client, self._router_key = client, router
        self._reports: dict[str, tuple[float, RouterReport]] = {}
        self._unheard: dict[tuple[str, int], float] = {}
        self._closing = threading.Event()
        self._asking = threading.Thread(target=self._ask_all, name="router reports", daemon=True)

    def start(self) -> None:
        for router in self._routers:
            router.start()
        self._asking.start()

    def tick(self) -> None:
        """Restart the dead. Raises the router's own error when one dies before it was ever ready: a taken port does not get better."""
        now = time.monotonic()
        for router in self._routers:
            child = router.child
            state = router.state()
            router.was_ready |= state is not None and state.phase != "starting"
            if child is not None and child.returncode is not None:
                if not router.was_ready:
                    what, why, hint = router.last_words()
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
        except EnvironmentFault as fault:  # a full disk is no reason to end those that live
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
        """The RPC doors."""
        key = self._router_key.public
        return tuple(RouterAddress(endpoint=r.spec.rpc, server_key=key if r.spec.rpc.startswith("tcp") else "") for r in self._routers)

    def pids(self) -> dict[str, int]:
        return {router.spec.name: router.child.pid for router in self._routers if router.child is not None}

    def reports(self) -> list[RouterReport]:
        """What living routers said within the last seconds."""
        horizon = time.monotonic() - 4 * _ASK_EVERY_S - _ANSWER_MS / 1000
        return [report for at, report in list(self._reports.values()) if at >= horizon]

    def hung(self, ready: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """Those of the ``ready`` gangs, (replica, epoch), that serve nobody: lost to every router that knows them, or 10 s unheard of."""
        reports = self.reports()
        states: dict[tuple[str, int], set[str]] = {}
        for report in reports:
            for replica in report.replicas:
                states.setdefault((replica.name, replica.epoch), set()).add(replica.state)
        now = time.monotonic()
        # A gang may stop before its Hello: no router can lose what it never had.
        all_speak = len(reports) == len(self._routers)
        self._unheard = {key: self._unheard.get(key, now) for key in ready if all_speak and key not in states}
        silent = {key for key, since in self._unheard.items() if now - since > _UNHEARD_S}
        return frozenset(silent | {key for key, seen in states.items() if seen == {"lost"}})

    def stop(self, grace_s: float) -> None:
        """SIGTERM, which finishes what runs; after the grace a second one, which ends it with a last word; then SIGKILL."""
        self._closing.set()
        living = [router.child for router in self._routers if router.child is not None]
        for child in living:
            child.signal(signal.SIGTERM)
        for bound_s in (grace_s, _LAST_WORD_S if grace_s else 0.0):
            deadline = time.monotonic() + bound_s
            late = [child for child in living if child.wait(max(0.0, deadline - time.monotonic())) is None]
            for child in late:
                child.signal(signal.SIGTERM)
        for child in late:
            child.signal(signal.SIGKILL, group=True)
            child.wait(5.0)
        for router in self._routers:
            # A killed process leaves its socket files; a successor would reclaim them, and there is none.
            for endpoint in (router.spec.back, router.spec.rpc):
                if endpoint.startswith("ipc://"):
                    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        if self._asking.is_alive():
            self._asking.join(5.0)

    def _ask_all(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        try:
            while not self._closing.wait(_ASK_EVERY_S):
                for address, router in zip(self.addresses(), self._routers, strict=True):
                    state = router.state()
                    if state is None or state.phase != "serving":
                        continue
                    try:
                        report = ask(context, address, self._client)
                    except TriremeError as error:
                        log.debug("router %s: %s", router.spec.name, error)
                        continue
                    if report is not None:
                        self._reports[router.spec.name] = (time.monotonic(), report)
        finally:
            context.destroy(linger=0)


def ask(context: zmq.Context[Any], address: RouterAddress, key: KeyPair) -> RouterReport | None:
    """One ``Query`` for ``status``; None when the router does not answer within a second."""
    socket = context.socket(zmq.DEALER)
    try:
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = HIGH_WATER
        socket.maxmsgsize = MAX_FRAME
        if address.server_key:
            socket.curve_serverkey = address.server_key.encode()
            socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
        socket.connect(address.endpoint)
        socket.send(encode(Query(boot=secrets.token_hex(8), stream=1, what="status")))
        if not socket.poll(_ANSWER_MS):
            return None
        answer = decode_to_client(socket.recv())
        return msgspec.json.decode(answer.body, type=RouterReport) if isinstance(answer, Report) else None
    except (zmq.ZMQError, msgspec.DecodeError) as error:
        raise EnvironmentFault("a router gives no status", str(error)) from None
    finally:
        socket.close()
