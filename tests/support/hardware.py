"""Pretend hosts for automatic settings, and deployments decided on them."""

from __future__ import annotations

from orchestrator.config.deployment_file import ModelConfig
from orchestrator.planner.automatic import ClusterHardware, GangDecision, GpuHardware, ModelDescription, NodeHardware, decide

GIB = 1 << 30


def gpu(gib: int, name: str = "NVIDIA Test GPU", capability: tuple[int, int] = (9, 0)) -> GpuHardware:
    return GpuHardware(name=name, memory=gib * GIB, capability=capability)


def host(*gpus: GpuHardware, nodes: int = 1, grows: bool = False, memory: int = 64 * GIB, **more: object) -> ClusterHardware:
    """``nodes`` alike, each with these GPUs, 64 GiB of free memory and 16 cores."""
    node = NodeHardware(gpus=gpus, memory=memory, cores=16, **more)  # type: ignore[arg-type]
    return ClusterHardware(nodes=(node,) * nodes, grows=grows)


NO_GPU = host()
#: One usual GPU of a workstation, and a node as data centres have them.
ONE_SMALL = host(gpu(24))
EIGHT_LARGE = host(*[gpu(80)] * 8)


def decided(model: ModelConfig, hardware: ClusterHardware = NO_GPU, described: ModelDescription | None = None) -> list[GangDecision]:
    """Each replica of ``model`` with its settings; ``described``: what its files say, nothing where they need not be known."""
    return decide([(request, described or ModelDescription()) for request in model.gangs()], hardware)
