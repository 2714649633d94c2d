"""``trireme up FILE`` whose gangs are :mod:`tests.faults.saboteur`: the product has no switch that breaks it, so tests launch what can."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from orchestrator.config.deployment_file import load
from orchestrator.control.host import deployment, desired_state
from tests.faults.saboteur import COMMAND


def main(file: str) -> int:
    plan = desired_state.plan

    def sabotaged(*arguments: object) -> desired_state.DesiredState:
        made = plan(*arguments)  # type: ignore[arg-type]
        return msgspec.structs.replace(made, gangs=[msgspec.structs.replace(gang, command=COMMAND) for gang in made.gangs])

    desired_state.plan = sabotaged
    return deployment.up(load(Path(file)).config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))
