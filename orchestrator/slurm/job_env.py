"""Where this process stands in its Slurm job: what the environment of a step says, read once. Owns nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from workers.protocol.errors import EnvironmentFault

#: Ports of a job: a pair below the range from which kernels deal out ports, the same on all nodes, another one for each of the next jobs.
_FIRST_PORT, _PAIRS = 20_000, 6_000


class JobPosition(msgspec.Struct, frozen=True, kw_only=True):
    """``start``: how often the job was started before this; ``index``: this node's number, 0 = the first one, which leads; ``head``: the
    first node's address; ``gpus``: what Slurm allotted on this node."""

    job: int
    task: str
    start: int
    index: int
    nodes: int
    node: str
    head: str
    cpus: int
    gpus: int

    @property
    def ray_port(self) -> int:
        return _FIRST_PORT + 2 * (self.job % _PAIRS)

    @property
    def roll_port(self) -> int:
        return self.ray_port + 1

    def deployment(self, name: str) -> str:
        """The deployment of one job: no two jobs share a name, and a requeued one keeps its own."""
        return f"{name}-{self.job}"

    def folder(self, jobs: str, name: str) -> Path:
        return Path(jobs, self.deployment(name))

    def start_folder(self, jobs: str, name: str) -> Path:
        return self.folder(jobs, name) / f"start-{self.start}"


def read_place(env: Mapping[str, str]) -> JobPosition:
    """Raises :class:`EnvironmentFault` outside a step of a Slurm job."""
    try:
        return JobPosition(
            job=int(env["SLURM_JOB_ID"]),
            task=env.get("SLURM_ARRAY_TASK_ID", ""),
            start=int(env.get("SLURM_RESTART_COUNT", "0")),
            index=int(env["SLURM_PROCID"]),
            nodes=int(env["SLURM_NTASKS"]),
            node=env["SLURMD_NODENAME"],
            head=env["SLURM_LAUNCH_NODE_IPADDR"],
            cpus=int(env.get("SLURM_CPUS_ON_NODE", "1")),
            gpus=int(env.get("SLURM_GPUS_ON_NODE", "0")),
        )
    except (KeyError, ValueError) as error:
        hint = "trireme submit slurm FILE.yaml submits a job that calls it"
        raise EnvironmentFault("this is not a step of a Slurm job", f"the environment says no usable {error}", hint) from None
