"""The replica table of one router: who is there, since when, how loaded, and who must not be believed.

Owns every :class:`Replica` record and its state. Never touches requests (the router's :mod:`orchestrator.router.core.router_core` does),
clocks or
sockets: ``peer`` is an opaque reply address, ``user`` the authenticated key (empty where the transport itself proves the caller), and
neither is an identity alone. A replica is its name, fenced by epoch, held by one user, and spoken for by one process (``boot``).

    (unknown) --Hello--> ready --Heartbeat.draining--> draining --Bye--> lost
    ready, draining --silence | no progress | unreachable--> lost --healthy Heartbeat of the same boot--> ready
    any --Hello of a newer epoch or process--> the old record is lost, a new one is ready
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

import msgspec

from orchestrator.router.core.prefix_index import PrefixIndex
from workers.protocol.hang import hang_bound_ms
from workers.protocol.messages import PROTOCOL, Heartbeat, Hello
from workers.protocol.status import RoutingState

#: Names that one router remembers; more are refused, so an authenticated peer cannot grow the table.
MAX_REPLICAS = 1024
#: Seconds that a lost one is among them: every job that joins standing routers brings names of its own.
KEPT_LOST_S = 3600.0
#: So many requests that ended by logits that are not finite, within so many seconds, and as long a rest after the last of them.
FAULT_LIMIT, FAULT_WINDOW_S = 3, 60.0
#: Losses that are remembered, for people to read.
KEPT_LOSSES = 32
#: Rows of one router at a replica, those without credit included, as a multiple of its batch.
MAX_PLACED = 8
#: Heartbeats over which the usual length of a step is taken. One alone tells the load of a moment: right after a burst of prompts, the
#: replica whose heartbeat happened to see its prefill would look many times slower than its equals, and they would get all the rest.
PACE_BEATS = 15

#: What a replica's speed depends on as far as a router is told: engine, tp, pp, dtype, quantization, rows and tokens of a step.
Kind = tuple[str, int, int, str, str | None, int, int]


class Replica:
    """One gang as this router knows it. ``streams``: the router's live placements here, in order, each with the prompt tokens that are
    to be computed before its first token. ``peer`` is empty while another connection's owner took its address over."""

    __slots__ = (
        "_paces",
        "_tok_mark",
        "boot",
        "capacity",
        "chosen",
        "epoch",
        "faults",
        "kind",
        "load",
        "model",
        "name",
        "other_tokens",
        "others",
        "own_tokens",
        "paused",
        "peer",
        "prefixes",
        "quarantined",
        "reason",
        "refusing",
        "resume",
        "row_ms",
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
        self.epoch, self.resume, self.capacity = hello.epoch, hello.resume, hello.capacity
        self.state: RoutingState = "ready"
        self.reason = ""
        self.since = self.seen = now
        self.load: Heartbeat | None = None
        self.streams: dict[int, int] = {}
        #: Those of them whose clients take nothing now: their K/V is given up, so they hold no place.
        self.paused = 0
        #: Rows that other routers run here, as of the last heartbeat.
        self.others = 0
        #: Prompt tokens that its own placements wait for: the sum of ``streams``' values.
        self.own_tokens = 0
        #: Prompt tokens that wait here for other routers' rows, as of the last heartbeat.
        self.other_tokens = 0
        #: Smoothed life of a row here, ms; what a freed slot is waited for.
        self.row_ms = 1000.0
        #: Serial of the last placement here: ties go to the least recently chosen.
        self.chosen = 0
        #: It bounced a row; nothing more is sent before its next heartbeat.
        self.refusing = False
        capacity = hello.capacity
        self.kind: Kind = (
            capacity.engine, capacity.tp, capacity.pp, capacity.dtype, capacity.quant.quant_algo, capacity.max_batch_size,
            capacity.max_num_tokens,
        )  # fmt: skip
        self.prefixes = PrefixIndex(hello.capacity.num_blocks if hello.capacity.prefix_cache else 0)
        #: Usual length of a step of late, ms; 0 before the first one was heard of.
        self.step_ms = 0.0
        self._paces: deque[float] = deque(maxlen=PACE_BEATS)
        #: When requests ended here by logits that are not finite; with enough of them it runs only what nobody else can.
        self.faults: deque[float] = deque(maxlen=FAULT_LIMIT)
        self.quarantined = False
        self.tok_s = 0.0
        self._tok_mark: tuple[float, int] | None = None

    @property
    def rows(self) -> int:
        """Rows that run or wait here as far as this router can tell: its own placements and what others were last seen to have."""
        return len(self.streams) - self.paused + self.others

    @property
    def lookahead(self) -> int:
        """Rows kept queued at the replica itself, so that a slot freed in one step is filled in the next."""
        return max(1, self.capacity.max_batch_size // 16)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait here before a new row's. A router counts its own rows' itself, since heartbeats tell of the end of some
        step: in a burst, a replica whose heartbeat is older would look emptier, and get the rest of it."""
        return self.own_tokens + self.other_tokens

    @property
    def free_rows(self) -> int:
        """How many more rows may be sent now."""
        if self.state != "ready" or self.refusing:
            return 0
        size = self.capacity.max_batch_size
        return max(0, min(size + self.lookahead - self.rows, MAX_PLACED * size - len(self.streams)))

    def beat(self, heartbeat: Heartbeat, accepted: int, waiting: list[int], now: float) -> None:
        """Take in a heartbeat. ``accepted``: own rows that it can have counted; ``waiting``: those of them without a first token, oldest
        first."""
        stats = heartbeat.stats
        if stats.step_ms and (self.load is None or heartbeat.step != self.load.step):
            self._paces.append(stats.step_ms)
            self.step_ms = median(self._paces)
        self.load = heartbeat
        self.others = max(0, stats.running + stats.waiting - accepted)
        computed = sum(self.streams[stream] for stream in waiting) - stats.prefill_tokens
        self.other_tokens = max(0, -computed) if self.others else 0
        if stats.running + stats.waiting >= accepted:  # else it tells of a step before some of them came
            for stream in waiting:
                part = min(max(0, computed), self.streams[stream])
                self.streams[stream] -= part
                self.own_tokens -= part
                computed -= part
        self.refusing = False
        if stats.prefixes:
            self.prefixes.add(stats.prefixes)
        mark = self._tok_mark
        if mark is None or stats.output_tokens_total < mark[1]:
            self._tok_mark = (now, stats.output_tokens_total)
        elif now - mark[0] >= 1.0:
            self.tok_s = (stats.output_tokens_total - mark[1]) / (now - mark[0])
            self._tok_mark = (now, stats.output_tokens_total)


class ReplicaLoss(msgspec.Struct, frozen=True):
    """A replica's end in this router's eyes. ``rows``: its own that ran there; ``drained``: it had said that it would leave."""

    replica: str
    model: str
    epoch: int
    reason: str
    rows: int
    drained: bool
    at: float


class HelloAccepted(msgspec.Struct, frozen=True):
    """A Hello that was believed. ``replaced``: the record that it ended; ``fresh`` False = the same process on another connection."""

    replica: Replica
    replaced: Replica | None
    fresh: bool


class HelloRefused(msgspec.Struct, frozen=True):
    """A Hello that was not believed; ``reason`` goes out in Bye (``stale`` tells a gang to exit)."""

    reason: Literal["stale", "denied", "protocol", "full", "model"]


class ReplicaRegistry:
    """All replicas by name, fenced by epoch. Bounds: :data:`MAX_REPLICAS` names, one record each."""

    def __init__(self, replica_timeout_s: float, hang_floor_s: float) -> None:
        self._timeout, self._hang_floor = replica_timeout_s, hang_floor_s
        self.replicas: dict[str, Replica] = {}
        self.losses: deque[ReplicaLoss] = deque(maxlen=KEPT_LOSSES)
        self._by_peer: dict[bytes, Replica] = {}
        self._by_boot: dict[str, Replica] = {}

    def hello(self, peer: bytes, user: str, hello: Hello, now: float) -> HelloAccepted | HelloRefused:
        """Judge a Hello. The largest epoch of a name is kept as long as the name; a live name belongs to the user that holds it; a process
        speaks for one name."""
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
                    self._enter(old, "ready", "", now)
                old.seen = now
                return HelloAccepted(old, None, False)
            self._forget(old)
        replica = Replica(b"", user, hello, now)
        self.replicas[hello.replica] = replica
        self._by_boot[hello.boot] = replica
        self._move(replica, peer)
        return HelloAccepted(replica, old, True)

    def speaker(self, peer: bytes, user: str, boot: str) -> tuple[Replica | None, bool]:
        """Whose message this is, and whether it came on another connection than the last (a silent reconnect).

        Believed only if the process's nonce and the authenticated user are the ones of its Hello.
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
        """Set the state that a heartbeat asks for. Returns why the replica is newly lost, else an empty string."""
        bound = hang_bound_ms(self._hang_floor, heartbeat.predicted_ms)
        if heartbeat.busy_ms > bound:
            return f"no progress: step {heartbeat.step} runs for {heartbeat.busy_ms:.0f} ms, its bound is {bound:.0f} ms"
        wanted: RoutingState = "draining" if heartbeat.draining else "ready"
        if replica.state != wanted:
            self._enter(replica, wanted, "", now)
        return ""

    def lose(self, replica: Replica, reason: str, now: float) -> bool:
        """Mark as lost; False if it was so already. Its prefix record goes: a restarted process has an empty cache."""
        if replica.state == "lost":
            return False
        drained, rows = replica.state == "draining", len(replica.streams)
        self.losses.append(ReplicaLoss(replica.name, replica.model, replica.epoch, reason[:200], rows, drained, now))
        self._enter(replica, "lost", reason, now)
        replica.load = None
        replica.others = replica.other_tokens = 0
        replica.tok_s = 0.0
        return True

    def fault(self, replica: Replica, now: float) -> bool:
        """A request ended there by logits that are not finite; whether that was one too many. The request may be at fault itself, so
        a quarantine costs only a choice, never the last replica."""
        replica.faults.append(now)
        if replica.quarantined or len(replica.faults) < FAULT_LIMIT or now - replica.faults[0] > FAULT_WINDOW_S:
            return False
        replica.quarantined = True
        return True

    def pardon(self, now: float) -> None:
        """End the quarantines whose rest is over."""
        for replica in self.replicas.values():
            if replica.quarantined and now - replica.faults[-1] > FAULT_WINDOW_S:
                replica.quarantined = False
                replica.faults.clear()

    def forget(self, now: float) -> None:
        """Drop those that were lost long ago."""
        for replica in [r for r in self.replicas.values() if r.state == "lost" and now - r.since > KEPT_LOST_S]:
            self._forget(replica)
            del self.replicas[replica.name]

    def silent(self, now: float) -> list[Replica]:
        """Replicas that were not heard for ``replica_timeout_s`` and are not lost yet."""
        return [r for r in self.replicas.values() if r.state != "lost" and now - r.seen > self._timeout]

    def at(self, peer: bytes) -> Replica | None:
        """The replica last heard on this connection."""
        return self._by_peer.get(peer)

    def serving(self, model: str) -> list[Replica]:
        """Replicas of a model that take or finish rows: ready ones and draining ones."""
        return [r for r in self.replicas.values() if r.model == model and r.state != "lost"]

    def trusted(self, model: str) -> list[Replica]:
        """Those of :meth:`serving` that rows are sent to: the quarantined ones only while no other is ready."""
        serving = self.serving(model)
        sound = [replica for replica in serving if not replica.quarantined]
        return sound if any(replica.state == "ready" for replica in sound) else serving

    def check(self) -> None:
        """Assert that the three indexes tell the same story."""
        for name, replica in self.replicas.items():
            assert replica.name == name
            assert self._by_boot.get(replica.boot) is replica, f"{name}: boot index"
            assert not replica.peer or self._by_peer.get(replica.peer) is replica, f"{name}: peer index"
        for peer, replica in self._by_peer.items():
            assert replica.peer == peer and self.replicas.get(replica.name) is replica, f"{replica.name}: dead record indexed"
        assert len(self._by_boot) == len(self.replicas)

    def _enter(self, replica: Replica, state: RoutingState, reason: str, now: float) -> None:
        replica.state, replica.reason, replica.since = state, reason, now
        if state == "lost":
            replica.prefixes.clear()

    def _move(self, replica: Replica, peer: bytes) -> None:
        if replica.peer == peer:
            return
        holder = self._by_peer.get(peer)
        if holder is not None:
            holder.peer = b""
        self._drop_peer(replica)
        replica.peer = peer
        self._by_peer[peer] = replica

    def _forget(self, replica: Replica) -> None:
        self._drop_peer(replica)
        if self._by_boot.get(replica.boot) is replica:
            del self._by_boot[replica.boot]

    def _drop_peer(self, replica: Replica) -> None:
        if self._by_peer.get(replica.peer) is replica:
            del self._by_peer[replica.peer]
