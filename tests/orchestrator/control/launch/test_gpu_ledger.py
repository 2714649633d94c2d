"""Which GPUs a gang sees: each to one gang at a time, and what the launcher says reaches mpiexec."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.control.launch import mpiexec as mpi
from orchestrator.control.launch.gpu_ledger import GpuLedger, visible_gpus
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.local_launcher import LocalLauncher
from orchestrator.planner.placement import RankShare
from tests.support.gang import wait_for
from workers.protocol.specs import Parallel, ReplicaSpec


def test_gpus_are_those_named_or_those_there(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "2", "10"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-4f"}, tmp_path) == ["3", "GPU-4f"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_a_gpu_has_one_gang_at_a_time() -> None:
    ledger = GpuLedger(["0", "1", "2", "3", "4"])
    first, second = ledger.take(("a", 1), 2), ledger.take(("b", 1), 2)
    assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert ledger.take(("c", 1), 2) == {"CUDA_VISIBLE_DEVICES": "4"}, "its ranks say that they are too many"
    ledger.give_back(("a", 1))
    ledger.give_back(("a", 1))
    assert ledger.take(("a", 2), 2) == first


def test_two_replicas_on_one_host_see_different_gpus(tmp_path: Path) -> None:
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >> {tmp_path}/seen\nexec sleep 60\n')
    mpiexec.chmod(0o700)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    launcher = LocalLauncher(mpi.MpiInstall(mpiexec=str(mpiexec), family="mpich"), env)
    seen = tmp_path / "seen"
    try:
        for name in ("one", "two"):
            replica = ReplicaSpec(name=name, model="m", artifact=str(tmp_path), parallel=Parallel(tp=2))
            launcher.start(GangSpec(deployment="t", replica=replica, run_dir=str(tmp_path / "gangs"), share=RankShare(cpus=1.0, gpus=1.0)))
        wait_for(lambda: seen.exists() and len(seen.read_text().split()) == 2)
        assert sorted(seen.read_text().split()) == ["4,5", "6,7"]
        status = launcher.poll()[0]
        launcher.kill(status.name, status.epoch)
        replica = ReplicaSpec(name="three", model="m", artifact=str(tmp_path), parallel=Parallel(tp=1))
        launcher.start(GangSpec(deployment="t", replica=replica, run_dir=str(tmp_path / "gangs"), share=RankShare(cpus=1.0, gpus=1.0)))
        wait_for(lambda: len(seen.read_text().split()) == 3)
        assert seen.read_text().split()[-1] == "4"
    finally:
        launcher.close()
