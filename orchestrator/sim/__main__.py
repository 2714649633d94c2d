"""``python -m orchestrator.sim --schedules 10000 [--seed 1] [--jobs 2]``: random fault schedules against the routing core.

``--replay FILE`` runs one file instead: a schedule, as a failed run prints it, or a router's dump, as ``trireme debug dump`` writes it.
Exit code 1 if a guarantee was broken, or if the replay of a dump differs from it; 3 if FILE is neither of the two. The first failure's seed
and shrunk schedule are printed as JSON that ``--replay`` takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

from orchestrator.router.core.recorder import Dump, read_dump
from orchestrator.sim.replay import replay
from orchestrator.sim.schedule import Schedule, draw
from orchestrator.sim.shrink import judge, shrink, verdict
from workers.protocol.errors import ArtifactError, TriremeError

#: Number of failed seeds that are printed.
NAMED = 10
#: The largest file that ``--replay`` reads. A dump is text of about twice the bytes of a recorder's window.
MAX_FILE_BYTES = 512 << 20


class SimTotals(msgspec.Struct, kw_only=True):
    """The result of a series of runs; ``failures``: seed and verdict."""

    runs: int = 0
    tokens: int = 0
    gangs: int = 0
    simulated_s: float = 0.0
    events: dict[str, int] = {}
    ends: dict[str, int] = {}
    counts: dict[str, int] = {}
    failures: list[tuple[int, str]] = []

    def add(self, other: SimTotals) -> None:
        self.runs += other.runs
        self.tokens += other.tokens
        self.gangs += other.gangs
        self.simulated_s += other.simulated_s
        self.failures = [*self.failures, *other.failures]
        for name in ("events", "ends", "counts"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))


def run_series(seeds: range) -> SimTotals:
    tally = SimTotals()
    for seed in seeds:
        schedule = draw(seed)
        found = judge(schedule)
        one = SimTotals(runs=1, events=dict(Counter(str(event.__struct_config__.tag) for event in schedule.events)))
        if isinstance(found, str):
            one.failures = [(seed, found)]
        else:
            one.tokens, one.gangs, one.simulated_s = found.tokens, found.gangs, found.seconds
            one.ends, one.counts = found.ends, found.counts
        tally.add(one)
    return tally


def run_jobs(first: int, schedules: int, jobs: int) -> SimTotals:
    """The series split over ``jobs`` processes."""
    if jobs <= 1:
        return run_series(range(first, first + schedules))
    share = -(-schedules // jobs)
    starts = range(first, first + schedules, share)
    command = [sys.executable, "-m", "orchestrator.sim", "--json", "--jobs", "1"]
    children = [
        subprocess.Popen(
            [*command, "--seed", str(start), "--schedules", str(min(share, first + schedules - start))], stdout=subprocess.PIPE
        )
        for start in starts
    ]
    tally = SimTotals()
    for child in children:
        tally.add(msgspec.json.decode(child.communicate()[0], type=SimTotals))
    return tally


def tell(tally: SimTotals, seconds: float) -> None:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count)

    print(f"{tally.runs} schedules in {seconds:.1f} s, {tally.simulated_s:.0f} s simulated, {len(tally.failures)} failed")
    print(f"events: {listed(tally.events)}")
    print(f"clients: {listed(tally.ends)}; {tally.tokens} tokens, each checked; {tally.gangs} gangs launched")
    print(f"routers: {listed(tally.counts)}")


def tell_failures(tally: SimTotals) -> None:
    for seed, broken in tally.failures[:NAMED]:
        print(f"seed {seed}: {broken}")
    seed = tally.failures[0][0]
    small = shrink(draw(seed))
    print(f"seed {seed}, shrunk: {judge(small)}\n{msgspec.json.encode(small).decode()}")


def run_file(file: Path) -> int:
    """Run a schedule or replay a dump, and print the result. Returns the exit code. Raises :class:`ArtifactError`."""
    found = read_file(file)
    if isinstance(found, Schedule):
        outcome = judge(found)
        print(outcome)
        return int(isinstance(outcome, str))
    title = f"dump of {found.header.settings.router}: {len(found.events)} events"
    try:
        report = replay(found)
    except TriremeError:
        raise
    except Exception as error:  # the edge of a run, as in judge()
        print(f"{title}: the core raised {verdict(error)}")
        return 1
    print(f"{title} of {report.seconds:.1f} s, {report.actions} actions: {report.difference or 'the replay is the same'}")
    return int(bool(report.difference))


def read_file(file: Path) -> Schedule | Dump:
    """The content of ``--replay``'s file. Raises :class:`ArtifactError` if it is neither a schedule nor a complete dump."""
    try:
        with file.open("rb") as readable:
            content = readable.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}", error.strerror or str(error), "trireme debug dump -o FILE writes one") from None
    if len(content) > MAX_FILE_BYTES:
        raise ArtifactError(f"{file} is too large to be a dump", f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    first, _, _ = content.partition(b"\n")
    if b'"setup"' in first:
        try:
            return msgspec.json.decode(content, type=Schedule)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{file} is no schedule that can be run", str(error), "was it cut off, or made by another version?"
            ) from None
    try:
        return read_dump(content.splitlines())
    except ValueError as error:
        hint = "is it whole, and of this version? trireme debug dump -o FILE writes one"
        raise ArtifactError(f"{file} is neither a router's dump nor a schedule", str(error), hint) from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.sim", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; the others follow")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", action="store_true", help="the tally as JSON")
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run this file: a schedule (one JSON object with `setup`) or a router's dump (its first line has `format`)",
    )
    options = parser.parse_args(argv)
    if options.replay is not None:
        try:
            return run_file(options.replay)
        except TriremeError as error:
            print(error.lines(), file=sys.stderr)
            return error.exit_code
    begun = time.monotonic()
    tally = run_jobs(options.seed, options.schedules, options.jobs)
    if options.json:
        print(msgspec.json.encode(tally).decode())
        return 0
    tell(tally, time.monotonic() - begun)
    if tally.failures:
        tell_failures(tally)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
