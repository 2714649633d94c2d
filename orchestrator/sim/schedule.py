"""The schedule of one run, as a value: the deployment, the requests, the faults, each with its time.

Owns the vocabulary, its JSON (what a failed run prints and a file replays) and how a schedule is drawn from a seed. All other randomness of
a run (delays, repeats) comes from ``SimSetup.noise``, so equal schedules run equally.
"""

from __future__ import annotations

from random import Random
from typing import Literal, TypeAlias

import msgspec

#: Requests and faults occur within this time, seconds; after that the system must recover.
HORIZON_S = 6.0
LieKind: TypeAlias = Literal["swallow", "no_end", "ids", "more", "few"]
LIES: tuple[LieKind, ...] = ("swallow", "no_end", "ids", "more", "few")


class SimSetup(msgspec.Struct, frozen=True, kw_only=True):
    """``sequences``, ``blocks``, ``tokens``, ``stages``: a replica's limits. ``repeats``: share of messages that arrive twice.
    ``max_queue``: choices that wait at a router at most."""

    routers: int
    replicas: int
    sequences: int
    blocks: int
    tokens: int
    stages: int
    step_ms: float
    repeats: float
    noise: int
    max_queue: int = 4


class Arrive(msgspec.Struct, frozen=True, kw_only=True, tag="arrive"):
    """A client sends a request. ``frontend`` http: its connection ends with the router and it sends the request again; rpc: it has the
    journal and continues.

    ``credit`` 0 = unlimited, else the window, granted again ``pace_s`` after it was read.
    """

    at: float
    id: int
    frontend: Literal["http", "rpc"]
    router: int
    prompt: list[int]
    n: int = 1
    max_tokens: int = 8
    temperature: float = 0.0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    credit: int = 0
    pace_s: float = 0.0
    deadline_s: float | None = None
    tenant: str = ""
    priority: int = 0


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """A client cancels, or with a ``choice`` ends that one alone, as a stop string does."""

    at: float
    id: int
    choice: int | None = None


class Wander(msgspec.Struct, frozen=True, kw_only=True, tag="wander"):
    """An RPC client gets nothing from its living router and continues at another; the first router notices 2 s later."""

    at: float
    id: int


class KillReplica(msgspec.Struct, frozen=True, kw_only=True, tag="kill"):
    """A gang dies and is launched again."""

    at: float
    gang: int


class Freeze(msgspec.Struct, frozen=True, kw_only=True, tag="freeze"):
    """SIGSTOP of a whole gang, and SIGCONT ``seconds`` later."""

    at: float
    gang: int
    seconds: float


class Hang(msgspec.Struct, frozen=True, kw_only=True, tag="hang"):
    """The next step never ends; heartbeats go on."""

    at: float
    gang: int


class Slow(msgspec.Struct, frozen=True, kw_only=True, tag="slow"):
    """The next step takes ``seconds`` more."""

    at: float
    gang: int
    seconds: float


class CutConnection(msgspec.Struct, frozen=True, kw_only=True, tag="cut"):
    """No message passes between a gang and a router; after 1.5 s both close the connection."""

    at: float
    gang: int
    router: int
    seconds: float


class LoseTokens(msgspec.Struct, frozen=True, kw_only=True, tag="lose"):
    """The next Tokens message from a gang to a router vanishes."""

    at: float
    gang: int
    router: int


class Lie(msgspec.Struct, frozen=True, kw_only=True, tag="lie"):
    """A gang violates the protocol once: it forgets a sequence that it accepted (``swallow``), keeps an end to itself (``no_end``), sends
    ids that no model has (``ids``), more tokens than were asked for (``more``), or an end that counts too few (``few``)."""

    at: float
    gang: int
    kind: LieKind


