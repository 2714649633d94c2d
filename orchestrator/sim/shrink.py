"""Shrinks a failing schedule: events are removed as long as it still fails. Owns nothing."""

from __future__ import annotations

import traceback
from pathlib import PurePath

import msgspec

from orchestrator.sim.schedule import Arrive, Event, Schedule
from orchestrator.sim.world import Outcome, World

#: Maximum number of runs for one shrinking.
MAX_RUNS = 400


def judge(schedule: Schedule) -> Outcome | str:
    """The outcome of a run, or what it broke and where."""
    try:
        return World(schedule).run()
    except Exception as error:  # the edge of a run: any exception is its verdict
        return verdict(error)


def verdict(error: Exception) -> str:
    """What ended a run, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({PurePath(frame.filename).name}:{frame.lineno})"


def shrink(schedule: Schedule) -> Schedule:
    """A schedule of fewer events and shorter requests that fails too, though perhaps of something else."""
    runs = 0

    def fails(events: list[Event]) -> bool:
        nonlocal runs
        runs += 1
        return runs <= MAX_RUNS and isinstance(judge(msgspec.structs.replace(schedule, events=events)), str)

    events = list(schedule.events)
    size = max(1, len(events) // 2)
    while size:
        start = 0
        while start < len(events):
            fewer = events[:start] + events[start + size :]
            if fails(fewer):
                events = fewer
            else:
                start += size
        size //= 2
    for index, event in enumerate(events):
        if isinstance(event, Arrive):
            for plainer in ({"prompt": event.prompt[:1]}, {"n": 1}, {"credit": 0, "pace_s": 0.0}, {"logprobs": None}, {"stop_ids": ()}):
                changed = [*events[:index], msgspec.structs.replace(events[index], **plainer), *events[index + 1 :]]
                if changed != events and fails(changed):
                    events = changed
    return msgspec.structs.replace(schedule, events=events)
