"""What an environment must have before a deployment is started: the missing package is named before anything is fetched or converted."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from orchestrator.config.deployment_file import load
from orchestrator.control.host import host_checks
from orchestrator.control.host.notices import Notice
from orchestrator.control.host.replica_source import OwnReplicas
from orchestrator.control.launch.mpiexec import MpiInstall
from workers.protocol.errors import EnvironmentFault

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
