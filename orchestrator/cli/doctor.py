"""`trireme doctor`: checks this machine. Changes nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.console import Console, table
from orchestrator.cli.model_options import CacheDir, cache_folder
from workers.protocol.errors import EnvironmentFault

STYLES = {"ok": "good", "warn": "warn", "fail": "bad"}


def doctor(
    context: typer.Context,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The HTTP port that a deployment would use.")] = 8000,
    cache_dir: CacheDir = None,
) -> None:
    """Check this machine: Python, torch, MPI, Ray, ports, memory, names. Exit code 4 if something must be fixed first."""
    from orchestrator.cli import doctor_checks

    console: Console = context.obj
    findings = doctor_checks.examine(port, cache_folder(cache_dir))
    rows = [[finding.name, finding.state.upper(), finding.found] for finding in findings]
    for line, finding in zip(table(["CHECK", "STATE", "FOUND"], rows).splitlines(), [None, *findings], strict=True):
        if finding is None:
            console.out(line)
            continue
        state = finding.state.upper()
        console.out(line.replace(f" {state} ", f" {console.paint(state, STYLES[finding.state])} ", 1))
    for finding in findings:
        if finding.hint:
            console.out(f"{console.paint('hint', 'hint')}: {finding.name}: {finding.hint}")
    if failed := [finding.name for finding in findings if finding.state == "fail"]:
        raise EnvironmentFault(f"this machine is not ready: {', '.join(failed)}", hint="the hints above say what to do")
