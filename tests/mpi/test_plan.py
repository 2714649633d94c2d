"""Plans against engines: weights and KV tokens of each rank, predicted from descriptions, and as real ranks then report them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import psutil
import pytest

from orchestrator.planner.cluster import PlannedCluster
from orchestrator.planner.cost_model import Workload
from orchestrator.planner.devices import HostModel
from orchestrator.planner.known_models import SHAPES
from orchestrator.planner.planner import LayoutPlan, Subject, plan
from tests.mpi.world import run
from tests.reference.default_model import NAME, artifact
from tests.reference.shards import weight_bytes
from tests.support import figures
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact, quant_for
from workers.protocol.messages import Capacity
from workers.protocol.specs import ModelSpec, Parallel, PortableOptions, PortableSpec, ReplicaSpec

pytestmark = [pytest.mark.model, pytest.mark.mpi, pytest.mark.timeout(600)]
LOAD = Workload(name="asked", requests=1, isl=16, osl=16)
ASKED = 0.05
#: The default share of free memory (on any host with 4 GiB to spare: its cap), a share in bytes, a number of tokens, and int8 weights.
ENGINES = (
    PortableSpec(),
    PortableSpec(kv_bytes=3_000_001),
    PortableSpec(kv_tokens=1000),
    PortableSpec(dtype="bf16", options=PortableOptions(quant="int8")),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), heads=9, kv_heads=3, hidden=96, ffn=160, layers=5, vocab=331, tied=False)


def foretold(model: ModelSpec, folder: Path, engine: PortableSpec, parallel: Parallel) -> tuple[LayoutPlan, list[int]]:
    """(plan, weights of each rank) on this host as it is now."""
    quant = quant_for(open_artifact(folder), engine.options.quant)
    subject = Subject(name="m", model=model, quant=quant, engine=engine, gangs=(("r", parallel),))
    cluster = PlannedCluster(device=HostModel(memory=psutil.virtual_memory().available, cores=2), nodes=1, slots=2)
    (found,) = plan([subject], cluster, LOAD)
    assert found.refusal is None, found.refusal
    return found.own[0], [weight_bytes(model, parallel, rank, engine, quant) for rank in range(parallel.world)]


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(Parallel(), id="tp1"),
        pytest.param(Parallel(tp=2), id="tp2", marks=pytest.mark.long),
        pytest.param(Parallel(pp=2), id="pp2"),
    ],
)
def test_memory_is_what_the_engine_reports(tiny: Path, tmp_path: Path, parallel: Parallel) -> None:
    """The default model by its known shape, without its files; the tiny one, whose heads and columns no two ranks share evenly."""
    cases = [(open_artifact(tiny).model, tiny, engine) for engine in ENGINES] + [(SHAPES[NAME], artifact(), PortableSpec())]
    plans = [foretold(*case, parallel) for case in cases]
    specs = [ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=engine) for _, folder, engine in cases]
    report = tmp_path / "report.json"
    told = run(parallel.world, "tests.mpi.memory_program", report, {"specs": msgspec.to_builtins(specs)}, bound_s=400)
    capacities = msgspec.convert(told, list[Capacity])
    weights = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(parallel.world)]
    worst = 0.0
    for index, (capacity, (made, bytes_)) in enumerate(zip(capacities, plans, strict=True)):
        assert [rank[index] for rank in weights] == bytes_, "weights are the same to the byte"
        miss = abs(made.kv_tokens / (capacity.num_blocks * capacity.block_size) - 1)
        assert miss <= ASKED, (index, made.kv_tokens, capacity)
        worst = max(worst, miss)
    figures.lines.append(
        f"plan, CPU, tp={parallel.tp} pp={parallel.pp}: weights of {len(cases)} engines to the byte, "
        f"KV tokens {100 * worst:.2f} % off at most (asked: {ASKED:.0%})"
    )
