"""One process of a replica's leader: the engine, stream table and links of :mod:`workers.serving.leader`, driven by the timeline.

Owns what the leader's two threads own. Events wait while a step runs, heartbeats do not; a frozen gang does nothing until it continues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from orchestrator.sim.schedule import SimSetup
from orchestrator.sim.sim_network import PULSE_S, SimConnection, SimNetwork, SimRouterEnd
from orchestrator.sim.timeline import Timeline
from workers.engines.fake import FakeEngine
from workers.protocol.errors import TriremeError
from workers.protocol.hang import hang_bound_ms
from workers.protocol.messages import (
    PROTOCOL,
    Accepted,
    Attach,
    Bye,
    Cancel,
    Credit,
    Done,
    Failed,
    FromReplica,
    Heartbeat,
    Hello,
    RouterHeartbeat,
    Submit,
    Tokens,
    ToReplica,
)
from workers.protocol.specs import FakeOptions, FakeSpec, Parallel
from workers.serving.router_link import CloseSocket, LinkAction, OpenSocket, RouterLink, RouterLost, SendHello
from workers.serving.stream_table import Action, BeginDrain, GrantCredit, SendToRouter, StartSequence, StopSequence, StreamTable

HEARTBEAT_S, HANG_FLOOR_S, ORPHAN_S = 0.25, 1.0, 1.0
BLOCK_SIZE = 8


class SimLauncher(Protocol):
    """Whoever launched the gang."""

    def ended(self, gang: SimReplica, why: str) -> None: ...


class SimPort:
    """The gang's end at one router address."""

    def __init__(self, gang: SimReplica, router: int, far: SimRouterEnd) -> None:
        self._gang, self._router, self._far = gang, router, far
        self.link = RouterLink()
        self.connection: SimConnection | None = None

    def carry_out(self, actions: list[LinkAction]) -> None:
        for action in actions:
            match action:
                case SendHello():
                    self.send(self._gang.hello())
                case RouterLost(boot=boot):
                    if self._gang.routes.get(boot) is self:
                        del self._gang.routes[boot]
                        self._gang.deliver(boot)
                case CloseSocket():
                    if self.connection is not None:
                        self.connection.close(flush=False)
                        self.connection = None
                case OpenSocket():
                    self.connection = self._gang.net.connect((self._gang.index, self._router), self, self._far)

    def send(self, message: FromReplica) -> None:
        if self.connection is not None and not self.connection.to_router(message):
            self.carry_out(self.link.broken(self._gang.now))

    # what the connection says, possibly while the gang is frozen

    def connected(self, connection: SimConnection) -> None:
        self._gang.run(lambda: self.carry_out(self.link.connected(self._gang.now)) if connection is self.connection else None)

    def broken(self, connection: SimConnection) -> None:
        self._gang.run(lambda: self.carry_out(self.link.broken(self._gang.now)) if connection is self.connection else None)

    def take(self, connection: SimConnection, message: ToReplica) -> None:
        self._gang.run(lambda: self._take(message) if connection is self.connection else None)

    def _take(self, message: ToReplica) -> None:
        self.carry_out(self.link.heard(message.boot, self._gang.now))
        if self.link.state != "live":
            return
        self._gang.routes[self.link.boot] = self
        if isinstance(message, Bye) and message.reason != "stale":
            self.carry_out(self.link.broken(self._gang.now))
        elif not isinstance(message, RouterHeartbeat):
            self._gang.deliver(message)


