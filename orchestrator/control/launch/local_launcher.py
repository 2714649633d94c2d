"""Gangs as children of this process, on this host: the launcher that needs no Ray. A gang ends when this process does."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from orchestrator.control.launch.gpu_ledger import GpuLedger, visible_gpus
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.mpiexec import MpiInstall
from orchestrator.control.launch.supervisor import GangSupervisor, LocalNode
from orchestrator.control.reconciler import GangStatus
from workers.epoch import make_epoch

log = logging.getLogger("trireme.launch")


class LocalLauncher:
    """Launcher of one host. Called from one thread. ``mpi`` None: no MPI is installed, and only gangs that need none can start. ``env``:
    the base environment of ranks."""

    def __init__(self, mpi: MpiInstall | None, env: Mapping[str, str]) -> None:
        self._mpi, self._env = mpi, dict(env)
        self._gangs: dict[tuple[str, int], GangSupervisor] = {}
        self._gpus = GpuLedger(visible_gpus(self._env))

    def start(self, spec: GangSpec) -> None:
        epoch, world = make_epoch(spec.last_epoch), spec.replica.parallel.world
        own = self._gpus.take((spec.replica.name, epoch), world) if spec.share.gpus else {}
        gang = GangSupervisor(spec, epoch, [LocalNode(world, own=own)], mpi=self._mpi, env=self._env)
        self._gangs[spec.replica.name, epoch] = gang
        gang.start()

    def poll(self) -> list[GangStatus]:
        return [gang.status() for gang in self._gangs.values()]

    def drain(self, name: str, epoch: int) -> None:
        if (gang := self._gangs.get((name, epoch))) is not None:
            gang.drain()

    def kill(self, name: str, epoch: int) -> None:
        gang = self._gangs.get((name, epoch))
        if gang is None:
            return
        if left := gang.kill():
            log.error("replica %s epoch %d: processes %s do not die", name, epoch, left)
            return
        del self._gangs[name, epoch]
        self._gpus.give_back((name, epoch))

    def close(self) -> None:
        for name, epoch in list(self._gangs):
            self.kill(name, epoch)
