"""An update, move by move, against the real reconciler: never more than one replica away, and all the way back when a new one fails."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from orchestrator.control.reconciler import ENDED, DrainGang, GangStatus, KillGang, LaunchGang, Reconciler, RestartPolicy
from orchestrator.control.rollout import Rollout, RolloutBounds, RolloutMove, RolloutTarget, plan
from tests.support.examples import examples
from workers.protocol.status import GangPhase

TICK_S, LOAD_S, DRAIN_S = 0.2, 1.0, 0.6


def targets(*names: str, version: str = "1", model: str = "m") -> list[RolloutTarget]:
    return [RolloutTarget(name=name, model=model, revision=f"{name}:{version}") for name in names]


SPARE = targets("spare", version="2")


class World:
    """Gangs as a launcher would report them. ``bad``: versions that end while they load; ``homeless``: replicas without a place."""

    def __init__(self, old: list[RolloutTarget], *, bad: frozenset[str] = frozenset(), homeless: frozenset[str] = frozenset()) -> None:
        self.reconciler = Reconciler(RestartPolicy(backoff_s=0.5, start_timeout_s=20.0, drain_grace_s=5.0))
        self.bad, self.homeless, self.now, self.epoch = bad, homeless, 100.0, 0
        self.gangs: dict[str, GangStatus] = {}
        self.wanted = {target.name: target.revision for target in old}
        for target in old:
            self._set(target.name, target.revision, "ready")

    def _set(self, name: str, version: str, phase: GangPhase, cause: str = "") -> None:
        if phase in ("placing", "starting"):
            self.epoch += 1
        self.gangs[name] = GangStatus(name=name, epoch=self.epoch, revision=version, phase=phase, since=self.now, cause=cause)

    @property
    def ready(self) -> set[str]:
        return {name for name, gang in self.gangs.items() if gang.phase == "ready"}

    def tick(self, rollout: Rollout) -> None:
        self.now += TICK_S
        for name, gang in list(self.gangs.items()):
            age = self.now - gang.since
            if gang.phase == "starting" and age >= LOAD_S:
                broken = gang.revision in self.bad
                self._set(name, gang.revision, "failed" if broken else "ready", "it does not load" if broken else "")
            elif gang.phase == "draining" and age >= DRAIN_S:
                self._set(name, gang.revision, "stopped")
        wants = rollout.wants()
        hashes = {want.name: want.revision for want in wants}
        for action in self.reconciler.step(self.now, wants, list(self.gangs.values()), frozenset()):
            match action:
                case LaunchGang(name):
                    self._set(name, hashes[name], "placing" if name in self.homeless else "starting")
                case DrainGang(name, _):
                    self._set(name, self.gangs[name].revision, "draining")
                case KillGang(name, _, _):
                    del self.gangs[name]
        rollout.step(self.now, {view.name: view for view in self.reconciler.views()})

    def run(self, rollout: Rollout, *, least: int) -> None:
        """Until the update is over; at every moment at least ``least`` replicas serve."""
        for _ in range(5000):
            if rollout.over:
                break
            self.tick(rollout)
            assert len(self.ready) >= least, f"only {self.ready} serve while: {rollout.doing}"
        assert rollout.over, f"still: {rollout.doing}"
        for _ in range(100):  # what is not wanted any more is gone too
            self.tick(rollout)

    def versions(self) -> dict[str, str]:
        return {name: gang.revision for name, gang in self.gangs.items() if gang.phase not in ENDED}


def update(world: World, old: list[RolloutTarget], new: list[RolloutTarget], spares: list[RolloutTarget], *, least: int) -> Rollout:
    rollout = Rollout(old, plan(old, new, spares), RolloutBounds(spare_s=3.0, move_s=60.0), world.now)
    world.run(rollout, least=least)
    return rollout


def served(goal: list[RolloutTarget]) -> dict[str, str]:
    return {target.name: target.revision for target in goal}


def test_the_order_of_moves() -> None:
    old, new = targets("a", "b", "c"), [*targets("b", "a", version="2"), *targets("d")]
    assert list(map(str, plan(old, new, []))) == ["start d", "replace b", "replace a", "end c"]
    new = [*targets("a", "b", version="2"), *targets("c")]
    moves = plan(old, new, SPARE, ready=frozenset({"a", "c"}))
    assert list(map(str, moves)) == ["start the spare spare", "replace b", "replace a", "end the spare spare"]
    assert plan(old, old, SPARE) == []


def test_with_a_spare_as_many_serve_as_before() -> None:
    old, new = targets("a", "b"), targets("a", "b", version="2")
    world = World(old)
    rollout = update(world, old, new, SPARE, least=2)
    assert rollout.phase == "done" and world.versions() == served(new)
    assert [step.text for step in rollout.steps] == ["start the spare spare", "replace a", "replace b", "end the spare spare"]
    assert all(step.seconds >= LOAD_S for step in rollout.steps[:3])


def test_without_room_one_is_away_at_a_time() -> None:
    old, new = targets("a", "b", "c"), targets("a", "b", "c", version="2")
    world = World(old)
    assert update(world, old, new, [], least=2).phase == "done" and world.versions() == served(new)


def test_a_spare_without_a_place_is_done_without() -> None:
    old, new = targets("a", "b"), targets("a", "b", version="2")
    world = World(old, homeless=frozenset({"spare"}))
    rollout = update(world, old, new, SPARE, least=1)
    assert rollout.phase == "done" and world.versions() == served(new)
    assert "no room" in rollout.steps[0].text


def test_a_spare_that_fails_ends_it_before_anything_else_is_touched() -> None:
    old, new = targets("a", "b"), targets("a", "b", version="2")
    world = World(old, bad=frozenset({"spare:2"}))
    before = dict(world.gangs)
    rollout = update(world, old, new, SPARE, least=2)
    assert rollout.phase == "returned" and "replica spare does not start: it does not load" in rollout.error
    assert world.gangs == before


def test_a_replica_that_fails_takes_all_of_it_back() -> None:
    old, new = targets("a", "b", "c"), [*targets("a", "b", version="2"), *targets("d")]
    world = World(old, bad=frozenset({"b:2"}))
    rollout = update(world, old, new, [], least=2)
    assert rollout.phase == "returned" and "replica b does not start" in rollout.error
    assert world.versions() == served(old)


def test_when_the_old_version_fails_too_it_is_wanted_all_the_same() -> None:
    old, new = targets("a", "b"), targets("a", "b", version="2")
    world = World(old, bad=frozenset({"b:2", "a:1"}))
    rollout = update(world, old, new, [], least=0)
    assert rollout.phase == "returned" and "on the way back" in rollout.error
    assert rollout.wanted == served(old)


def test_it_waits_for_a_replica_that_comes_back_by_itself() -> None:
    old, new = targets("a", "b"), targets("a", "b", version="2")
    world = World(old)
    rollout = Rollout(old, plan(old, new, []), RolloutBounds(move_s=60.0), world.now)
    world.tick(rollout)
    world._set("b", "b:1", "failed", "killed")
    for _ in range(3):
        world.tick(rollout)
        assert rollout.doing == "replace a"
    world.run(rollout, least=0)
    assert rollout.phase == "done" and world.versions() == served(new)


def test_a_move_knows_both_ways() -> None:
    assert str(RolloutMove(name="x", before="1", after="")) == "end x"


@settings(max_examples=examples(60), deadline=None)
@given(
    old=st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True),
    new=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("12")), min_size=1, max_size=4, unique_by=lambda row: row[0]),
    bad=st.sets(st.sampled_from([f"{name}:2" for name in [*"abcdef", "spare"]]), max_size=1),
    spare=st.booleans(),
    homeless=st.booleans(),
)
def test_any_update_ends_with_all_of_the_new_or_all_of_the_old(
    old: list[str], new: list[tuple[str, str]], bad: set[str], spare: bool, homeless: bool
) -> None:
    had = targets(*old)
    goal = [target for name, version in new for target in targets(name, version=version)]
    world = World(had, bad=frozenset(bad), homeless=frozenset({"spare"} if homeless else ()))
    rollout = update(world, had, goal, SPARE if spare else [], least=min(len(had), len(goal)) - 1)
    if rollout.phase == "done":
        assert world.versions() == served(goal)
    else:
        assert bad and world.versions() == served(had)
