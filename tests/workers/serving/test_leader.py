"""A Leader in this process, over real sockets, around a FakeEngine that can be ordered to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
import zmq

from tests.support.figures import figure
from tests.support.gang import RouterEnd, short_folder, wait_for
from workers.engines.fake import FakeEngine, expected_tokens
from workers.protocol import messages as wire
from workers.protocol.engine import Emission
from workers.protocol.errors import ConfigError, EngineFault, ReplicaLost, TriremeError
from workers.protocol.messages import (
    Attach,
    Bye,
    Cancel,
    Credit,
    Done,
    Failed,
    GenerateTask,
    KeyUse,
    RouterHeartbeat,
    SamplingParams,
    Submit,
)
from workers.protocol.specs import FakeOptions, FakeSpec, ReplicaSpec, RouterAddress
from workers.serving.leader import Leader
from workers.serving.router_io import KeyPair
from workers.serving.router_link import RouterLink

LONG = SamplingParams(temperature=0.0, max_tokens=30_000)
SHORT = SamplingParams(temperature=0.0, max_tokens=8)


class Breakable(FakeEngine):
    """Runs ``fault`` before each step, and ``unsound`` where it rests."""

    fault: Callable[[], object] | None = None
    unsound: Callable[[], object] | None = None

    def step(self) -> list[Emission]:
        if self.fault is not None:
            self.fault()
        return super().step()

    def on_idle(self) -> None:
        if self.unsound is not None:
            self.unsound()
        super().on_idle()


class Running:
    """A leader whose engine thread is a thread of the test."""

    def __init__(self, *routers: RouterAddress, keys: KeyPair | None = None, hang_floor_s: float = 10.0) -> None:
        self.engine = Breakable(FakeSpec(options=FakeOptions(fake_step_ms=2.0)))
        self.phases: list[str] = []
        self.aborts: list[TriremeError] = []
        self.error: Exception | None = None
        spec = ReplicaSpec(name="r0", model="m", artifact="", epoch=7, routers=routers, heartbeat_s=0.05, hang_floor_s=hang_floor_s)
        self.leader = Leader(spec, self.engine, boot="leader-1", keys=keys, enter=self.phases.append, abort=self.aborts.append)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.leader.run()
        except Exception as error:
            self.error = error

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.fault = None
        self.leader.drain(0.0)
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def end() -> Iterator[RouterEnd]:
    with short_folder() as folder, RouterEnd(f"ipc://{folder}/a") as router:
        yield router


def at(end: RouterEnd) -> RouterAddress:
    return RouterAddress(endpoint=end.endpoint)


def test_an_engine_that_fails_a_step_fails_every_sequence_as_replica_lost(end: RouterEnd) -> None:
    with Running(at(end)) as running:
        sequences = [end.ready().submit(i, [i], LONG) for i in range(3)]
        end.until(lambda: all(sequence.tokens for sequence in sequences))

        def fail() -> None:
            raise EngineFault("a GPU fell off the bus")

        running.engine.fault = fail
        end.until(lambda: all(sequence.end for sequence in sequences) and end.byes == ["lost"])
        assert {sequence.end.code for sequence in sequences if isinstance(sequence.end, Failed)} == {"replica_lost"}
        running.thread.join(5)
        assert isinstance(running.error, EngineFault)


def test_an_engine_proves_itself_after_its_tokens_are_out_and_ends_the_replica_if_unsound(end: RouterEnd) -> None:
    with Running(at(end)) as running:
        rested: list[float] = []
        running.engine.unsound = lambda: rested.append(time.monotonic())
        sequence = end.ready().submit(1, [1], SHORT)
        end.until(lambda: sequence.end)
        out = time.monotonic()
        end.until(lambda: any(at > out for at in rested))

        def fail() -> None:
            raise AssertionError("a block is lost")

        running.engine.unsound = fail
        running.thread.join(10)
        assert isinstance(running.error, AssertionError)
        end.until(lambda: end.byes == ["lost"])


def test_what_the_engine_refuses_fails_without_accepted(end: RouterEnd) -> None:
    with Running(at(end)):
        end.ready()
        sequence = end.submit(1, [1, 2, 99_999], SHORT)
        other = end.submit(2, [1] * 70_000, SHORT)
        end.until(lambda: sequence.end and other.end)
        assert (
            isinstance(sequence.end, Failed)
            and sequence.end.code == "invalid_request"
            and sequence.end.param == "prompt"
            and not sequence.accepted
        )
        assert isinstance(other.end, Failed) and other.end.code == "context_length_exceeded"
        good = end.submit(3, [1], SHORT)
        end.until(lambda: good.end)
        assert good.tokens == expected_tokens([1], SHORT)


def test_heartbeats_go_on_inside_a_step_and_a_step_without_progress_ends_the_replica(end: RouterEnd) -> None:
    release = threading.Event()
    with Running(at(end), hang_floor_s=0.6) as running:
        end.ready()
        running.engine.fault = lambda: release.wait(20)
        end.submit(1, [1], SHORT)
        end.until(lambda: end.beats[-1].busy_ms > 200)
        busy = [beat.busy_ms for beat in end.beats if beat.busy_ms]
        assert busy == sorted(busy) and len(busy) >= 2 and end.beats[-1].step == 1
        end.until(lambda: running.aborts)
        assert isinstance(running.aborts[0], EngineFault) and "step 1 has made no progress" in running.aborts[0].what
        release.set()


def test_a_stale_epoch_ends_the_leader_and_another_bye_only_its_link(end: RouterEnd) -> None:
    with Running(at(end)) as running:
        end.ready().send(Bye(boot=end.boot, reason="restarting"))
        end.until(lambda: len(end.hellos) == 2)
        assert running.thread.is_alive()
        end.send(Bye(boot=end.boot, reason="stale"))
        running.thread.join(5)
        assert isinstance(running.error, ReplicaLost)


def test_a_router_hears_what_others_take_for_a_key_and_only_that() -> None:
    def pulse(end: RouterEnd, requests: int) -> None:
        end.send(RouterHeartbeat(boot=end.boot, router="r", keys=[KeyUse("k", requests, 10 * requests, 0, 1)]))

    def says(end: RouterEnd, *uses: KeyUse) -> None:
        """Serve both routers until the leader's heartbeat to ``end`` has these."""
        one.until(lambda: other.turn() or (end.beats and end.beats[-1].keys == list(uses)))  # type: ignore[func-returns-value]

    with short_folder() as folder, RouterEnd(f"ipc://{folder}/a") as one, RouterEnd(f"ipc://{folder}/b") as other:
        other.boot = "router-2"
        with Running(at(one), at(other)):
            for end in (one, other):
                says(end)
                pulse(end, 1000)
            runs = KeyUse("k", 0, 0, 0, 1)
            says(one, runs)
            says(other, runs)
            pulse(one, 1003)
            says(other, KeyUse("k", 3, 30, 0, 1))
            assert all(beat.keys in (None, [], [runs]) for beat in one.beats), "its own use is never among it"


