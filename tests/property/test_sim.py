"""The simulator: random fault schedules keep every promise, recorded ones still do, and what breaks a promise is found and made small.

The long series is `make test-sim`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.router.core.choice_state import ChoiceState
from orchestrator.router.core.policy.least_wait import LeastWait
from orchestrator.router.core.recorder import dump_lines, read_dump
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.sim.__main__ import main, run_jobs, run_series
from orchestrator.sim.replay import replay
from orchestrator.sim.schedule import Schedule, draw
from orchestrator.sim.shrink import judge, shrink
from orchestrator.sim.world import Outcome, World
from workers.scheduler.block_pool import BlockPool
from workers.serving.stream_table import StreamTable

INCIDENTS = sorted((Path(__file__).parent / "incidents").glob("*.json"))
SCHEDULES = 200


def test_random_schedules_keep_every_promise() -> None:
    tally = run_jobs(100_000, SCHEDULES, jobs=2)
    assert tally.runs == SCHEDULES and not tally.failures
    # What never happened was not tested.
    assert {"arrive", "leave", "wander", "kill", "freeze", "hang", "slow", "cut", "lose", "lie", "drain", "usurp", "crash", "close"} == set(
        tally.events
    )
    assert {"finished", "left", "deadline"} == set(tally.ends)
    for count in (
        "resubmitted",
        "attached",
        "stale_tokens",
        "duplicate_tokens",
        "gaps",
        "replicas_lost",
        "invalid",
        "stalled",
        "quarantines",
        "refused_hellos",
        "overloaded",
    ):
        assert tally.counts.get(count, 0) > 0, count


@pytest.mark.parametrize("incident", INCIDENTS, ids=lambda path: path.stem)
def test_a_recorded_incident_stays_mended(incident: Path) -> None:
    found = judge(msgspec.json.decode(incident.read_bytes(), type=Schedule))
    assert isinstance(found, Outcome), found


def test_a_schedule_runs_equally_every_time() -> None:
    schedule = draw(7)
    again = msgspec.json.decode(msgspec.json.encode(schedule), type=Schedule)
    assert again == schedule and judge(again) == judge(schedule)


@pytest.mark.parametrize("window", [40, 400])
def test_what_a_router_recorded_replays_to_the_last_byte(window: int) -> None:
    """Also from the middle: a short window begins with a snapshot of a router at work."""
    begun_at_work = dumps = 0
    for seed in range(200_000, 200_040):
        world = World(draw(seed), window_events=window)
        world.run()
        for dump in [dump for router in world.routers for dump in router.dumps]:
            lines = dump_lines(dump)
            assert replay(read_dump(lines)).difference == "", f"seed {seed}"
            dumps += 1
            begun_at_work += read_dump(lines).snapshot.table.requests != []
    assert dumps >= 40 and (window > 100 or begun_at_work), "nothing was replayed that matters"


def test_a_replay_that_comes_out_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(draw(7), window_events=10_000)
    world.run()
    lines = dump_lines(world.routers[0].dumps[-1])
    monkeypatch.setattr(LeastWait, "choose", lambda self, query, candidates: None)
    assert replay(read_dump(lines)).difference.startswith("line ")


def _cut(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-9]]


def _other_version(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"dump 1", b"dump 2"), *lines[1:]]


def _other_policy(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"policy":"least_wait"', b'"policy":"none"'), *lines[1:]]


DAMAGED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "an empty file": (lambda lines: [], "line 1: Input data was truncated"),
    "no dump at all": (lambda lines: [b"hello"], "line 1: JSON is malformed"),
    "only the header": (lambda lines: lines[:1], "the state before or after the events is missing"),
    "no last state": (lambda lines: lines[:3], "line 3: Object missing required field `closing`"),
    "cut off": (_cut, "line "),
    "another version": (_other_version, "line 1: its format is 'trireme router dump 2'"),
    "a header that was changed": (_other_policy, "contradicts itself"),
    "a broken schedule": (lambda lines: [b'{"setup":5}'], "Expected `object`"),
    "deep nesting": (lambda lines: [*lines[:2], b'{"at":1,"event":{"type":' + b"[" * 100_000, lines[-1]], "line 3: "),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_is_no_whole_dump_is_refused(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(draw(7), window_events=40)
    world.run()
    change, why = DAMAGED[damage]
    file = tmp_path / "router.dump"
    lines = dump_lines(world.routers[0].dumps[-1])
    file.write_bytes(b"\n".join(lines))
    assert main(["--replay", str(file)]) == 0
    file.write_bytes(b"\n".join(change(lines)))
    capsys.readouterr()
    assert main(["--replay", str(file)]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and why in said.err and "\nhint: " in said.err and not said.out


def test_a_file_that_cannot_be_read_or_is_too_large_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.sim.__main__.MAX_FILE_BYTES", 1 << 20)
    for file, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), (Path("/dev/zero"), "more than 1 MiB")):
        assert main(["--replay", str(file)]) == 3
        assert why in capsys.readouterr().err


def test_a_fault_of_the_core_is_found_again_by_its_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(draw(7), window_events=10_000)
    world.run()
    file = tmp_path / "router.dump"
    file.write_bytes(b"\n".join(dump_lines(world.routers[0].dumps[-1])))
    monkeypatch.setattr(LeastWait, "choose", lambda self, query, candidates: (99, "load"))
    assert main(["--replay", str(file)]) == 1
    assert "the core raised IndexError: list index out of range (router_core.py:" in capsys.readouterr().out


def _keep_orphans(self: StreamTable, router_boot: str, now: float) -> None:
    """Choices of a lost router run on for nobody."""


def _believe_the_dead(self: ReplicaRegistry, replica: Any, reason: str, now: float) -> bool:
    """Choices of a lost replica wait for it."""
    return False


def _credit_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, message: [*original(self, message), *original(self, message)]


MISTAKES: dict[str, tuple[type, str, Any]] = {
    "orphans are kept": (StreamTable, "router_lost", _keep_orphans),
    "a lost replica is waited for": (ReplicaRegistry, "lose", _believe_the_dead),
    "credit counts twice": (StreamTable, "credit", _credit_twice(StreamTable.credit)),
    "a choice that moves gets all its credit again": (ChoiceState, "credit", property(lambda self: self.granted)),
    "blocks are not given back": (BlockPool, "release", lambda self, blocks: None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_core_is_found_and_made_small(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, wrong)
    failed = next((seed for seed in range(400) if isinstance(judge(draw(seed)), str)), None)
    assert failed is not None, "the simulator does not see it"
    small = shrink(draw(failed))
    assert isinstance(judge(small), str)
    assert len(small.events) <= max(5, len(draw(failed).events) // 2)


def test_a_failure_is_printed_as_what_replay_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StreamTable, "router_lost", _keep_orphans)
        seed = next(seed for seed in range(400) if run_series(range(seed, seed + 1)).failures)
        assert main(["--schedules", "1", "--seed", str(seed), "--jobs", "1"]) == 1
        told = capsys.readouterr().out.splitlines()
        assert any(line.startswith(f"seed {seed}: AssertionError") for line in told)
        file = tmp_path / "schedule.json"
        file.write_text(told[-1])
        assert main(["--replay", str(file)]) == 1
    assert main(["--replay", str(file)]) == 0
