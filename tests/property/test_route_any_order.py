"""The routing core against scripted replicas, in any order of events: nothing is lost, doubled or swapped.

Replicas here are honest and unreliable: they die, return, drain, are cut off, and their messages are late, repeated or gone.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.core.actions import Action, DeliverTokens, FailChoice, FinishChoice, SendMessage
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.core.router_core import RouterCore
from tests.support.examples import examples
from tests.support.router_core import CoreDriver
from workers.protocol.errors import Overloaded
from workers.protocol.messages import (
    PROTOCOL,
    UNLIMITED,
    Accepted,
    Attach,
    Bye,
    Cancel,
    Capacity,
    Credit,
    Done,
    Failed,
    Heartbeat,
    Hello,
    RouterHeartbeat,
    SamplingParams,
    Submit,
    Tokens,
    Usage,
)
from workers.protocol.status import EngineStats

SEQUENCES = 3


def token(seed: int, prompt: list[int], position: int) -> int:
    return (seed * 31 + sum(prompt) * 7 + len(prompt) * 3 + position * 13) % 997


def stream_of(seed: int, prompt: list[int], count: int) -> list[int]:
    return [token(seed, prompt, position) for position in range(count)]


def capacity(sequences: int = SEQUENCES) -> Capacity:
    return Capacity(
        block_size=8, num_blocks=64, max_batch_size=sequences, max_num_tokens=32, max_seq_len=512, vocab_size=997, tp=1, pp=1
    )  # fmt: skip


class Leader:
    """A replica's leader in one process life: keeps sequences by name, emits what :func:`stream_of` says."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.epoch, self.boot = name, epoch, f"{name}-{epoch}"
        self.connection = 0
        self.sequences: dict[tuple[str, str], dict[str, Any]] = {}
        self.draining = False
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque([self.hello()])

    @property
    def peer(self) -> bytes:
        return f"{self.boot}/{self.connection}".encode()

    def hello(self) -> Hello:
        return Hello(
            boot=self.boot, protocol=PROTOCOL, replica=self.name, model="m", epoch=self.epoch, resume="bitwise", capacity=capacity()
        )  # fmt: skip

    def beat(self) -> None:
        self.outbox.append(
            Heartbeat(
                boot=self.boot, step=1, busy_ms=0, predicted_ms=1, draining=self.draining,
                stats=EngineStats(running=len(self.sequences), free_blocks=1, step_ms=1.0),
            )
        )  # fmt: skip

    def fail(self, message: Any, code: str) -> None:
        self.outbox.append(Failed(boot=self.boot, stream=message.stream, attempt=message.attempt, code=code, message=code))

    def take(self) -> None:
        message = self.inbox.popleft()
        if isinstance(message, Submit):
            name = (message.client, message.request_id)
            old = self.sequences.get(name)
            if self.draining or (old is not None and message.attempt < old["attempt"]):
                self.fail(message, "overloaded" if self.draining else "cancelled")
                return
            self.sequences[name] = {
                "stream": message.stream, "attempt": message.attempt, "have": len(message.task.emitted), "submit": message,
                "tokens": list(message.task.emitted), "credit": message.task.credit,
            }  # fmt: skip
            self.outbox.append(Accepted(boot=self.boot, stream=message.stream, attempt=message.attempt))
        elif isinstance(message, Attach):
            sequence = self.sequences.get((message.client, message.request_id))
            if sequence is None or sequence["attempt"] != message.attempt or message.have > len(sequence["tokens"]):
                self.fail(message, "not_found")
                return
            sequence["stream"] = message.stream
            self.outbox.append(Accepted(boot=self.boot, stream=message.stream, attempt=message.attempt))
            self.say(sequence, message.have, sequence["tokens"][message.have :])
        elif isinstance(message, Cancel):
            self.sequences = {name: sequence for name, sequence in self.sequences.items() if sequence["stream"] != message.stream}
        elif isinstance(message, Credit):
            for sequence in self.sequences.values():
                if sequence["stream"] in message.streams:
                    sequence["credit"] += message.tokens[0]

    def say(self, sequence: dict[str, Any], first: int, tokens: list[int]) -> None:
        if tokens:
            self.outbox.append(
                Tokens(boot=self.boot, streams=[sequence["stream"]], attempts=[sequence["attempt"]], firsts=[first], tokens=[tokens])
            )  # fmt: skip

    def step(self, burst: int) -> None:
        for name, sequence in list(self.sequences.items()):
            submit, tokens = sequence["submit"], sequence["tokens"]
            count = min(burst, sequence["credit"], submit.task.params.max_tokens - len(tokens))
            new = [token(submit.task.params.seed, submit.prompt_ids, len(tokens) + i) for i in range(count)]
            self.say(sequence, len(tokens), new)
            tokens += new
            sequence["credit"] -= count
            if len(tokens) == submit.task.params.max_tokens:
                del self.sequences[name]
                usage = Usage(prompt_tokens=len(submit.prompt_ids), output_tokens=len(tokens))
                where = {"boot": self.boot, "stream": sequence["stream"], "attempt": sequence["attempt"]}
                self.outbox.append(Done(**where, reason="length", usage=usage))


