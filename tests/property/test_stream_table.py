"""Sessions against a model of what routers may see, over random histories: order, no gap, one terminal message, nothing for the lost."""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.examples import examples
from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import TooLong
from workers.protocol.messages import Accepted, Attach, Cancel, Credit, Done, Failed, GenerateTask, SamplingParams, Submit, Tokens, Usage
from workers.serving.stream_table import Action, GrantCredit, SendToRouter, StartSequence, StopSequence, StreamTable

ROUTES = ("a", "b", "c")
NAMES = ("x", "y", "z")
USAGE = Usage(prompt_tokens=1, output_tokens=0)
Key = tuple[str, int, int]


def token(request: str, position: int) -> int:
    """What the model emits: a function of the request and the position, as for any engine that can be continued."""
    return ord(request) * 1000 + position


class Reader:
    """A router's view of one (stream, attempt)."""

    def __init__(self, request: str, have: int) -> None:
        self.request, self.next = request, have
        self.ended = False


class SessionsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sessions = StreamTable(boot="me", model="m", orphan_s=2.0, limit=4)
        self.now = 0.0
        self.engine: dict[int, tuple[str, int]] = {}  # id -> request, next position
        self.readers: dict[Key, Reader] = {}
        self.streams = 0

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartSequence(id=id, submit=submit):
                    assert id not in self.engine
                    if submit.prompt_ids[0] == 666:
                        self.act(self.sessions.refused(id, TooLong("no")))
                    else:
                        self.engine[id] = (submit.request_id, len(submit.task.emitted))
                        self.act(self.sessions.started(id))
                case StopSequence(id=id):
                    del self.engine[id]
                case GrantCredit(id=id, tokens=tokens):
                    assert id in self.engine and tokens > 0
                case SendToRouter(router_boot=router_boot, message=message):
                    self.read(router_boot, message)

    def read(self, route: str, message: Accepted | Tokens | Done | Failed) -> None:
        if isinstance(message, Tokens):
            columns = zip(message.streams, message.attempts, message.firsts, message.tokens, strict=True)
            for stream, attempt, first, tokens in columns:
                reader = self.readers[route, stream, attempt]
                assert not reader.ended and first == reader.next
                assert tokens == [token(reader.request, position) for position in range(first, first + len(tokens))]
                reader.next += len(tokens)
            return
        reader = self.readers[route, message.stream, message.attempt]
        assert not reader.ended
        reader.ended = isinstance(message, Done | Failed)

    @rule(route=st.sampled_from(ROUTES), name=st.sampled_from(NAMES), attempt=st.integers(0, 3), journal=st.integers(0, 4),
          deadline=st.none() | st.integers(0, 5000), bad=st.booleans(), repeat=st.booleans())  # fmt: skip
    def submit(self, route: str, name: str, attempt: int, journal: int, deadline: int | None, bad: bool, repeat: bool) -> None:
        self.streams += 1
        emitted = [token(name, position) for position in range(journal)]
        message = Submit(
            boot=route, stream=self.streams, attempt=attempt, client="c", request_id=name, model="m", prompt_ids=[666 if bad else 1],
            task=GenerateTask(params=SamplingParams(max_tokens=100), emitted=emitted), deadline_ms=deadline,
        )  # fmt: skip
        self.readers[route, self.streams, attempt] = reader = Reader(name, journal)
        self.act(self.sessions.submit(message, self.now))
        if repeat and not reader.ended:
            before = dict(self.engine)
            self.act(self.sessions.submit(message, self.now))
            assert self.engine == before, "a repeated Submit must not start or stop anything"

    @rule(route=st.sampled_from(ROUTES), name=st.sampled_from(NAMES), attempt=st.integers(0, 3), have=st.integers(0, 6))
    def attach(self, route: str, name: str, attempt: int, have: int) -> None:
        self.streams += 1
        self.readers[route, self.streams, attempt] = Reader(name, have)
        self.act(self.sessions.attach(Attach(boot=route, stream=self.streams, attempt=attempt, client="c", request_id=name, have=have)))

    @rule(pick=st.randoms(use_true_random=False), stale=st.booleans())
    def cancel(self, pick: Random, stale: bool) -> None:
        if self.readers:
            route, stream, attempt = pick.choice(list(self.readers))
            self.act(self.sessions.cancel(Cancel(boot=route, stream=stream, attempt=attempt - stale)))

    @rule(pick=st.randoms(use_true_random=False), tokens=st.integers(-5, 2**40))
    def credit(self, pick: Random, tokens: int) -> None:
        if self.readers:
            route, stream, _ = pick.choice(list(self.readers))
            self.act(self.sessions.credit(Credit(boot=route, streams=[stream], tokens=[tokens])))

    @rule(
        counts=st.lists(st.integers(0, 3), min_size=4, max_size=4),
        ends=st.lists(st.sampled_from([None, None, None, "done", "fault"]), min_size=4, max_size=4),
    )
    def step(self, counts: list[int], ends: list[str | None]) -> None:
        emissions = []
        for (id, (name, position)), count, end in zip(list(self.engine.items()), counts, ends, strict=False):
            finish = {None: None, "done": Finish("stop", USAGE), "fault": Fault("nan_logits", "nan")}[end]
            emissions.append(Emission(id, position, [token(name, position + i) for i in range(count)], end=finish))
            self.engine[id] = (name, position + count)
            if end is not None:
                del self.engine[id]
        actions = self.sessions.emitted([*emissions, Emission(10**9, 0, [1])])
        routes = [action.router_boot for action in actions if isinstance(action, SendToRouter) and isinstance(action.message, Tokens)]
        assert len(routes) == len(set(routes)), "one Tokens message a step and route"
        self.act(actions)

    @rule(route=st.sampled_from(ROUTES))
    def lose(self, route: str) -> None:
        self.sessions.router_lost(route, self.now)
        for key, reader in self.readers.items():
            reader.ended |= key[0] == route  # nothing may be sent there for these any more

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        due = self.sessions.next_due()
        self.now += seconds
        actions = self.sessions.expire(self.now)
        assert not actions or (due is not None and due <= self.now)
        self.act(actions)
        left = self.sessions.next_due()
        assert left is None or left > self.now

    @rule(grace=st.sampled_from([0.0, 2.0]))
    def drain(self, grace: float) -> None:
        if self.now > 20:
            self.sessions.drain(self.now, grace)

    @invariant()
    def agrees(self) -> None:
        self.sessions.check()
        assert len(self.sessions) == len(self.engine) <= 4 + 1
        assert sorted(name for _, name in self.sessions.live()) == sorted(name for name, _ in self.engine.values())
        assert sum(not reader.ended for reader in self.readers.values()) <= len(self.engine), "a stream without a sequence hangs for ever"


TestSessions = SessionsMachine.TestCase
TestSessions.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
