"""The replica registry of one router: known replicas, their states, their load, and quarantines.

Owns every :class:`Replica`. A replica writes its own fields by its methods: the registry calls those that change its state and address,
:mod:`orchestrator.router.core.request_table` those that count the choices placed at it. Reads no clock and no socket: ``peer`` is an
opaque reply address and ``user`` the authenticated key (empty if the transport itself authenticates the caller); neither of them alone is
an identity. A replica is its name, fenced by its epoch, owned by one user, and one process (``boot``) sends its messages.

    (unknown) --Hello--> ready --Heartbeat.draining--> draining --Bye--> lost
    ready, draining --silence | no progress | unreachable--> lost --healthy Heartbeat of the same boot--> ready
    any --Hello of a newer epoch or process--> the old record is lost, a new one is ready

Bounds: :data:`MAX_REPLICAS` names; a lost one is forgotten after :data:`KEPT_LOST_S`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Literal

import msgspec

from workers.protocol.hang import hang_bound_ms
from workers.protocol.messages import PROTOCOL, Heartbeat, Hello
from workers.protocol.status import RoutingState

#: Maximum number of names in one router; more are refused, so an authenticated peer cannot grow the table.
MAX_REPLICAS = 1024
#: Seconds after which a lost replica is forgotten, because every job that joins standing routers has new names.
KEPT_LOST_S = 3600.0
#: A replica is quarantined when this many requests ended there by logits that are not finite, within this many seconds; the quarantine
#: ends so many seconds after the last of them.
FAULT_LIMIT, FAULT_WINDOW_S = 3, 60.0
#: Number of kept losses, for status reports, and the maximum length of a reason, characters.
KEPT_LOSSES, MAX_REASON = 32, 200
#: Choices of one router at a replica, those without credit included, as a multiple of its batch.
MAX_PLACED = 8
#: Heartbeats over which the usual length of a step is computed. One heartbeat shows only the load of a moment: right after a burst of
#: prompts, the replica whose heartbeat reports its prefill would look many times slower than equal replicas, and these would get all
#: further requests.
STEP_SAMPLES = 15

#: The facts on which a replica's speed depends, as far as a router knows them: engine, tp, pp, dtype, quantization, sequences and tokens of
#: a step.
Kind = tuple[str, int, int, str, str | None, int, int]


class ReplicaSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole state of a :class:`Replica`."""

    hello: Hello
    user: str
    peer: bytes
    state: RoutingState
    since: float
    seen: float
    reason: str = ""
    last_heartbeat: Heartbeat | None = None
    streams: dict[int, int] = {}
    paused: int = 0
    others: int = 0
    other_tokens: int = 0
    choice_ms: float = 1000.0
    last_sent: int = 0
    refusing: bool = False
    step_samples: list[float] = []
    faults: list[float] = []
    quarantined: str = ""
    explained_at: float = 0.0
    rate_mark: tuple[float, int] | None = None
    tok_s: float = 0.0


