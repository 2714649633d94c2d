"""`make bench`: every CPU claim of docs/performance.md, one after the other, as JSON lines in a file and as a table on the terminal.

python -m bench [--runs 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import say

MODULES = ("bench.host", "bench.replica", "bench.router", "bench.engine")


def hardware() -> str:
    """The processor's name and how many of its cores this process may use."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


def claims_of(module: str, runs: int) -> list[dict[str, Any]]:
    argv = [sys.executable, "-m", module, "--runs", str(runs)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        say(f"{module} failed with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(claims: list[dict[str, Any]]) -> None:
    table = Table("claim", "asked", "measured", "runs", "held", "how")
    for claim in claims:
        runs = f"{min(claim['runs']):.3g} to {max(claim['runs']):.3g} ({len(claim['runs'])})"
        asked = f"{claim['sense']} {claim['asked']:g} {claim['unit']}"
        table.add_row(claim["name"], asked, f"{claim['measured']:.3g}", runs, "yes" if claim["held"] else "NO", claim["detail"])
    Console(width=200).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    begun = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = hardware()
    say(f"{begun}, {machine}, load {os.getloadavg()[0]:.1f}")
    claims = [claim for module in MODULES for claim in claims_of(module, args.runs)]
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps({"date": begun, "hardware": machine, **claim}) + "\n" for claim in claims)
    show(claims)
    return 0 if claims and all(claim["held"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
