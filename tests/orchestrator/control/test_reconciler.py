"""The controller's memory: launches missing gangs, backs off, ends after too many failures, adopts, drains, and keeps its guarantees in any
order of events."""

from __future__ import annotations

import copy

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orchestrator.control.reconciler import (
    ENDED,
    Action,
    DrainGang,
    GangStatus,
    KillGang,
    LaunchGang,
    Reconciler,
    ReplicaView,
    RestartPolicy,
    WantedReplica,
)
from tests.support.examples import examples
from workers.protocol.status import GangPhase

POLICY = RestartPolicy(max_failures=4, stable_s=60.0, start_timeout_s=100.0, drain_grace_s=5.0)
NONE: frozenset[tuple[str, int]] = frozenset()


class World:
    """Gangs as a launcher would report them; carries the actions out."""

    def __init__(self) -> None:
        self.reconciler = Reconciler(POLICY)
        self.now = 1000.0
        self.wanted: list[WantedReplica] = [WantedReplica(name="a", revision="1")]
        self.gangs: dict[tuple[str, int], GangStatus] = {}
        self.next_epoch = 1
        self.launches: list[float] = []

    def step(self, hung: frozenset[tuple[str, int]] = NONE) -> list[Action]:
        actions = self.reconciler.step(self.now, self.wanted, list(self.gangs.values()), hung)
        for action in actions:
            match action:
                case LaunchGang(name, restarts):
                    want = next(want for want in self.wanted if want.name == name)
                    self.add(name, "starting", want.revision, restarts)
                    self.launches.append(self.now)
                case KillGang(name, epoch, _):
                    del self.gangs[name, epoch]
                case DrainGang(name, epoch):
                    self.phase(name, epoch, "draining")
        return actions

    def add(self, name: str, phase: GangPhase, revision: str = "1", restarts: int = 0) -> int:
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        self.gangs[name, epoch] = GangStatus(name=name, epoch=epoch, revision=revision, phase=phase, since=self.now, restarts=restarts)
        return epoch

    def phase(self, name: str, epoch: int, phase: GangPhase, *, cause: str = "", permanent: bool = False) -> None:
        old = self.gangs[name, epoch]
        self.gangs[name, epoch] = msgspec.structs.replace(old, phase=phase, since=self.now, cause=cause, permanent=permanent)

    def all(self, phase: GangPhase, **more: bool) -> None:
        for name, epoch in list(self.gangs):
            self.phase(name, epoch, phase, cause="x" if phase == "failed" else "", **more)

    def view(self) -> ReplicaView:
        return self.reconciler.views()[0]


def test_a_served_gang_is_replaced_at_once() -> None:
    world = World()
    world.step()
    world.all("ready")
    world.step()
    world.all("failed")
    assert [type(action) for action in world.step()] == [KillGang]
    assert [type(action) for action in world.step()] == [LaunchGang]


def test_restarts_are_a_total_and_failures_a_row() -> None:
    """As kubectl's RESTARTS: they stay when the replica has long been well, and when another controller takes over. A drain is none."""
    world = World()

    def counts() -> tuple[int, int]:
        return world.view().restarts, world.view().failures

    for round_ in range(1, 4):
        world.step()
        world.all("ready")
        world.step()
        world.now += POLICY.stable_s + 1
        world.step()
        assert counts() == (round_ - 1, 0)
        world.all("failed")
        world.step()
        assert counts() == (round_ - 1, 1), "it has not started again yet"
        world.step()
        assert counts() == (round_, 1)
    world.all("ready")
    world.reconciler = Reconciler(POLICY)
    world.step()
    assert counts() == (3, 0)
    assert world.reconciler.drain("a")
    world.step()
    world.all("stopped")
    world.step()
    world.step()
    assert counts() == (3, 0)
    world.wanted = [WantedReplica(name="a", revision="2")]
    world.step()
    assert counts() == (0, 0), "another configuration is another replica"


def test_back_off_doubles_and_ends_in_failed() -> None:
    world = World()
    for _ in range(400):
        world.step()
        world.all("failed")
        world.now += 0.25
    gaps = [round(b - a) for a, b in zip(world.launches, world.launches[1:], strict=False)]
    assert gaps == [1, 2, 4] and len(world.launches) == POLICY.max_failures
    assert world.view().phase == "failed" and world.view().cause == "x"
    assert Reconciler(RestartPolicy()).delay(12, was_ready=False) == 30.0


def test_a_permanent_failure_is_not_tried_again() -> None:
    world = World()
    world.step()
    world.all("failed", permanent=True)
    for _ in range(20):
        world.step()
        world.now += 60
    assert len(world.launches) == 1 and world.view().phase == "failed"
    world.wanted = [WantedReplica(name="a", revision="2")]
    assert world.step() == [LaunchGang("a")]


def test_a_new_controller_adopts_what_lives_and_ends_older_epochs() -> None:
    world = World()
    old, new = world.add("a", "ready"), world.add("a", "ready")
    assert world.step() == [KillGang("a", old, "a newer epoch of this replica exists")]
    assert world.step() == [] and world.view().epoch == new and world.view().phase == "ready"


def test_hung_and_slow_gangs_are_killed() -> None:
    world = World()
    world.step()
    world.all("ready")
    (action,) = world.step(frozenset({("a", 1)}))
    assert isinstance(action, KillGang) and "hung" in action.reason
    assert world.step() == [LaunchGang("a", restarts=1)]
    world.step()
    world.now += POLICY.start_timeout_s + 1
    (action,) = world.step()
    assert isinstance(action, KillGang) and "not ready" in action.reason