class Routing(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        self.now = 100.0
        admission = AdmissionSpec(max_queue=8, queue_timeout_s=1e6, request_timeout_s=1e7, replica_limit=10_000)
        greeting = RouterHeartbeat(boot="router", router="router")
        self.route = CoreDriver(RouterCore(greeting, ["m"], admission, ReplicaRegistry(50.0, 60.0), accept_s=30.0))
        self.epoch = 1
        self.leaders = {f"r{i}": Leader(f"r{i}", 1) for i in range(count)}
        self.asks: dict[int, RouterRequest] = {}
        self.got: dict[tuple[int, int], list[int]] = {}
        self.ends: dict[tuple[int, int], FinishChoice | FailChoice] = {}
        self.left: set[tuple[int, int]] = set()
        self.serial = 0
        self.turn()

    def act(self) -> None:
        """Carry out the core's actions, checking every delivery."""
        while actions := self.route.take():
            self.carry_out(actions)

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendMessage):
                leader = next((leader for leader in self.leaders.values() if leader.peer == action.peer), None)
                if leader is None:
                    self.route.unreachable(action.peer, self.now)
                elif isinstance(action.message, Bye):
                    assert action.message.reason != "stale", "an honest fleet holds no stale epoch"
                elif not isinstance(action.message, RouterHeartbeat):
                    leader.inbox.append(action.message)
                continue
            if isinstance(action, DeliverTokens):
                for request, choice, first, tokens, _ in action.deliveries:
                    self.expect_more(request, choice)
                    ask, got = self.asks[request], self.got[request, choice]
                    assert first == len(got), "a gap or a repeat"
                    got += tokens
                    assert got == stream_of(ask.params.seed + choice, ask.prompt_ids, len(got)), "tokens of another stream"
            else:
                self.expect_more(action.owner, action.choice)
                self.ends[action.owner, action.choice] = action

    def expect_more(self, request: int, choice: int) -> None:
        assert (request, choice) not in self.left, "something was delivered to a caller that had left"
        assert (request, choice) not in self.ends, "something was delivered after the end"

    @rule(prompt=st.lists(st.integers(0, 50), min_size=1, max_size=20), n=st.integers(1, 2), count=st.integers(1, 5),
          bounded=st.booleans(), held=st.integers(0, 6))  # fmt: skip
    def submit(self, prompt: list[int], n: int, count: int, bounded: bool, held: int) -> None:
        self.serial += 1
        seed = self.serial * 10
        emitted = [stream_of(seed + choice, prompt, min(held, count)) for choice in range(n)] if held else []
        ask = RouterRequest(
            client="c", request_id=f"q{self.serial}", model="m", prompt_ids=prompt, params=SamplingParams(seed=seed, max_tokens=count), n=n,
            credit=1 if bounded else UNLIMITED, emitted=emitted, client_attempt=int(held > 0),
        )  # fmt: skip
        try:
            id = self.route.submit(ask, self.now)
        except Overloaded as error:
            assert error.retry_after
            return
        self.asks[id] = ask
        for choice in range(n):
            self.got[id, choice] = list(emitted[choice]) if emitted else []
        self.act()

    @rule(data=st.data(), whole=st.booleans())
    @precondition(lambda self: self.asks)
    def leave(self, data: st.DataObject, whole: bool) -> None:
        id = data.draw(st.sampled_from(list(self.asks)))
        n = self.asks[id].n
        for choice in range(n) if whole else [n - 1]:
            if (id, choice) not in self.ends:
                self.left.add((id, choice))
        if whole:
            self.route.cancel(id, self.now)
        else:
            self.route.stop_choice(id, n - 1, self.now)
        self.act()

    @rule(data=st.data())
    @precondition(lambda self: self.asks)
    def credit(self, data: st.DataObject) -> None:
        self.route.credit(data.draw(st.sampled_from(list(self.asks))), 2, self.now)
        self.act()

    def draw_leader(self, data: st.DataObject) -> Leader:
        return self.leaders[data.draw(st.sampled_from(sorted(self.leaders)))]

    @rule(data=st.data(), burst=st.integers(1, 2))
    def work(self, data: st.DataObject, burst: int) -> None:
        """A leader reads what it was sent, makes a step and says how it is; nobody has heard it yet."""
        leader = self.draw_leader(data)
        while leader.inbox:
            leader.take()
        leader.step(burst)
        leader.beat()

    @rule(data=st.data(), count=st.integers(1, 9))
    def hear(self, data: st.DataObject, count: int) -> None:
        leader = self.draw_leader(data)
        for _ in range(min(count, len(leader.outbox))):
            self.tell(leader)

    @rule()
    def turn(self) -> None:
        """Every leader makes a step that is heard at once."""
        for leader in self.leaders.values():
            while leader.inbox:
                leader.take()
            leader.step(1)
            while leader.outbox:
                self.tell(leader)

    @rule(data=st.data(), again=st.booleans())
    def resend(self, data: st.DataObject, again: bool) -> None:
        """Everything that waits is heard, each message twice, or all of it and then all of it again."""
        leader = self.draw_leader(data)
        waiting = list(leader.outbox)
        for message in [*waiting, *waiting] if again else [one for each in waiting for one in (each, each)]:
            self.route.hear(leader.peer, "", message, self.now)
            self.act()
        leader.outbox.clear()

    def tell(self, leader: Leader) -> None:
        self.route.hear(leader.peer, "", leader.outbox.popleft(), self.now)
        self.act()

    @rule(data=st.data(), place=st.integers(0, 3))
    def lose_one(self, data: st.DataObject, place: int) -> None:
        """One message to the router vanishes. Tokens only: what ends a sequence is lost with its connection, or not at all."""
        leader = self.draw_leader(data)
        if place < len(leader.outbox) and isinstance(leader.outbox[place], Tokens):
            del leader.outbox[place]

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A gang is killed and launched again."""
        leader = self.draw_leader(data)
        self.epoch += 1
        self.leaders[leader.name] = Leader(leader.name, self.epoch)

    @rule(data=st.data())
    def reconnect(self, data: st.DataObject) -> None:
        """The connection breaks and comes back by itself: what was under way is gone, both ways."""
        leader = self.draw_leader(data)
        leader.inbox.clear()
        leader.outbox.clear()
        leader.connection += 1
        leader.beat() if self.route.registry._by_boot.get(leader.boot) else leader.outbox.append(leader.hello())

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.draw_leader(data).draining = True

    @rule(seconds=st.sampled_from([0.1, 5.0, 31.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.route.tick(self.now)
        self.act()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "route"):
            self.route.check()

    def teardown(self) -> None:
        """From any state: once the gangs behave, every request ends, whole."""
        if not hasattr(self, "route"):
            return
        for name, leader in self.leaders.items():
            if leader.draining:
                self.epoch += 1
                self.leaders[name] = Leader(name, self.epoch)
        for _ in range(60):
            self.now += 1.0
            for leader in self.leaders.values():
                leader.beat()
                while leader.inbox:
                    leader.take()
                leader.step(3)
                while leader.outbox:
                    self.route.hear(leader.peer, "", leader.outbox.popleft(), self.now)
                    self.act()
            for id in self.asks:
                self.route.credit(id, 12, self.now)
            self.route.tick(self.now)
            self.act()
        assert self.route.live == 0, "a request never ended"
        for key, got in self.got.items():
            assert (key in self.ends) != (key in self.left), f"{key}: exactly one end"
            end = self.ends.get(key)
            if end is not None:
                assert isinstance(end, FinishChoice), f"{key}: {end}"
                assert len(got) == self.asks[key[0]].params.max_tokens == end.usage.output_tokens
        assert all(replica.streams == {} for replica in self.route.registry.replicas.values())
        self.route.check()


TestRouting = Routing.TestCase
TestRouting.settings = settings(
    max_examples=examples(80),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
