"""A routing core driven event by event, and the messages of replicas that a test plays. Reads no clock: every call has its time."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.actions import Action, DeliverTokens, SendMessage
from orchestrator.router.core.events import (
    AbortAll,
    AddCredit,
    CancelRequest,
    PeerUnreachable,
    ReplicaMessage,
    RouterEvent,
    StopAccepting,
    StopChoice,
    SubmitRequest,
    Tick,
)
from orchestrator.router.core.policy import RoutingPolicy
from orchestrator.router.core.recorder import EventRecorder
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.router_core import ACCEPT_S, RouterCore
from orchestrator.router.core.session_table import session_key
from workers.protocol.messages import (
    PROTOCOL,
    Accepted,
    Attach,
    Capacity,
    FromReplica,
    Heartbeat,
    Hello,
    RouterHeartbeat,
    SamplingParams,
    Submit,
    Tokens,
)
from workers.protocol.status import EngineStats

CAPACITY = Capacity(block_size=16, num_blocks=8, max_batch_size=4, max_num_tokens=64, max_seq_len=512, vocab_size=320, tp=1, pp=1)
HELLO = Hello(boot="b1", protocol=PROTOCOL, replica="a", model="m", epoch=5, resume="bitwise", capacity=CAPACITY)
ADMISSION = AdmissionSpec(max_queue=2, queue_timeout_s=5.0, request_timeout_s=100.0)


class CoreDriver:
    """One core, with one method per event. The core's actions are collected until :meth:`take`."""

    def __init__(self, core: RouterCore) -> None:
        self.core = core
        self.registry, self.stats, self.counts = core.registry, core.stats, core.counts
        self._requests = 0
        self._actions: list[Action] = []
        self._recorder: EventRecorder | None = None

    def record(self, **bounds: int) -> EventRecorder:
        """Drive the core through a recorder from now on."""
        self._recorder = EventRecorder(self.core, **bounds)
        return self._recorder

    def handle(self, event: RouterEvent, now: float) -> None:
        self._actions += (self._recorder or self.core).handle(event, now)

    def submit(self, request: RouterRequest, now: float) -> int:
        """The id of the request, to which all that is delivered for it is addressed. Raises as :meth:`RouterCore.handle`."""
        self._requests += 1
        self.handle(SubmitRequest(id=self._requests, request=request, session=session_key(request)), now)
        return self._requests

    def cancel(self, id: int, now: float) -> None:
        self.handle(CancelRequest(id=id), now)

    def stop_choice(self, id: int, choice: int, now: float) -> None:
        self.handle(StopChoice(id=id, choice=choice), now)

    def credit(self, id: int, tokens: int, now: float = 0.0) -> None:
        self.handle(AddCredit(ids=[id], tokens=[tokens]), now)

    def hear(self, peer: bytes, user: str, message: FromReplica, now: float) -> None:
        self.handle(ReplicaMessage(peer=peer, user=user, message=message), now)

    def unreachable(self, peer: bytes, now: float) -> None:
        self.handle(PeerUnreachable(peer=peer), now)

    def tick(self, now: float) -> None:
        self.handle(Tick(), now)

    def stop_accepting(self) -> None:
        self.handle(StopAccepting(), 0.0)

    def abort(self, now: float) -> None:
        self.handle(AbortAll(), now)

    def take(self) -> list[Action]:
        """The core's actions since the last call."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def live(self) -> int:
        return self.core.live

    @property
    def placed(self) -> int:
        return self.core.placed

    def check(self) -> None:
        self.core.check()


def router(policy: RoutingPolicy | None = None, **admission: Any) -> CoreDriver:
    """A core that serves the model ``m`` under :data:`ADMISSION`, with changes."""
    spec = msgspec.structs.replace(ADMISSION, **admission)
    greeting = RouterHeartbeat(boot="R", router="r")
    return CoreDriver(RouterCore(greeting, ["m"], spec, ReplicaRegistry(2.0, 10.0), accept_s=ACCEPT_S, policy=policy))


def beat(**change: Any) -> Heartbeat:
    """A heartbeat of the process that says :data:`HELLO`, with changes of its own fields or of its stats."""
    stats = {name: change.pop(name) for name in EngineStats.__struct_fields__ if name in change}
    base = Heartbeat(boot="b1", step=3, busy_ms=0.0, predicted_ms=10.0, stats=EngineStats(**{"free_blocks": 8, **stats}))
    return msgspec.structs.replace(base, **change)


def hello_of(name: str, *, epoch: int = 1, max_batch_size: int = 4, **change: Any) -> Hello:
    """The Hello of replica ``name``, of a process with the nonce ``name`` + ``epoch``; ``change``: of its capacity."""
    capacity = msgspec.structs.replace(CAPACITY, max_batch_size=max_batch_size, num_blocks=1000, **change)
    return msgspec.structs.replace(HELLO, replica=name, boot=f"{name}{epoch}", epoch=epoch, capacity=capacity)


def join(route: CoreDriver, name: str, *, now: float = 0.0, **change: Any) -> bytes:
    """Replica ``name`` says :func:`hello_of`; returns its address."""
    route.hear(name.encode(), "", hello_of(name, **change), now)
    return name.encode()


def ask(prompt: list[int] | None = None, **change: Any) -> RouterRequest:
    """A request of 8 tokens, with changes."""
    base = RouterRequest(client="c", request_id="q", model="m", prompt_ids=prompt or [1, 2, 3], params=SamplingParams(seed=7, max_tokens=8))
    return msgspec.structs.replace(base, **change)


def sent(actions: list[Action], kind: type) -> list[Any]:
    """The messages of ``kind`` that go to replicas."""
    return [action.message for action in actions if isinstance(action, SendMessage) and isinstance(action.message, kind)]


def delivered(route: CoreDriver) -> list[tuple[int, list[int]]]:
    """(first, tokens) of each delivery that waits."""
    return [(first, tokens) for a in route.take() if isinstance(a, DeliverTokens) for _, _, first, tokens, _ in a.deliveries]


def where(actions: list[Action]) -> list[bytes]:
    """The addresses to which choices are submitted."""
    return [action.peer for action in actions if isinstance(action, SendMessage) and isinstance(action.message, Submit)]


def tokens(boot: str, submit: Submit | Attach, first: int, ids: list[int]) -> Tokens:
    """What the process ``boot`` emitted for one attempt."""
    return Tokens(boot=boot, streams=[submit.stream], attempts=[submit.attempt], firsts=[first], tokens=[ids])


def accept(route: CoreDriver, *submits: Submit, place: str) -> None:
    """The replica ``place`` acknowledges what was sent to it."""
    for submit in submits:
        route.hear(place.encode(), "", Accepted(boot=f"{place}1", stream=submit.stream, attempt=submit.attempt), 0.0)
