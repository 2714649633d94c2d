"""Scenarios that need a namespace of their own: a script runs inside and prints one line of JSON a step, the test outside looks at them.

A script calls :func:`step` for what it saw and :func:`measured` for its figures; an exception ends it and fails the test with its text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.figures import figure

ROOT = Path(__file__).resolve().parents[2]


def step(name: str, detail: object = "") -> None:
    print(json.dumps({"step": name, "detail": detail}), flush=True)


def measured(what: str, value: float, bound: float) -> None:
    """A figure for the list of the test outside, which also checks it."""
    print(json.dumps({"figure": what, "measured": value, "bound": bound}), flush=True)


def run_inside(flags: list[str], command: list[str], errors: Path, *, env: dict[str, str] | None = None, bound_s: float) -> list[Any]:
    """Run ``command`` in the namespaces that ``unshare`` makes by ``flags``; the details of its steps. Skips where that is not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is needed: this scenario must not touch the machine's own mounts and networks")
    unshare = ["unshare", *flags, "--pid", "--fork", "--mount-proc", "--kill-child"]
    allowed = subprocess.run([*unshare, "true"], capture_output=True, text=True, timeout=20, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"no namespace here: {allowed.stderr.strip()}")
    whole = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    with open(errors, "w") as log:
        ended = subprocess.run([*unshare, *command], stdout=subprocess.PIPE, stderr=log, text=True, timeout=bound_s, check=False, env=whole)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith(('{"step"', '{"figure"'))]
    for line in lines:
        if "figure" in line:
            figure(line["figure"], line["measured"], line["bound"])
        else:
            print(line)
    assert ended.returncode == 0, errors.read_text()[-6000:]
    return [line for line in lines if "step" in line]


def script(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