class SimReplica:
    """Starts with :meth:`start`, ends by :meth:`die` or by itself; then it is ``gone``, and its launcher knows."""

    def __init__(
        self,
        index: int,
        epoch: int,
        setup: SimSetup,
        *,
        timeline: Timeline,
        net: SimNetwork,
        routers: Sequence[SimRouterEnd],
        host: SimLauncher,
    ) -> None:
        self.index, self.epoch, self._timeline, self.net, self._host = index, epoch, timeline, net, host
        self.name, self.boot = f"r{index}", f"r{index}.{epoch}"
        spec = FakeSpec(
            block_size=BLOCK_SIZE, max_batch_size=setup.sequences, max_num_tokens=setup.tokens, kv_tokens=setup.blocks * BLOCK_SIZE,
            max_seq_len=setup.blocks * BLOCK_SIZE, options=FakeOptions(fake_step_ms=setup.step_ms),
        )  # fmt: skip
        self.engine = FakeEngine(spec, parallel=Parallel(pp=setup.stages), clock=lambda: timeline.now, sleep=lambda seconds: None)
        self.stream_table = StreamTable(boot=self.boot, model="m", orphan_s=ORPHAN_S, limit=1024)
        self.ports = [SimPort(self, i, far) for i, far in enumerate(routers)]
        #: Ports by the nonce of the router that lives there.
        self.routes: dict[str, SimPort] = {}
        #: Messages of routers, orders to drain, and nonces of lost routers.
        self._inbox: deque[tuple[float, ToReplica | BeginDrain | str]] = deque()
        self.gone = self.frozen = False
        self._backlog: list[Callable[[], None]] = []
        #: When the running step began, None between steps, and how long it should take, seconds.
        self._since: float | None = None
        self._predicted_s = 0.0
        self._steps = 0
        self._extra_s = 0.0
        self._hangs = False
        #: Its next protocol violation.
        self._lies: list[str] = []
        self._woken_at = -1.0

    @property
    def now(self) -> float:
        return self._timeline.now

    def run(self, call: Callable[[], None]) -> None:
        """Now, or when the gang runs again; never once it is gone."""
        if self.frozen:
            self._backlog.append(call)
        elif not self.gone:
            call()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timeline.after(seconds, partial(self.run, call))

    # --- faults

    def freeze(self, seconds: float) -> None:
        if self.gone or self.frozen:
            return
        self.frozen = True
        if seconds > PULSE_S:
            self._timeline.after(PULSE_S, self._fall_silent)
        self._timeline.after(seconds, self._thaw)

    def _fall_silent(self) -> None:
        for port in self.ports:
            if port.connection is not None:
                port.connection.sever()

    def _thaw(self) -> None:
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        for call in backlog:
            self.run(call)

    def hang(self) -> None:
        self._hangs = True

    def slow(self, seconds: float) -> None:
        self._extra_s += seconds

    def lie(self, kind: str) -> None:
        self._lies.append(kind)

    def _lies_now(self, kind: str) -> bool:
        """Whether to commit this violation now; each is committed once."""
        if kind in self._lies:
            self._lies.remove(kind)
            return True
        return False

    def drain(self, grace_s: float) -> None:
        self.deliver(BeginDrain(grace_s))

    def die(self, why: str, *, flush: bool = False) -> None:
        """At once; ``flush``: what it had sent still arrives."""
        if self.gone:
            return
        self.gone, self.frozen = True, False
        for port in self.ports:
            if port.connection is not None:
                port.connection.close(flush=flush)
        self._host.ended(self, why)

    def _farewell(self, why: str) -> None:
        """Every sequence continues elsewhere; then the gang ends in order."""
        self.stream_table.drain(self.now, 0.0)
        self._act(self.stream_table.expire(self.now))
        for port in self.ports:
            if port.link.up:
                port.send(Bye(boot=self.boot, reason=why))
        self.die(why, flush=True)

    # --- the I/O thread

    def start(self) -> None:
        self._beat()

    def _beat(self) -> None:
        busy_s = self.now - self._since if self._since is not None else 0.0
        if busy_s * 1000.0 > hang_bound_ms(HANG_FLOOR_S, self._predicted_s * 1000.0):
            self.die("no progress")
            return
        message = Heartbeat(
            boot=self.boot, step=self._steps, busy_ms=busy_s * 1000.0, predicted_ms=self._predicted_s * 1000.0,
            draining=self.stream_table.draining, stats=self.engine.stats(),
        )  # fmt: skip
        for port in self.ports:
            if port.link.up:
                port.send(message)
            port.carry_out(port.link.tick(self.now))
        self.turn()
        self.later(HEARTBEAT_S, self._beat)

    def hello(self) -> Hello:
        return Hello(
            boot=self.boot, protocol=PROTOCOL, replica=self.name, model="m", epoch=self.epoch, resume=self.engine.resume,
            capacity=self.engine.capacity,
        )  # fmt: skip

    def deliver(self, event: ToReplica | BeginDrain | str) -> None:
        self._inbox.append((self.now, event))
        self.later(0.0, self.turn)

    # --- the engine thread

    def turn(self) -> None:
        """Its work between two steps, or after an event while it was idle."""
        if self.gone or self._since is not None:
            return
        while self._inbox and not self.gone:
            self._handle(*self._inbox.popleft())
        if self.gone:
            return
        self._act(self.stream_table.expire(self.now))
        if self.stream_table.draining and not len(self.stream_table):
            self._farewell("drained")
        elif self.engine.busy():
            self._step()
        elif (due := self.stream_table.next_due()) is not None and due != self._woken_at:
            self._woken_at = due
            self.later(max(0.0, due - self.now), self.turn)

    def _handle(self, received: float, event: ToReplica | BeginDrain | str) -> None:
        match event:
            case Submit():
                self._act(self.stream_table.submit(event, received))
            case Attach():
                self._act(self.stream_table.attach(event))
            case Cancel():
                self._act(self.stream_table.cancel(event))
            case Credit():
                self._act(self.stream_table.credit(event))
            case str():
                self.stream_table.router_lost(event, received)
            case BeginDrain(grace_s=grace_s):
                self.stream_table.drain(received, grace_s)
            case Bye():
                self._farewell("stale")
            case _:
                raise AssertionError(f"a gang does not expect {event}")

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendToRouter(router_boot=router_boot, message=message):
                    self._post(router_boot, message)
                case StartSequence(id=id, submit=submit):
                    try:
                        if not self._lies_now("swallow"):
                            self.engine.submit(id, submit)
                    except TriremeError as error:
                        self._act(self.stream_table.refused(id, error))
                    else:
                        self._act(self.stream_table.started(id))
                case StopSequence(id=id):
                    self.engine.cancel(id)
                case GrantCredit(id=id, tokens=tokens):
                    self.engine.credit(id, tokens)

    def _post(self, router_boot: str, message: Accepted | Tokens | Done | Failed) -> None:
        port = self.routes.get(router_boot)
        if isinstance(message, Tokens) and any(message.tokens):
            message = self._distort(message)
        elif isinstance(message, Done) and self._lies_now("no_end"):
            return
        elif isinstance(message, Done) and message.usage.output_tokens and self._lies_now("few"):
            message = msgspec.structs.replace(message, usage=msgspec.structs.replace(message.usage, output_tokens=0))
        if port is not None:
            port.send(message)

    def _distort(self, message: Tokens) -> Tokens:
        vocab = self.engine.capacity.vocab_size
        tokens = message.tokens
        if self._lies_now("ids"):
            tokens = [[*ids[:-1], vocab] for ids in tokens]
        if self._lies_now("more"):
            tokens = [ids + [0] * 100 for ids in tokens]
        return message if tokens is message.tokens else msgspec.structs.replace(message, tokens=tokens, logprobs=None)

    def _step(self) -> None:
        self._steps += 1
        self._since, self._predicted_s = self.now, self.engine.predicted_ms() / 1000.0
        if self._hangs:
            return
        seconds, self._extra_s = self._predicted_s + self._extra_s, 0.0
        self.later(seconds, self._step_done)

    def _step_done(self) -> None:
        emissions = self.engine.step()
        self._since = None
        self._act(self.stream_table.emitted(emissions))
        self.turn()

    # --- proof

    def check(self) -> None:
        self.stream_table.check()

    def check_idle(self) -> None:
        """Assert that nothing is left of any request."""
        stats = self.engine.stats()
        assert not len(self.stream_table), f"{self.boot} holds sequences of {self.stream_table.live()}"
        assert stats.running == stats.waiting == 0, f"{self.boot}: {stats.running} sequences run and {stats.waiting} wait"
        blocks = self.engine.capacity.num_blocks
        assert stats.free_blocks == blocks, f"{self.boot}: {blocks - stats.free_blocks} blocks leaked"
