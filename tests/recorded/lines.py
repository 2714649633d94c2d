"""Runs command lines of ``trireme`` one after the other in one clean process: fixed width, no colour, an empty home, no ``TRIREME_*``.

The process is this file itself: it reads the lines as JSON from its standard input and answers with JSON on its standard output.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = "100"
BOUND_S = 120


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's but the search path."""
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": WIDTH, "LINES": "50", "TERM": "dumb",
        "NO_COLOR": "1", "LANG": "C.UTF-8", "TZ": "UTC",
    }  # fmt: skip


def run(lines: Sequence[Sequence[str]], folder: Path) -> list[Ran]:
    """What each line does, with ``folder`` as the working folder and home."""
    command = [sys.executable, "-m", "tests.recorded.lines"]
    asked = json.dumps([list(line) for line in lines])
    ran = subprocess.run(
        command, input=asked, capture_output=True, text=True, cwd=folder, env=environment(folder), timeout=BOUND_S, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [Ran(*found) for found in json.loads(ran.stdout)]


def run_module(module: str, *flags: str, folder: Path) -> Ran:
    """``python -m MODULE`` in a process of its own."""
    command = [sys.executable, "-m", module, *flags]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, env=environment(folder), timeout=BOUND_S, check=False
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def main() -> None:
    lines = json.load(sys.stdin)
    from orchestrator.cli.main import run as trireme

    found = []
    for line in lines:
        sys.stdin = io.StringIO()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = trireme(line)
        found.append(Ran(code, out.getvalue(), err.getvalue()))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