def test_a_changed_nonce_on_a_living_connection_means_hello_again_and_orphans(end: RouterEnd) -> None:
    with Running(at(end)):
        sequence = end.ready().submit(1, [1], LONG)
        end.until(lambda: sequence.tokens)
        end.boot = "router-2"
        end.send(RouterHeartbeat(boot=end.boot, router="r"))
        end.until(lambda: len(end.hellos) == 2 and end.beats[-1].stats.running == 0)
        fresh = end.submit(1, [2], SHORT)
        end.until(lambda: fresh.end)
        assert isinstance(fresh.end, Done) and fresh.tokens == expected_tokens([2], SHORT)


def test_a_send_that_would_block_means_a_lost_router(end: RouterEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    # Little enough to fill the socket of the one that does not read; more than the other's whole answer, so that
    # it cannot fill its own, however long this process is kept waiting.
    monkeypatch.setattr(wire, "HIGH_WATER", 500)
    params = SamplingParams(temperature=0.0, max_tokens=300)
    monkeypatch.setitem(RouterLink.__init__.__kwdefaults__, "silence_s", 1e9)  # so that nothing but the full socket gives it away
    with RouterEnd(end.endpoint + "2", boot="stuck", high_water=4) as stuck, Running(at(end), at(stuck)):
        stuck.ready()
        end.ready()
        hog = stuck.submit(1, [1], SamplingParams(temperature=0.0, max_tokens=30_000, logprobs=20))
        stuck.until(lambda: hog.tokens)
        sequence = end.submit(2, [2], params)
        end.until(lambda: sequence.end)
        assert sequence.tokens == expected_tokens([2], params)
        end.until(lambda: end.beats[-1].stats.running == 0)
        hellos = len(stuck.hellos)
        stuck.until(lambda: len(stuck.hellos) > hellos)
        assert hog.end is None


def test_curve_on_tcp(end: RouterEnd) -> None:
    server_public, server_secret = (key.decode() for key in zmq.curve_keypair())
    public, secret = (key.decode() for key in zmq.curve_keypair())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = server_public.encode(), server_secret.encode()
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    address = RouterAddress(endpoint=f"tcp://127.0.0.1:{port}", server_key=server_public)
    wrong = RouterAddress(endpoint=f"tcp://localhost:{port}", server_key=public)
    with Running(address, wrong, keys=KeyPair(public=public, secret=secret)):
        seen = set()
        deadline = time.monotonic() + 10

        def two_beats() -> bool:
            while socket.poll(20):
                identity, frame = socket.recv_multipart()
                seen.add((identity, type(wire.decode_from_replica(frame)).__name__))
            return {"Hello", "Heartbeat"} <= {kind for _, kind in seen} and time.monotonic() > deadline - 9

        wait_for(two_beats, 10)
        assert len({identity for identity, _ in seen}) == 1, "a leader with the wrong server key gets through"
    socket.close(0)
    context.term()


def test_an_idle_leader_hears_at_once(end: RouterEnd) -> None:
    with Running(at(end)):
        end.ready()
        took = []
        for i in range(20):
            sequence = end.submit(i, [i], SamplingParams(temperature=0.0, max_tokens=1))
            took.append(end.until(lambda sequence=sequence: sequence.end))  # type: ignore[misc]
        figure("an idle leader: submit to last token, one step of 2 ms, median", sorted(took)[10] * 1000, 33, "ms")


def test_the_leaders_own_share_of_a_step(end: RouterEnd) -> None:
    """Everything between an engine's step and the next one, 64 sequences: sessions, messages, queue."""
    with Running(at(end)) as running:
        sequences = [end.ready().submit(i, [i], LONG) for i in range(64)]
        end.until(lambda: all(len(sequence.tokens) > 5 for sequence in sequences))
        inside, first, begin = [0.0], end.beats[-1].step, time.monotonic()
        step = FakeEngine.step
        engine = running.engine

        def timed() -> list[Emission]:
            entered = time.perf_counter()
            out = step(engine)
            inside[0] += time.perf_counter() - entered
            return out

        engine.step = timed  # type: ignore[method-assign]
        end.until(lambda: end.beats[-1].step > first + 100)
        steps = end.beats[-1].step - first
        share = (time.monotonic() - begin - inside[0]) / steps
        figure("the leader's share of a step of 64 sequences, router end in the same process included", share * 1000, 3.3, "ms")


def test_addresses_that_would_be_unsafe_are_refused() -> None:
    for endpoint, key in (("tcp://127.0.0.1:1", ""), ("tcp://127.0.0.1:1", "x" * 40), ("inproc://a", ""), ("", "")):
        with pytest.raises(ConfigError):
            Running(RouterAddress(endpoint=endpoint, server_key=key))


def test_no_event_is_lost_when_more_come_than_a_turn_takes(end: RouterEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.serving.leader.TURN_EVENTS", 2)
    with Running(at(end)):
        sequences = [end.ready().submit(i, [i], SHORT) for i in range(25)]
        end.until(lambda: all(sequence.end for sequence in sequences))
        assert [sequence.tokens for sequence in sequences] == [expected_tokens([i], SHORT) for i in range(25)]


def test_mutated_frames_hurt_nobody(end: RouterEnd) -> None:
    random = Random(20261122)
    with Running(at(end)):
        end.ready().strict = False
        boot = end.boot
        messages = [
            Submit(
                boot=boot,
                stream=900,
                attempt=0,
                client="x",
                request_id="y",
                model="m",
                prompt_ids=[1, 2],
                task=GenerateTask(params=SHORT),
                deadline_ms=500,
            ),
            Attach(boot=boot, stream=900, attempt=1, client="x", request_id="y", have=0),
            Cancel(boot=boot, stream=900, attempt=9),
            Credit(boot=boot, streams=[900, 901], tokens=[5]),
            RouterHeartbeat(boot=boot, router="r"),
        ]
        for n in range(1500):
            frame = bytearray(wire.encode(random.choice(messages)))
            for _ in range(random.randrange(3)):
                frame[random.randrange(len(frame))] = random.randrange(256)
            end.send_raw(bytes(frame[: random.randrange(len(frame) + 1)] if random.random() < 0.2 else frame))
            if n % 10 == 0:
                end.turn()
        end.until(lambda: end.beats[-1].stats.running == 0)  # the leader has seen all of it, deadlines and orphans included
        sequence = end.submit(1, [7], SHORT)
        end.until(lambda: sequence.end)
        assert sequence.tokens == expected_tokens([7], SHORT)
