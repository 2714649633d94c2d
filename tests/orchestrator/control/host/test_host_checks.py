"""What an environment must have before a deployment is started: the missing package is named before anything is fetched or converted."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import psutil
import pytest

from orchestrator.config.deployment_file import load
from orchestrator.control.host import host_checks
from orchestrator.control.host.notices import Notice
from orchestrator.control.host.replica_source import OwnReplicas
from orchestrator.control.launch.mpiexec import MpiInstall
from workers.protocol.errors import EnvironmentFault
from workers.protocol.specs import Parallel

MPI = MpiInstall(mpiexec="mpiexec", family="mpich")


def silent(_: Notice) -> None:
    pass


@pytest.mark.parametrize(
    ("launcher", "model", "lacking", "mpi", "extra"),
    [
        ("local", {"engine": "fake"}, {"torch", "ray"}, None, ""),
        ("local", {"engine": "portable"}, {"torch", "ray"}, MPI, "torch"),
        ("local", {"engine": "portable"}, {"ray"}, None, ""),
        ("local", {"engine": "portable", "tp_size": 1}, {"ray"}, None, ""),
        ("local", {"engine": "portable", "tp_size": 2}, {"ray"}, None, "mpich"),
        ("local", {"engine": "fake", "replicas": [{}, {"pp_size": 2}]}, set(), None, ""),
        ("local", {"engine": "fake", "replicas": [{}, {"engine": "portable", "tp_size": 1, "pp_size": 2}]}, set(), None, "mpich"),
        ("local", {"engine": "trtllm"}, set(), None, "mpich"),
        ("local", {"engine": "fake", "replicas": [{}, {"engine": "portable"}]}, {"torch"}, MPI, "torch"),
        ("ray", {"engine": "fake"}, {"ray"}, MPI, "ray"),
        ("ray", {"engine": "portable"}, {"torch"}, MPI, ""),
        ("ray", {"engine": "fake"}, set(), None, "mpich"),
    ],
)
def test_what_is_missing_is_named(
    launcher: str, model: dict[str, Any], lacking: set[str], mpi: MpiInstall | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray the ranks run on other nodes, which have their own torch. A layout that is not decided yet is looked at later."""
    monkeypatch.setattr(host_checks, "find_spec", lambda name: None if name in lacking else find_spec("json"))
    monkeypatch.setattr("orchestrator.control.host.replica_source.look_for_mpi", lambda path: mpi)
    replicas = OwnReplicas(load({"models": [{"name": "m", "path": "/m", **model}]}, flags={"launcher": launcher}).config, silent)
    if not extra:
        replicas.check()
        return
    with pytest.raises(EnvironmentFault) as found:
        replicas.check()
    assert f"pip install 'trireme-llm[{extra}]'" in found.value.hint


@pytest.mark.parametrize(
    ("worlds", "free_mib", "needed_mib"), [((2,), 16, 24), ((2,), 24, 0), ((4, 4), 63, 64), ((8,), 64, 0), ((1,), 0, 0)]
)
def test_shared_memory_is_checked_before_a_gang_starts(
    worlds: tuple[int, ...], free_mib: int, needed_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes at which mpiexec of MPICH was seen to die of SIGSEGV are refused: 2 ranks in 16 MiB, 4 in 24."""
    usage = psutil.disk_usage("/")._replace(free=free_mib << 20)
    monkeypatch.setattr(psutil, "disk_usage", lambda path: usage)
    layouts = [Parallel(tp=ranks) for ranks in worlds]
    if needed_mib:
        with pytest.raises(EnvironmentFault, match=f"{free_mib} MiB free, and the replicas of this host need {needed_mib} MiB"):
            host_checks.check_shared_memory("local", layouts, MPI)
    else:
        host_checks.check_shared_memory("local", layouts, MPI)
    host_checks.check_shared_memory("ray", layouts, MPI)
    host_checks.check_shared_memory("local", layouts, None)
