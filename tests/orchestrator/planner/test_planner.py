"""Plans: what fits and where, compared with reports of engines on GPUs, and with sums that can be done by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

from bench.fit import FITTED, HELD_OUT, model_of, recorded
from orchestrator.planner.cluster import PlannedCluster, layouts, take_place
from orchestrator.planner.cost_model import Workload
from orchestrator.planner.devices import GPU_FIT, GPUS, HOST_RANK, Gpu, HostModel, taken
from orchestrator.planner.known_models import SHAPES
from orchestrator.planner.placement import RankAssignment
from orchestrator.planner.planner import LayoutPlan, Subject, plan, rank_memory, ranks_memory, settings
from tests.support import figures
from tests.support.examples import examples
from workers.layout.memory import frozen_bytes
from workers.layout.sharding import active_parameters, parameters
from workers.protocol.errors import ConfigError
from workers.protocol.specs import PLAIN, EngineSpec, Parallel, PortableSpec, QuantName, TrtllmSpec, quant_of

LOAD = Workload(name="asked", requests=1, isl=512, osl=256)
LIMITS: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "max_batch_size": 512, "max_num_tokens": 8192, "max_seq_len": 8192}
GPU = PortableSpec(**LIMITS)
H100 = PlannedCluster(device=GPUS["H100"], nodes=1, slots=8)


def subject(name: str = "llama-3.1-70b", *gangs: Parallel, engine: EngineSpec = GPU, **more: object) -> Subject:
    layouts_ = gangs or (Parallel(),)
    made = Subject(
        name=name, model=SHAPES[name], quant=PLAIN, engine=engine, gangs=tuple((f"r{i}", gang) for i, gang in enumerate(layouts_))
    )
    return msgspec.structs.replace(made, **more)


def test_gpu_memory_is_what_recorded_engines_reported() -> None:
    """KV tokens that engines on H100 and H200 agreed on, within 5 %; the worst is written down."""
    worst = 0.0
    runs = {(run.gpu, run.shape, run.parallel, run.quant): run for run in recorded(FITTED, HELD_OUT)}
    for run in runs.values():
        ranks = [rank_memory(run.subject, run.parallel, rank, run.device) for rank in range(run.parallel.world)]
        miss = min(rank.kv_tokens for rank in ranks) / run.kv_tokens - 1
        worst = max(worst, abs(miss))
        assert abs(miss) <= 0.05, (run, miss)
    assert len(runs) == 8
    figures.lines.append(f"plan, KV tokens of {len(runs)} engines on GPUs: {100 * worst:.2f} % off at most (asked: 5 %)")


def test_known_shapes_have_as_many_parameters_as_their_makers_publish() -> None:
    published = {
        "smollm2-135m-instruct": 134_515_008,
        "qwen3-8b": 8_190_735_360,
        "qwen3-32b": 32_762_123_264,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "qwen3-30b-a3b": 30_532_122_624,
        "mixtral-8x7b": 46_702_792_704,
    }
    assert {name: parameters(shape) for name, shape in SHAPES.items()} == published
    active = {name: round(active_parameters(SHAPES[name]) / 1e9, 1) for name in ("qwen3-8b", "qwen3-30b-a3b", "mixtral-8x7b")}
    assert active == {"qwen3-8b": 8.2, "qwen3-30b-a3b": 3.4, "mixtral-8x7b": 12.9}
    for name, shape in (("8b", "llama-3.1-8b"), ("70b", "llama-3.1-70b")):
        assert parameters(model_of(name)) == parameters(SHAPES[shape]), "recorded runs are of these shapes"


@pytest.mark.parametrize(
    ("layout", "free", "found", "left"),
    [
        (Parallel(tp=4), [8, 4], RankAssignment(nodes=(1,), ranks=(4,), unit=4), [8, 0]),
        (Parallel(tp=4, pp=2), [8, 8], RankAssignment(nodes=(0,), ranks=(8,), unit=8), [0, 8]),
        (Parallel(tp=4, pp=3), [8, 8], RankAssignment(nodes=(0, 1), ranks=(8, 4), unit=4), [0, 4]),
        (Parallel(tp=3, pp=2), [4, 4], RankAssignment(nodes=(0, 1), ranks=(3, 3), unit=3), [1, 1]),
        (Parallel(tp=8), [4, 4], RankAssignment(nodes=(0, 1), ranks=(4, 4), unit=1, splits_group=True), [0, 0]),
        (Parallel(tp=8, pp=2), [4, 4], None, [4, 4]),
    ],
)
def test_a_gang_goes_to_one_node_or_stage_by_stage(
    layout: Parallel, free: list[int], found: RankAssignment | None, left: list[int]
) -> None:
    assert take_place(layout, free) == found
    assert free == left


def test_spread_gives_each_stage_a_node_where_there_are_as_many() -> None:
    free = [8, 8]
    assert take_place(Parallel(tp=2, pp=2), free, spread=True) == RankAssignment(nodes=(0, 1), ranks=(2, 2), unit=2, spread=True)
    assert free == [6, 6]
    assert take_place(Parallel(tp=2, pp=3), free, spread=True) == RankAssignment(nodes=(0,), ranks=(6,), unit=6)
    (found,) = plan([subject("llama-3.1-8b", Parallel(pp=2), spread=True)], PlannedCluster(device=GPUS["H100"], nodes=2, slots=8), LOAD)
    assert found.own[0].placement.crossings == 1 and found.own[0].error is None


def test_a_small_models_steps_wait_for_the_leader_and_no_error_is_claimed() -> None:
    """Where contexts are short and layers few: else the device takes its time."""
    shallow = msgspec.structs.replace(SHAPES["smollm2-135m-instruct"], layers=(0,) * 4)
    (found,) = plan([subject("smollm2-135m-instruct", model=shallow)], H100, Workload(name="asked", requests=1, isl=64, osl=32))
    assert found.own[0].error is None and "host's own share" in found.own[0].notes[0]
    (found,) = plan([subject("smollm2-135m-instruct")], H100, LOAD)
    assert found.own[0].error is None and not found.own[0].notes


def test_what_does_not_fit_says_what_would() -> None:
    (found,) = plan([subject("llama-3.1-70b", Parallel(tp=1))], H100, LOAD)
    assert found.refusal is not None and not found.own
    assert found.refusal.exit_code == 3 and "rank 0 of tp=1 pp=1 does not fit on an H100" in found.refusal.what
    assert found.best is not None and settings(found.best) in found.refusal.hint
    # The advice holds: planned itself, it fits.
    advised = subject("llama-3.1-70b", *([found.best.parallel] * found.best.replicas))
    (again,) = plan([advised], H100, LOAD)
    assert again.refusal is None and again.own[0].replicas == found.best.replicas


def test_too_few_gpus_say_how_many_there_must_be() -> None:
    small = PlannedCluster(device=GPUS["H100"], nodes=1, slots=1)
    (found,) = plan([subject("llama-3.1-70b")], small, LOAD)
    assert found.refusal is not None and "use 2 x H100 with tp_size: 2, pp_size: 1" in found.refusal.hint
    (found,) = plan([subject("llama-3.1-8b", Parallel(tp=2))], small, LOAD)
    assert found.refusal is not None
    assert (found.refusal.why, found.refusal.hint) == (
        "2 ranks are asked for, 1 places are there",
        "use tp_size: 1, pp_size: 1, replicas: 1",
    )


def test_options_leave_room_for_the_other_models() -> None:
    first, second = subject("llama-3.1-8b", Parallel(tp=2)), subject("llama-3.1-70b", Parallel(tp=4))
    plans = plan([first, second], H100, LOAD)
    assert all(each.refusal is None for each in plans)
    assert {made.parallel.world * made.replicas for made in plans[0].options} <= {1, 2, 3, 4}
    assert max(made.parallel.world * made.replicas for made in plans[1].options) == 6


def test_no_option_tears_a_tensor_parallel_group() -> None:
    (found,) = plan([subject("llama-3.1-70b", Parallel(tp=8))], PlannedCluster(device=GPUS["H200"], nodes=4, slots=4), LOAD)
    assert found.own[0].placement.splits_group and found.own[0].full is None and "crosses nodes" in found.own[0].notes[0]
    assert found.options and all(made.parallel.tp <= 4 and not made.placement.splits_group for made in found.options)
    speeds = [made.total_tok_s for made in found.options]
    assert speeds == sorted(speeds, reverse=True) and found.quickest is not None
    assert found.quickest.one is not None and found.quickest.one.token_ms == min(made.one.token_ms for made in found.options if made.one)


def test_error_is_stated_only_where_runs_were_recorded() -> None:
    def error(made: Subject, cluster: PlannedCluster = H100) -> float | None:
        (found,) = plan([made], cluster, LOAD)
        return found.own[0].error

    model = "llama-3.1-8b"
    assert error(subject(model)) == GPU_FIT.error
    assert error(subject(model, quant=quant_of("fp8"))) == GPU_FIT.error
    assert error(subject(model, quant=quant_of("int4"))) is None
    assert error(subject(model, Parallel(tp=8))) is None
    assert error(subject(model), PlannedCluster(device=GPUS["A100"], nodes=1, slots=8)) is None
    assert error(subject(model, Parallel(pp=2)), PlannedCluster(device=GPUS["H100"], nodes=2, slots=1)) is None


def test_fp32_is_computed_at_its_own_rate() -> None:
    plans = [
        plan([subject("llama-3.1-8b", engine=msgspec.structs.replace(GPU, dtype=dtype))], H100, LOAD)[0].own[0]
        for dtype in ("bf16", "fp32")
    ]
    assert plans[1].total_tok_s < plans[0].total_tok_s / 5 and plans[1].error is None


def test_fp8_needs_a_gpu_that_has_it() -> None:
    (found,) = plan([subject("llama-3.1-8b", quant=quant_of("fp8"))], PlannedCluster(device=GPUS["A100"], nodes=1, slots=8), LOAD)
    assert found.refusal is not None and "no FP8" in found.refusal.what and found.refusal.hint == "use int8"


def test_tensorrt_llm_takes_even_splits_only() -> None:
    uneven = subject(
        "smollm2-135m-instruct",
        Parallel(tp=2),
        engine=TrtllmSpec(**LIMITS),
    )
    (found,) = plan([uneven], H100, LOAD)
    assert found.refusal is not None and "TensorRT-LLM needs tp to divide" in found.refusal.what
    assert {made.parallel.tp for made in found.options} <= {1, 3}


def test_a_cache_that_is_asked_for_must_fit() -> None:
    wanted = msgspec.structs.replace(GPU, kv_tokens=1_000_000)
    (found,) = plan([subject("llama-3.1-8b", engine=wanted)], H100, LOAD)
    assert found.refusal is not None and "1000000 tokens take 131.1 GB" in found.refusal.why
    assert found.best is not None and found.best.parallel.world > 1


def test_short_caches_are_noted() -> None:
    """A cache that is sized automatically may be shorter than the context; one that is asked for may not."""
    small = Gpu(name="small", memory=24 << 30)
    engine = PortableSpec(device="cuda", dtype="bf16", max_num_tokens=512)
    (memory,) = ranks_memory(subject("llama-3.1-8b", engine=engine), Parallel(), small, gang_ranks=1, node_ranks=1)
    assert 0 < memory.kv_tokens < 131072
    (found,) = plan(
        [subject("llama-3.1-8b", engine=msgspec.structs.replace(engine, max_batch_size=4))],
        msgspec.structs.replace(H100, device=msgspec.structs.replace(GPUS["H100"], memory=24 << 30)),
        LOAD,
    )
    assert "tokens are refused: the cache holds no more" in found.own[0].notes[0]
    (found,) = plan([subject("llama-3.1-8b", engine=msgspec.structs.replace(GPU, kv_tokens=512))], H100, LOAD)
    assert found.refusal is not None and "cannot hold one request" in found.refusal.what


def test_a_host_is_shared_by_all_its_ranks() -> None:
    engine = PortableSpec(max_seq_len=2048)
    model = SHAPES["smollm2-135m-instruct"]
    weights = frozen_bytes(model, Parallel(), 0, engine, PLAIN)
    memory = 2 * (HOST_RANK + weights) + (800 << 20)
    (found,) = plan(
        [subject("smollm2-135m-instruct", engine=engine)], PlannedCluster(device=HostModel(memory=memory, cores=2), nodes=1, slots=2), LOAD
    )
    alone, both = found.own[0], next(made for made in found.options if made.replicas == 2)
    assert alone.ranks[0].cache > both.ranks[0].cache > 0
    # A quarter of what two ranks leave free.
    assert both.ranks[0].cache == pytest.approx(0.25 * (800 << 20), rel=0.01)
    tight = PlannedCluster(device=HostModel(memory=memory // 3, cores=2), nodes=1, slots=2)
    (found,) = plan([subject("smollm2-135m-instruct", engine=engine)], tight, LOAD)
    assert found.refusal is not None and "its share of the host" in found.refusal.what


def test_ranks_that_share_cores_are_slower_and_no_error_is_claimed() -> None:
    engine = PortableSpec(max_seq_len=2048)
    two, four = (
        plan(
            [subject("smollm2-135m-instruct", *[Parallel()] * count, engine=engine)],
            PlannedCluster(device=HostModel(memory=16 << 30, cores=2), nodes=1, slots=4),
            LOAD,
        )[0].own[0]
        for count in (2, 4)
    )
    assert two.error == 0.35 and four.error is None
    assert two.full is not None and four.full is not None and 1.8 < four.full.token_ms / two.full.token_ms < 2.2


def test_layouts_use_nodes_whole() -> None:
    model = SHAPES["llama-3.1-70b"]
    assert {layout.tp for layout in layouts(12, 6, model)} == {1, 2, 3, 4, 6}
    assert all(layout.world <= 12 for layout in layouts(12, 6, model))
    assert [layout.world for layout in layouts(3, 3, model)] == [1, 2, 2, 3, 3]


def test_more_gpus_never_hold_less() -> None:
    """KV tokens grow with every rank that is added along one axis."""
    tokens: dict[Parallel, int] = {}
    for layout in (Parallel(tp=2), Parallel(tp=4), Parallel(tp=8), Parallel(pp=2), Parallel(pp=4), Parallel(pp=8)):
        (found,) = plan([subject("llama-3.1-70b", layout)], H100, LOAD)
        tokens[layout] = found.own[0].kv_tokens if found.own else 0
    assert tokens[Parallel(tp=2)] < tokens[Parallel(tp=4)] < tokens[Parallel(tp=8)]
    assert tokens[Parallel(pp=2)] < tokens[Parallel(pp=4)] < tokens[Parallel(pp=8)]


def test_what_a_rank_loses_before_its_weights_grows_with_its_groups() -> None:
    sizes = [taken(layout) for layout in (Parallel(), Parallel(tp=2), Parallel(pp=2), Parallel(tp=2, pp=2))]
    assert sizes == sorted(sizes) and sizes[0] > 1e9


def test_impossible_layouts_are_the_engines_to_refuse() -> None:
    made = subject("smollm2-135m-instruct", Parallel(tp=16))
    (found,) = plan([made], PlannedCluster(device=GPUS["H100"], nodes=2, slots=8), LOAD)
    assert isinstance(found.refusal, ConfigError) and "9 query heads" in found.refusal.what
    assert isinstance(found.best, LayoutPlan)


@settings_(max_examples=examples(20), deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    gpu=st.sampled_from(sorted(GPUS)),
    nodes=st.integers(1, 4),
    slots=st.integers(1, 8),
    tp=st.integers(1, 16),
    pp=st.integers(1, 6),
    count=st.integers(1, 4),
    quant=st.sampled_from([None, "int8", "int4", "fp8"]),
    spread=st.booleans(),
)
def test_whatever_is_asked_the_parts_never_exceed_the_whole(
    name: str, gpu: str, nodes: int, slots: int, tp: int, pp: int, count: int, quant: QuantName | None, spread: bool
) -> None:
    form = quant_of(quant) if quant else PLAIN
    cluster = PlannedCluster(device=GPUS[gpu], nodes=nodes, slots=slots)
    (found,) = plan([subject(name, *[Parallel(tp=tp, pp=pp)] * count, quant=form, spread=spread)], cluster, LOAD)
    assert bool(found.own) != bool(found.refusal)
    for made in (*found.own, *found.options):
        assert made.parallel.world * made.replicas <= nodes * slots and sum(made.placement.ranks) == made.parallel.world
        assert len(made.ranks) == made.parallel.world and made.kv_tokens == min(rank.kv_tokens for rank in made.ranks)
        for rank in made.ranks:
            assert min(rank.weights, rank.step, rank.other, rank.cache) > 0
            assert rank.weights + rank.step + rank.other + rank.cache <= rank.total == GPUS[gpu].memory
        if made.full is not None and made.one is not None:
            assert 0 < made.one.token_ms <= 1.001 * made.full.token_ms and made.full.output_tok_s > 0