class DrainReplica(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """A gang is ordered to drain, ends, and is launched again."""

    at: float
    gang: int
    grace_s: float


class Usurp(msgspec.Struct, frozen=True, kw_only=True, tag="usurp"):
    """A newer epoch of a gang starts while the old one lives."""

    at: float
    gang: int


class Crash(msgspec.Struct, frozen=True, kw_only=True, tag="crash"):
    """A router is killed, and another takes its address ``seconds`` later."""

    at: float
    router: int
    seconds: float


class StopRouter(msgspec.Struct, frozen=True, kw_only=True, tag="close"):
    """A router is ordered to stop: it accepts nothing new, ends remaining requests after ``grace_s``, and starts again ``seconds``
    later."""

    at: float
    router: int
    grace_s: float
    seconds: float


Event: TypeAlias = (
    Arrive
    | Leave
    | Wander
    | KillReplica
    | Freeze
    | Hang
    | Slow
    | CutConnection
    | LoseTokens
    | Lie
    | DrainReplica
    | Usurp
    | Crash
    | StopRouter
)


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """``events``: in the order of their times."""

    setup: SimSetup
    events: list[Event]


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    chance = Random(seed)
    setup = SimSetup(
        routers=chance.choice((1, 2, 2)),
        replicas=chance.choice((1, 2, 2, 3)),
        sequences=chance.choice((2, 3, 4)),
        blocks=chance.choice((8, 12, 24)),
        tokens=chance.choice((4, 8, 32)),
        stages=chance.choice((1, 1, 1, 2)),
        step_ms=chance.choice((20.0, 60.0)),
        repeats=chance.choice((0.0, 0.0, 0.03)),
        noise=chance.getrandbits(32),
    )
    windows = chance.random() < 0.5
    arrivals = [_arrive(chance, id, setup, windows=windows) for id in range(chance.randint(2, 8))]
    events: list[Event] = [*arrivals]
    for arrival in arrivals:
        if chance.random() < 0.15:
            choice = chance.choice((None, 0))
            events.append(Leave(at=_later(chance, arrival.at), id=arrival.id, choice=choice))
        if arrival.frontend == "rpc" and setup.routers > 1 and chance.random() < 0.2:
            events.append(Wander(at=_later(chance, arrival.at), id=arrival.id))
    events += [_fault(chance, setup) for _ in range(chance.randint(1, 5))]
    if not windows and chance.random() < 0.4:
        # A real connection never loses a single message, but the core recovers at the next one; a choice without credit has no next one.
        events.append(LoseTokens(at=_time(chance), gang=chance.randrange(setup.replicas), router=chance.randrange(setup.routers)))
    for _ in range(chance.choice((0, 0, 1, 2))):
        events.append(Lie(at=_time(chance), gang=chance.randrange(setup.replicas), kind=chance.choice(LIES)))
    return Schedule(setup=setup, events=sorted(_with_tenants(seed, events), key=lambda event: event.at))


def _with_tenants(seed: int, events: list[Event]) -> list[Event]:
    """The requests of three tenants, some with a priority. A chance of its own keeps the rest of every seed's schedule as it was."""
    chance = Random(seed)
    return [
        msgspec.structs.replace(event, tenant=chance.choice("abc"), priority=chance.choice((0, 0, 0, -1, 2)))
        if isinstance(event, Arrive)
        else event
        for event in events
    ]


def _time(chance: Random) -> float:
    return round(chance.uniform(0.0, HORIZON_S), 3)


def _later(chance: Random, at: float) -> float:
    return round(at + chance.expovariate(1.5), 3)


def _arrive(chance: Random, id: int, setup: SimSetup, *, windows: bool) -> Arrive:
    prompt = [chance.randrange(32, 127) for _ in range(chance.randint(1, 30))]
    if chance.random() < 0.4:
        prompt = [64] * 16 + prompt  # a prefix that others share
    credit = chance.choice((0, 0, 1, 3, 8)) if windows else 0
    return Arrive(
        at=round(chance.uniform(0.0, HORIZON_S * 0.7), 3),
        id=id,
        frontend=chance.choice(("http", "rpc", "rpc")),
        router=chance.randrange(setup.routers),
        prompt=prompt[: setup.blocks * 4],
        n=chance.choice((1, 1, 1, 2)),
        max_tokens=chance.choice((1, 4, 12, 28)),
        temperature=chance.choice((0.0, 0.8)),
        stop_ids=tuple(chance.sample(range(32, 127), chance.choice((0, 0, 6)))),
        logprobs=chance.choice((None, None, 0, 2)),
        credit=credit,
        pace_s=chance.choice((0.01, 0.3, 2.5)) if credit else 0.0,
        deadline_s=chance.choice((None, None, None, None, 0.4, 3.0)),
    )


def _fault(chance: Random, setup: SimSetup) -> Event:
    at, gang, router = _time(chance), chance.randrange(setup.replicas), chance.randrange(setup.routers)
    kind = chance.choice(("kill", "kill", "freeze", "hang", "slow", "cut", "cut", "drain", "usurp", "crash", "close"))
    match kind:
        case "kill":
            return KillReplica(at=at, gang=gang)
        case "freeze":
            return Freeze(at=at, gang=gang, seconds=chance.choice((0.3, 1.2, 2.0, 4.0)))
        case "hang":
            return Hang(at=at, gang=gang)
        case "slow":
            return Slow(at=at, gang=gang, seconds=chance.choice((0.2, 0.8)))
        case "cut":
            return CutConnection(at=at, gang=gang, router=router, seconds=chance.choice((0.2, 1.0, 2.0, 4.0)))
        case "drain":
            return DrainReplica(at=at, gang=gang, grace_s=chance.choice((0.0, 0.3, 5.0)))
        case "usurp":
            return Usurp(at=at, gang=gang)
        case "crash":
            return Crash(at=at, router=router, seconds=chance.choice((0.3, 1.5, 3.0)))
        case _:
            return StopRouter(at=at, router=router, grace_s=chance.choice((0.0, 0.5, 3.0)), seconds=chance.choice((0.3, 1.5)))