class Replica:
    """One replica as this router knows it. Only its own methods write it.

    ``streams``: this router's live streams here, in order, each with the prompt tokens that are still to be computed before its first
    token. ``peer`` is empty after another process has taken its address.
    """

    __slots__ = (
        "_rate_mark",
        "_step_samples",
        "boot",
        "capacity",
        "choice_ms",
        "epoch",
        "explained_at",
        "faults",
        "hello",
        "kind",
        "last_heartbeat",
        "last_sent",
        "model",
        "name",
        "other_tokens",
        "others",
        "own_tokens",
        "paused",
        "peer",
        "quarantined",
        "reason",
        "refusing",
        "resume",
        "seen",
        "since",
        "state",
        "step_ms",
        "streams",
        "tok_s",
        "user",
    )  # fmt: skip

    def __init__(self, peer: bytes, user: str, hello: Hello, now: float) -> None:
        self.name, self.model, self.user, self.peer, self.boot = hello.replica, hello.model, user, peer, hello.boot
        self.hello, self.epoch, self.resume, self.capacity = hello, hello.epoch, hello.resume, hello.capacity
        self.state: RoutingState = "ready"
        self.reason = ""
        self.since = self.seen = now
        self.last_heartbeat: Heartbeat | None = None
        self.streams: dict[int, int] = {}
        #: Streams without credit: their K/V is released, so they use no place in the batch.
        self.paused = 0
        #: Choices that other routers run here, as of the last heartbeat.
        self.others = 0
        #: Prompt tokens that this router's choices wait for: the sum of ``streams``' values.
        self.own_tokens = 0
        #: Prompt tokens that wait here for other routers' choices, as of the last heartbeat.
        self.other_tokens = 0
        #: Smoothed time that a choice spends here, ms; it determines the wait for a free place.
        self.choice_ms = 1000.0
        #: Number of the last stream that began here: ties go to the least recently chosen replica.
        self.last_sent = 0
        #: It refused a choice; nothing more is sent to it before its next heartbeat.
        self.refusing = False
        capacity = hello.capacity
        self.kind: Kind = (
            capacity.engine, capacity.tp, capacity.pp, capacity.dtype, capacity.quant.quant_algo, capacity.max_batch_size,
            capacity.max_num_tokens,
        )  # fmt: skip
        #: Usual length of a recent step, ms; 0 before the first step was reported.
        self.step_ms = 0.0
        self._step_samples: deque[float] = deque(maxlen=STEP_SAMPLES)
        #: When requests ended here by logits that are not finite, or when the replica sent an invalid message.
        self.faults: deque[float] = deque(maxlen=FAULT_LIMIT)
        #: The reason of its quarantine; empty = not in quarantine.
        self.quarantined = ""
        #: Time of the last heartbeat that explained a wait of choices here: others are ahead of them, or a step still runs.
        self.explained_at = 0.0
        #: Output tokens a second, all routers together.
        self.tok_s = 0.0
        self._rate_mark: tuple[float, int] | None = None

    # --- what is read

    @property
    def occupancy(self) -> int:
        """Choices that run or wait here as far as this router knows: its own, and what other routers were last reported to have."""
        return len(self.streams) - self.paused + self.others

    @property
    def lookahead(self) -> int:
        """Choices that wait at the replica itself, so that a place freed in one step is filled in the next."""
        return max(1, self.capacity.max_batch_size // 16)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait here before those of a new choice.

        A router counts the tokens of its own choices itself, because a heartbeat reports the end of an earlier step: in a burst, a replica
        with an older heartbeat would look emptier, and would get the rest of the burst.
        """
        return self.own_tokens + self.other_tokens

    @property
    def free_places(self) -> int:
        """How many more choices may be sent now."""
        return self._free_places(MAX_PLACED)

    @property
    def reserved_places(self) -> int:
        """How many more choices may be sent now of tenants that have few paused ones."""
        return self._free_places(2 * MAX_PLACED)

    def _free_places(self, most_placed: int) -> int:
        if self.state != "ready" or self.refusing:
            return 0
        size = self.capacity.max_batch_size
        return max(0, min(size + self.lookahead - self.occupancy, most_placed * size - len(self.streams)))

    # --- its connection and state, which the registry changes

    def note_heard(self, now: float) -> None:
        """A message of it has arrived."""
        self.seen = now

    def move(self, peer: bytes) -> None:
        """Set its address to ``peer``; empty: it has none."""
        self.peer = peer

    def enter(self, state: RoutingState, reason: str, now: float) -> None:
        """Enter ``state``. The reported load is invalid once the replica is lost."""
        self.state, self.reason, self.since = state, reason, now
        if state == "lost":
            self.last_heartbeat = None
            self.others = self.other_tokens = 0
            self.tok_s = 0.0

    def add_fault(self, now: float) -> bool:
        """Count a request that ended here by logits that are not finite; returns whether this one begins a quarantine."""
        self.faults.append(now)
        if self.quarantined or len(self.faults) < FAULT_LIMIT or now - self.faults[0] > FAULT_WINDOW_S:
            return False
        self.quarantined = "requests ended there by logits that are not finite"
        return True

    def distrust(self, why: str, now: float) -> bool:
        """Count an invalid message: a request cannot cause it, so one is enough. Returns whether this begins a quarantine."""
        self.faults.append(now)
        begins = not self.quarantined
        self.quarantined = why[:MAX_REASON]
        return begins

    def end_quarantine(self) -> None:
        self.quarantined = ""
        self.faults.clear()

    # --- its streams, which the request table changes

    def add_stream(self, stream: int, tokens: int) -> None:
        """A choice was sent here on ``stream``; ``tokens`` of its prompt are to be computed."""
        self.streams[stream] = tokens
        self.own_tokens += tokens
        self.last_sent = stream

    def first_token(self, stream: int) -> None:
        """The first token on ``stream`` has arrived, so its prompt is computed."""
        self.own_tokens -= self.streams[stream]
        self.streams[stream] = 0

    def move_stream(self, old: int, new: int) -> None:
        """The choice on stream ``old`` continues as ``new``."""
        self.streams[new] = self.streams.pop(old)

    def remove_stream(self, stream: int, *, paused: bool) -> None:
        """The choice on ``stream`` has left; ``paused``: it had no credit."""
        self.own_tokens -= self.streams.pop(stream)
        self.paused -= paused

    def pause_stream(self, paused: bool) -> None:
        """The client of one stream takes nothing more for now (True), or takes tokens again (False)."""
        self.paused += 1 if paused else -1

    def refuse(self) -> None:
        """It refused a choice: it gets no choice before its next heartbeat."""
        self.refusing = True

    def note_end(self, seconds: float) -> None:
        """A choice ended here after ``seconds``."""
        self.choice_ms += (seconds * 1000.0 - self.choice_ms) / 16

    # --- its heartbeats

    def heartbeat(self, heartbeat: Heartbeat, accepted: int, waiting: list[int], now: float) -> None:
        """Apply a heartbeat. ``accepted``: this router's choices that the heartbeat can have counted; ``waiting``: the streams of those
        without a first token, oldest first."""
        stats, last = heartbeat.stats, self.last_heartbeat
        if last is not None and heartbeat.step == last.step:
            explains = heartbeat.busy_ms > last.busy_ms  # the bound of a step is judged apart
        else:
            explains = stats.running > 0 and stats.waiting + stats.prefill_tokens > 0 and stats.running + stats.waiting >= accepted
        if explains:
            self.explained_at = now
        if stats.step_ms and (last is None or heartbeat.step != last.step):
            self._step_samples.append(stats.step_ms)
            self.step_ms = median(self._step_samples)
        # The hashes are for the prefix index, which has them by now.
        self.last_heartbeat = without_lists(heartbeat)
        self.others = max(0, stats.running + stats.waiting - accepted)
        computed = sum(self.streams[stream] for stream in waiting) - stats.prefill_tokens
        self.other_tokens = max(0, -computed) if self.others else 0
        if stats.running + stats.waiting >= accepted:  # else it reports a step before some of them arrived
            for stream in waiting:
                part = min(max(0, computed), self.streams[stream])
                self.streams[stream] -= part
                self.own_tokens -= part
                computed -= part
        self.refusing = False
        mark = self._rate_mark
        if mark is None or stats.output_tokens_total < mark[1]:
            self._rate_mark = (now, stats.output_tokens_total)
        elif now - mark[0] >= 1.0:
            self.tok_s = (stats.output_tokens_total - mark[1]) / (now - mark[0])
            self._rate_mark = (now, stats.output_tokens_total)

    # --- snapshots

    def snapshot(self) -> ReplicaSnapshot:
        return ReplicaSnapshot(
            hello=self.hello, user=self.user, peer=self.peer, state=self.state, since=self.since, seen=self.seen, reason=self.reason,
            last_heartbeat=self.last_heartbeat, streams=dict(self.streams), paused=self.paused, others=self.others,
            other_tokens=self.other_tokens, choice_ms=self.choice_ms, last_sent=self.last_sent, refusing=self.refusing,
            step_samples=list(self._step_samples), faults=list(self.faults), quarantined=self.quarantined, explained_at=self.explained_at,
            rate_mark=self._rate_mark, tok_s=self.tok_s,
        )  # fmt: skip

    @classmethod
    def restored(cls, found: ReplicaSnapshot) -> Replica:
        """The replica that ``found`` was taken of."""
        replica = cls(found.peer, found.user, found.hello, found.since)
        replica.state, replica.reason, replica.seen = found.state, found.reason, found.seen
        replica.last_heartbeat = found.last_heartbeat
        replica.others, replica.other_tokens = found.others, found.other_tokens
        replica.streams, replica.own_tokens, replica.paused = dict(found.streams), sum(found.streams.values()), found.paused
        replica.choice_ms, replica.last_sent, replica.refusing = found.choice_ms, found.last_sent, found.refusing
        replica._step_samples.extend(found.step_samples)
        replica.step_ms = median(found.step_samples) if found.step_samples else 0.0
        replica.faults.extend(found.faults)
        replica.quarantined, replica.explained_at = found.quarantined, found.explained_at
        replica._rate_mark, replica.tok_s = found.rate_mark, found.tok_s
        return replica


def without_lists(heartbeat: Heartbeat) -> Heartbeat:
    """The heartbeat without the hashes of its prefix cache, and without the use of API keys."""
    if not heartbeat.stats.prefixes and heartbeat.keys is None:
        return heartbeat
    return msgspec.structs.replace(heartbeat, stats=msgspec.structs.replace(heartbeat.stats, prefixes=[]), keys=None)


class ReplicaLoss(msgspec.Struct, frozen=True):
    """A replica that this router lost. ``choices``: number of the router's choices there; ``drained``: the replica had announced its
    drain."""

    replica: str
    model: str
    epoch: int
    reason: str
    choices: int
    drained: bool
    at: float


class HelloAccepted(msgspec.Struct, frozen=True):
    """An accepted Hello. ``replaced``: the record that it ended; ``fresh`` False = the same process on another connection."""

    replica: Replica
    replaced: Replica | None
    fresh: bool


class HelloRefused(msgspec.Struct, frozen=True):
    """A Hello that was refused; ``reason`` is sent in Bye (``stale`` makes the leader exit)."""

    reason: Literal["stale", "denied", "protocol", "full", "model"]


class ReplicaRegistry:
    """All replicas by name, fenced by epoch. Bounds: :data:`MAX_REPLICAS` names, one record each."""

    def __init__(self, replica_timeout_s: float, hang_floor_s: float, found: Iterable[ReplicaSnapshot] = ()) -> None:
        """``found``: the replicas of a snapshot, to start from."""
        self.replica_timeout_s, self.hang_floor_s = replica_timeout_s, hang_floor_s
        self.replicas: dict[str, Replica] = {}
        #: The last losses, and how many there were in all.
        self.losses: deque[ReplicaLoss] = deque(maxlen=KEPT_LOSSES)
        self.losses_total = 0
        self._by_peer: dict[bytes, Replica] = {}
        self._by_boot: dict[str, Replica] = {}
        for one in found:
            replica = Replica.restored(one)
            self.replicas[replica.name] = self._by_boot[replica.boot] = replica
            if replica.peer:
                self._by_peer[replica.peer] = replica

    def hello(self, peer: bytes, user: str, hello: Hello, now: float) -> HelloAccepted | HelloRefused:
        """Accept or refuse a Hello. The largest epoch of a name is kept as long as the name; a live name belongs to its first user; a
        process has one name."""
        if hello.protocol != PROTOCOL:
            return HelloRefused("protocol")
        old = self.replicas.get(hello.replica)
        speaker = self._by_boot.get(hello.boot)
        if speaker is not None and speaker is not old:
            return HelloRefused("denied")
        if old is None and len(self.replicas) >= MAX_REPLICAS:
            return HelloRefused("full")
        if old is not None:
            if hello.epoch < old.epoch:
                return HelloRefused("stale")
            if old.user != user and old.state != "lost":
                return HelloRefused("denied")
            if old.boot == hello.boot and old.epoch == hello.epoch and old.user == user:
                self._move(old, peer)
                if old.state == "lost":
                    old.enter("ready", "", now)
                old.note_heard(now)
                return HelloAccepted(old, None, False)
            self._forget(old)
        replica = Replica(b"", user, hello, now)
        self.replicas[hello.replica] = replica
        self._by_boot[hello.boot] = replica
        self._move(replica, peer)
        return HelloAccepted(replica, old, True)

    def speaker(self, peer: bytes, user: str, boot: str) -> tuple[Replica | None, bool]:
        """The sender of a message, and whether it arrived on another connection than the last one (a silent reconnect).

        The sender is known only if the process's nonce and the authenticated user are those of its Hello.
        """
        replica = self._by_peer.get(peer)
        if replica is not None and replica.boot == boot and replica.user == user:
            return replica, False
        replica = self._by_boot.get(boot)
        if replica is None or replica.user != user:
            return None, False
        self._move(replica, peer)
        return replica, True

    def judge(self, replica: Replica, heartbeat: Heartbeat, now: float) -> str:
        """Set the state that a heartbeat reports. Returns why the replica counts as lost, else an empty string."""
        bound = hang_bound_ms(self.hang_floor_s, heartbeat.predicted_ms)
        if heartbeat.busy_ms > bound:
            return f"no progress: step {heartbeat.step} runs for {heartbeat.busy_ms:.0f} ms, its bound is {bound:.0f} ms"
        wanted: RoutingState = "draining" if heartbeat.draining else "ready"
        if replica.state != wanted:
            replica.enter(wanted, "", now)
        return ""

    def progress_bound_s(self, replica: Replica) -> float:
        """Seconds in which a choice that nothing blocks must make progress at ``replica``: the longest time of a step."""
        last = replica.last_heartbeat
        return hang_bound_ms(self.hang_floor_s, last.predicted_ms if last is not None else 0.0) / 1000.0

    def lose(self, replica: Replica, why: str, now: float) -> bool:
        """Mark as lost; False if it was lost already."""
        if replica.state == "lost":
            return False
        reason = why[:MAX_REASON]
        drained = replica.state == "draining"
        self.losses_total += 1
        self.losses.append(ReplicaLoss(replica.name, replica.model, replica.epoch, reason, len(replica.streams), drained, now))
        replica.enter("lost", reason, now)
        return True

    def end_quarantines(self, now: float) -> None:
        """End the quarantines that have lasted long enough. A quarantined replica still gets requests that no other can run: the requests
        themselves may be the cause, so a quarantine must never remove the last replica."""
        for replica in self.replicas.values():
            if replica.quarantined and now - replica.faults[-1] > FAULT_WINDOW_S:
                replica.end_quarantine()

    def forget(self, now: float) -> None:
        """Drop the replicas that were lost long ago."""
        for replica in [r for r in self.replicas.values() if r.state == "lost" and now - r.since > KEPT_LOST_S]:
            self._forget(replica)
            del self.replicas[replica.name]

    def silent(self, now: float) -> list[Replica]:
        """Replicas that were silent for ``replica_timeout_s`` and are not lost yet."""
        return [r for r in self.replicas.values() if r.state != "lost" and now - r.seen > self.replica_timeout_s]

    def at(self, peer: bytes) -> Replica | None:
        """The replica last heard on this connection."""
        return self._by_peer.get(peer)

    def serving(self, model: str) -> list[Replica]:
        """Replicas of a model that accept or finish choices: the ready and the draining ones."""
        return [r for r in self.replicas.values() if r.model == model and r.state != "lost"]

    def trusted(self, model: str) -> list[Replica]:
        """Those of :meth:`serving` that choices are sent to: the quarantined ones only while no other is ready."""
        serving = self.serving(model)
        sound = [replica for replica in serving if not replica.quarantined]
        return sound if any(replica.state == "ready" for replica in sound) else serving

    def check(self) -> None:
        """Assert that the three indexes and each replica's own sums agree."""
        for name, replica in self.replicas.items():
            assert replica.name == name
            assert self._by_boot.get(replica.boot) is replica, f"{name}: boot index"
            assert not replica.peer or self._by_peer.get(replica.peer) is replica, f"{name}: peer index"
            assert replica.own_tokens == sum(replica.streams.values()), f"{name}: prompt tokens"
        for peer, replica in self._by_peer.items():
            assert replica.peer == peer and self.replicas.get(replica.name) is replica, f"{replica.name}: dead record indexed"
        assert len(self._by_boot) == len(self.replicas)

    def _move(self, replica: Replica, peer: bytes) -> None:
        if replica.peer == peer:
            return
        holder = self._by_peer.get(peer)
        if holder is not None:
            holder.move(b"")
        self._drop_peer(replica)
        replica.move(peer)
        self._by_peer[peer] = replica

    def _forget(self, replica: Replica) -> None:
        self._drop_peer(replica)
        if self._by_boot.get(replica.boot) is replica:
            del self._by_boot[replica.boot]

    def _drop_peer(self, replica: Replica) -> None:
        if self._by_peer.get(replica.peer) is replica:
            del self._by_peer[replica.peer]
