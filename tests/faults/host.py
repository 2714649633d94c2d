"""``trireme up FILE`` whose gangs are :mod:`tests.faults.saboteur`: the product has no switch that breaks it, so tests launch what can."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from orchestrator.config.deployment_file import load
from orchestrator.control.host import deployment, deployment_plan
from tests.faults.saboteur import COMMAND


def main(file: str) -> int:
    plan = deployment_plan.plan

    def sabotaged(*arguments: object) -> deployment_plan.DeploymentPlan:
        made = plan(*arguments)  # type: ignore[arg-type]
        return msgspec.structs.replace(made, gangs=[msgspec.structs.replace(gang, command=COMMAND) for gang in made.gangs])

    deployment_plan.plan = sabotaged
    return deployment.up(load(Path(file)).config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))
