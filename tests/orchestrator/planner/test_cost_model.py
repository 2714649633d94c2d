"""The roofline against what was recorded on GPUs and CPUs, and its replay against the real batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fit import CPU_FITTED, CPU_HELD_OUT, FITTED, HELD_OUT, misses, recorded
from orchestrator.planner.cost_model import Pipeline, Rates, StageWork, StepLoad, Workload, replay, stage_seconds
from orchestrator.planner.devices import GPU_FIT, HOST_FIT
from tests.support import figures
from tests.support.examples import examples
from workers.engines.fake import FakeEngine
from workers.protocol.messages import GenerateTask, SamplingParams, Submit
from workers.protocol.specs import FakeOptions, FakeSpec, Parallel


def spread(name: str, *files: str) -> tuple[float, float]:
    """(root mean square, largest) relative miss of the recorded runs in ``files``, written down as a figure."""
    runs = list(recorded(*files))
    found = misses(runs, HOST_FIT if CPU_HELD_OUT in files else GPU_FIT)
    square, largest = float(np.sqrt(np.mean(found**2))), float(abs(found).max())
    missed = f"missed by {100 * square:.1f} % (root mean square), {100 * largest:.1f} % at most"
    figures.lines.append(f"plan, {name}: {len(runs)} recorded runs {missed}")
    return square, largest


def test_recorded_runs_are_met_within_the_stated_error() -> None:
    runs = list(recorded(FITTED, HELD_OUT))
    assert len(runs) == GPU_FIT.runs
    square, largest = spread("GPUs", FITTED, HELD_OUT)
    assert 2 * square <= GPU_FIT.error + 0.005, "the stated error is twice the spread"
    assert largest <= 1.5 * GPU_FIT.error


def test_runs_that_were_not_fitted_to_are_met_as_well() -> None:
    square, largest = spread("GPUs, held out", HELD_OUT)
    assert square <= GPU_FIT.error and largest <= 1.5 * GPU_FIT.error


def test_figures_of_cpus_are_met_within_the_stated_error() -> None:
    """Four runs of one thread were fitted to; two threads and two ranks were not."""
    assert len(list(recorded(CPU_FITTED, CPU_HELD_OUT))) == HOST_FIT.runs
    square, largest = spread("CPU", CPU_FITTED, CPU_HELD_OUT)
    assert 2 * square <= HOST_FIT.error + 0.005 and largest <= 1.5 * HOST_FIT.error


#: A device on which only the step itself costs anything: a replay then counts steps.
COUNTING = Rates(
    read=1.0, cached=1.0, traffic=1.0, product=1.0, narrow=1.0, attention=1.0, layer_s=0.0, alone_s=0.0, step_s=1.0, choice_s=0.0,
    sum_s=0.0, member_s=0.0, link=1.0, hop_s=0.0, wire=1.0,
)  # fmt: skip
NOTHING = StageWork(
    layers=1, weights=0, token_flop=0, sequence_flop=0, sequence_logits=0, token_bytes=0, cached_bytes=0, pair_flop=0, hidden_bytes=0, tp=1,
    narrow=False, plain=False, first=True,
)  # fmt: skip


class Counted(Pipeline):
    """Remembers what was run."""

    def __init__(self, stages: int = 1) -> None:
        super().__init__([NOTHING] * stages, COUNTING)
        self.loads: list[StepLoad] = []

    def seconds(self, load: StepLoad, lanes: int) -> float:
        self.loads.append(load)
        return 1.0


def steps_of_the_batch(workload: Workload, sequences: int, tokens: int) -> int:
    """Steps that the real batch takes for the same load, with room for every sequence's cache."""
    spec = FakeSpec(
        max_batch_size=sequences, max_num_tokens=tokens, kv_tokens=1 << 20, prefix_cache=False, options=FakeOptions(fake_step_ms=0.0)
    )
    engine = FakeEngine(spec, parallel=Parallel(), sleep=lambda seconds: None)
    for index in range(workload.requests):
        params = SamplingParams(temperature=0.0, max_tokens=workload.osl, ignore_eos=True)
        engine.submit(
            index,
            Submit(
                boot="b", stream=index, attempt=0, client="c", request_id=str(index), model="m",
                prompt_ids=[(31 * index + place) % 200 for place in range(workload.isl)], task=GenerateTask(params=params),
            ),
        )  # fmt: skip
    count = 0
    while engine.busy():
        engine.step()
        count += 1
    engine.close()
    return count


