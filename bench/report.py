"""One measured claim as a value, and its output. Shared by every bench; owns no measurement."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

ROOT = Path(__file__).resolve().parent.parent


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """``runs``: the figure of each alternating run; the median is compared with the claim. ``asked`` is a lower or upper bound."""

    name: str
    unit: str
    asked: float
    sense: Literal[">=", "<="]
    runs: list[float]
    detail: str = ""

    @property
    def measured(self) -> float:
        return statistics.median(self.runs)

    @property
    def held(self) -> bool:
        return self.measured >= self.asked if self.sense == ">=" else self.measured <= self.asked


def publish(claims: Sequence[Claim]) -> None:
    """One JSON line per claim on stdout; text for the user goes to stderr."""
    for claim in claims:
        print(json.dumps({**msgspec.structs.asdict(claim), "measured": claim.measured, "held": claim.held}), flush=True)


def facts(tree: str) -> dict[str, str]:
    """Date and ``tree`` of a line."""
    return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": tree}


def record(line: dict[str, Any], output: Path | None) -> None:
    """Print ``line`` as JSON on stdout, and append it to ``output``."""
    text = json.dumps(line)
    print(text, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(f"{text}\n")


def commit() -> str:
    """The measured commit; "unknown" for a copy without a git history."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