def test_time_in_which_the_controller_did_not_run_is_no_part_of_a_start_or_a_drain() -> None:
    world = World()
    epoch = world.add("a", "loading")
    world.step()
    for _ in range(3):
        world.now += POLICY.start_timeout_s + 1
        world.reconciler.postpone(POLICY.start_timeout_s)
        assert world.step() == []
    world.phase("a", epoch, "ready")
    world.wanted = []
    assert world.step() == [DrainGang("a", epoch)]
    world.now += 60.0
    world.reconciler.postpone(59.8)
    assert world.step() == []
    world.now += POLICY.drain_grace_s + 1.1
    (action,) = world.step()
    assert isinstance(action, KillGang) and "still running" in action.reason


def test_waiting_for_room_is_no_part_of_a_start() -> None:
    world = World()
    epoch = world.add("a", "placing")
    for _ in range(10):
        assert world.step() == []
        world.now += POLICY.start_timeout_s
    world.phase("a", epoch, "starting")
    world.now -= POLICY.start_timeout_s / 2
    assert world.step() == []
    world.now += POLICY.start_timeout_s
    (action,) = world.step()
    assert isinstance(action, KillGang) and "not ready" in action.reason


def test_a_hung_report_of_another_epoch_is_ignored() -> None:
    world = World()
    epoch = world.add("a", "ready")
    assert world.step(frozenset({("a", epoch - 1)})) == []


def test_change_drains_first_and_a_drain_that_hangs_is_killed() -> None:
    world = World()
    epoch = world.add("a", "ready")
    world.wanted = [WantedReplica(name="a", revision="2")]
    assert world.step() == [DrainGang("a", epoch)]
    world.now += 4
    assert world.step() == []
    world.now += 3
    (action,) = world.step()
    assert isinstance(action, KillGang) and "still running" in action.reason
    assert world.step() == [LaunchGang("a")]


def test_drain_on_request_counts_as_no_failure() -> None:
    world = World()
    epoch = world.add("a", "ready")
    world.step()
    assert world.reconciler.drain("a") and not world.reconciler.drain("b")
    assert world.step() == [DrainGang("a", epoch)]
    world.phase("a", epoch, "stopped")
    world.step()
    assert world.step() == [LaunchGang("a")] and world.view().failures == 0


def test_a_gang_that_drains_is_replaced_even_if_it_is_wanted_again() -> None:
    world = World()
    epoch = world.add("a", "ready")
    wanted, world.wanted = world.wanted, []
    assert world.step() == [DrainGang("a", epoch)]
    world.wanted = wanted
    world.now += 1.0
    assert world.step() == []
    world.now += POLICY.drain_grace_s + 2.0
    (action,) = world.step()
    assert isinstance(action, KillGang) and "still running" in action.reason
    assert world.step() == [LaunchGang("a")] and world.view().failures == 0


def test_nothing_wanted_ends_in_nothing() -> None:
    world = World()
    ready = world.add("a", "ready")
    loading = world.add("b", "loading")
    world.wanted = []
    actions = world.step()
    assert DrainGang("a", ready) in actions and any(isinstance(a, KillGang) and a.epoch == loading for a in actions)
    world.all("stopped")
    world.step()
    assert world.step() == [] and world.reconciler.views() == []


class AnyOrder(RuleBasedStateMachine):
    """Gangs live, fail, hang and are re-wanted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(seconds=st.floats(0.1, 90))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.step()

    @rule(phase=st.sampled_from(["loading", "ready", "draining", "stopped", "failed"]), permanent=st.booleans())
    def gang_moves(self, phase: GangPhase, permanent: bool) -> None:
        self.world.all(phase, permanent=permanent and phase == "failed")
        self.world.step()

    @rule()
    def gang_hangs(self) -> None:
        self.world.step(frozenset(self.world.gangs))

    @rule(names=st.sets(st.sampled_from("abc")), revision=st.sampled_from("12"))
    def wanted_changes(self, names: set[str], revision: str) -> None:
        self.world.wanted = [WantedReplica(name=name, revision=revision) for name in sorted(names)]
        self.world.step()

    @rule()
    def controller_restarts(self) -> None:
        self.world.reconciler = Reconciler(POLICY)
        self.world.step()

    @invariant()
    def one_gang_a_replica(self) -> None:
        names = [name for name, _ in self.world.gangs]
        assert len(names) == len(set(names)), "two engines on one slot"

    @invariant()
    def converges(self) -> None:
        """Left alone, with gangs that do what they are told, every wanted replica that has not failed permanently is ready in the end."""
        world = World()
        world.reconciler, world.now, world.wanted = self.world.reconciler, self.world.now, self.world.wanted
        world.gangs, world.next_epoch = dict(self.world.gangs), self.world.next_epoch
        world.reconciler = copy.deepcopy(self.world.reconciler)
        for _ in range(12):
            world.step()
            for name, epoch in list(world.gangs):
                phase = world.gangs[name, epoch].phase
                if phase == "draining":
                    world.phase(name, epoch, "stopped")
                elif phase not in ENDED and phase != "ready":
                    world.phase(name, epoch, "ready")
            world.now += 31
        world.step()
        views = {view.name: view.phase for view in world.reconciler.views()}
        assert set(views) == {want.name for want in world.wanted}
        assert set(views.values()) <= {"ready", "failed"}


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=examples(40), stateful_step_count=25, deadline=None)