@settings(max_examples=examples(40), deadline=None)
@given(requests=st.integers(1, 24), isl=st.integers(1, 60), osl=st.integers(1, 12), sequences=st.integers(1, 16), spare=st.integers(0, 80))
def test_a_replay_takes_the_steps_of_the_real_batch(requests: int, isl: int, osl: int, sequences: int, spare: int) -> None:
    workload = Workload(name="w", requests=requests, isl=isl, osl=osl)
    tokens = sequences + spare
    counted = replay(Counted(), workload, sequences=sequences, max_num_tokens=tokens)
    assert abs(counted.seconds - steps_of_the_batch(workload, sequences, tokens)) <= max(1, 0.02 * counted.seconds)


@settings(max_examples=examples(100), deadline=None)
@given(
    requests=st.integers(1, 300), isl=st.integers(1, 500), osl=st.integers(1, 60), sequences=st.integers(1, 64), spare=st.integers(1, 900)
)
def test_a_replay_loses_no_token(requests: int, isl: int, osl: int, sequences: int, spare: int) -> None:
    """Every prompt token is computed once, every pair counted, every output token but the first costs a place in a step."""
    pipeline = Counted()
    budget = sequences + spare
    found = replay(pipeline, Workload(name="w", requests=requests, isl=isl, osl=osl), sequences=sequences, max_num_tokens=budget)
    assert all(0 < load.tokens <= budget and load.sequences <= sequences for load in pipeline.loads)
    assert sum(load.pairs for load in pipeline.loads) == pytest.approx(requests * isl**2 / 2)
    assert found.output_tok_s * found.seconds == pytest.approx(requests * osl)


def test_each_term_adds_what_it_says() -> None:
    quiet = {name: getattr(COUNTING, name) for name in COUNTING.__struct_fields__} | {"step_s": 0.0}
    rates = Rates(**quiet | {"layer_s": 0.5, "sum_s": 0.25, "member_s": 0.125, "link": 64.0})
    work = {name: getattr(NOTHING, name) for name in NOTHING.__struct_fields__}
    load = StepLoad(tokens=4, sequences=2, context=10.0, pairs=3.0)
    assert stage_seconds(StageWork(**work), rates, load) == 0.5
    assert stage_seconds(StageWork(**work | {"cached_bytes": 7}), rates, load) == 70.5
    assert stage_seconds(StageWork(**work | {"pair_flop": 7}), rates, load) == 21.5
    assert stage_seconds(StageWork(**work | {"weights": 9}), rates, load) == pytest.approx(9.5)
    assert stage_seconds(StageWork(**work | {"token_flop": 9}), rates, load) == pytest.approx(36.5)
    # One token's products with plain weights begin to read before their turn.
    one = StepLoad(tokens=1, sequences=1, context=0.0)
    assert stage_seconds(StageWork(**work), rates, one) == 0.5 and stage_seconds(StageWork(**work | {"plain": True}), rates, one) == 0.0
    # Two sums a layer and one of the embedding, each 0.25 + 2 x 0.125 s and 4 tokens x 16 bytes over the link.
    assert stage_seconds(StageWork(**work | {"tp": 2, "hidden_bytes": 16}), rates, load) == pytest.approx(0.5 + 3 * (0.5 + 1.0))


def test_a_full_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    slow = StageWork(**{name: getattr(NOTHING, name) for name in NOTHING.__struct_fields__} | {"weights": 3})
    pipeline = Pipeline([NOTHING, slow], COUNTING)
    load = StepLoad(tokens=1, sequences=1, context=0.0)
    assert pipeline.seconds(load, 1) == 1 + 4, "one sequence passes both"
    assert pipeline.seconds(load, 2) == 2 * 4, "two micro-batches wait for the slower one"
