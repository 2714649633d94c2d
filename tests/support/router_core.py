"""A router core and its events, built for tests: the core itself, replicas that join, requests, and what replicas answer."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.request_state import Action, SendMessage
from orchestrator.router.core.router_core import RouterCore
from workers.protocol.messages import (
    PROTOCOL,
    Accepted,
    Attach,
    Capacity,
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


def beat(**change: Any) -> Heartbeat:
    """``change``: fields of the heartbeat or of its stats."""
    stats = {name: change.pop(name) for name in EngineStats.__struct_fields__ if name in change}
    base = Heartbeat(boot="b1", step=3, busy_ms=0.0, predicted_ms=10.0, stats=EngineStats(**{"free_blocks": 8, **stats}))
    return msgspec.structs.replace(base, **change)


ADMISSION = AdmissionSpec(max_queue=2, queue_timeout_s=5.0, request_timeout_s=100.0)


def router(**admission: Any) -> RouterCore:
    spec = msgspec.structs.replace(ADMISSION, **admission)
    return RouterCore(RouterHeartbeat(boot="R", router="r"), {"m": "m", "alias": "m"}, spec, ReplicaRegistry(2.0, 10.0))


def join(route: RouterCore, name: str, *, epoch: int = 1, rows: int = 4, now: float = 0.0, **change: Any) -> bytes:
    capacity = msgspec.structs.replace(CAPACITY, max_batch_size=rows, num_blocks=1000, **change)
    hello = msgspec.structs.replace(HELLO, replica=name, boot=f"{name}{epoch}", epoch=epoch, capacity=capacity)
    route.hear(name.encode(), "", hello, now)
    return name.encode()


def ask(prompt: list[int] | None = None, **change: Any) -> RouterRequest:
    base = RouterRequest(client="c", request_id="q", model="m", prompt_ids=prompt or [1, 2, 3], params=SamplingParams(seed=7, max_tokens=8))
    return msgspec.structs.replace(base, **change)


def sent(actions: list[Action], kind: type) -> list[Any]:
    return [action.message for action in actions if isinstance(action, SendMessage) and isinstance(action.message, kind)]


def tokens(boot: str, submit: Submit | Attach, first: int, ids: list[int]) -> Tokens:
    return Tokens(boot=boot, streams=[submit.stream], attempts=[submit.attempt], firsts=[first], tokens=[ids])


def accept(route: RouterCore, *submits: Submit, place: str) -> None:
    """The replica ``place`` acknowledges what was sent to it."""
    for submit in submits:
        route.hear(place.encode(), "", Accepted(boot=f"{place}1", stream=submit.stream, attempt=submit.attempt), 0.0)
