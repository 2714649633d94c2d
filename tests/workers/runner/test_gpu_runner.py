"""The GPU runner on a fake device: the same tokens as the CPU runner gives, one plan ahead, over static buffers and graphs."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.reference.device_kernels as kernels
import workers.runner.gpu_runner as gpu_runner_module
from tests.reference.conformance import in_threads
from tests.reference.engine import Stream, drain, margin_violations, request, serve
from tests.reference.shards import make_stage, whole_weights
from tests.support.fake_device import FakeDevice
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Group, InProcess, Solo
from workers.distributed.rank_groups import RankGroups
from workers.engines.portable import PortableEngine
from workers.models.decoder import DecoderStage
from workers.protocol.messages import Capacity, SamplingParams, Submit
from workers.protocol.specs import Parallel
from workers.runner.cpu_runner import CpuRunner
from workers.runner.device import DECODE_GRAPH_SIZES, MIXED_GRAPH_SIZES, Graphs, Staging, graph_sizes
from workers.runner.gpu_runner import GpuRunner
from workers.runner.host_device_rings import Submissions
from workers.runner.kv_cache import KvCache
from workers.runner.step_results import PendingResult, PlanRunner
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import PLACEHOLDER, OpenSlot, StepPlan, StepResult, column, view

BLOCKS, SLOTS, LENGTH, VOCAB = 96, 7, 256, 321


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), heads=6, kv_heads=2, vocab=VOCAB, layers=3)


def make_gpu_runner(stage: DecoderStage, groups: RankGroups, *, blocks: int = BLOCKS, captured: bool = True) -> GpuRunner:
    cache = KvCache(stage.model, stage.shard, blocks=blocks, block_size=16, dtype=stage.dtype, device=stage.device)
    runner = GpuRunner(
        stage,
        cache,
        FakeDevice(),
        kernels,
        groups,
        slots=SLOTS,
        max_seq_len=LENGTH,
        max_num_tokens=64,
        depth=groups.pipeline.size + 1,
        eos_ids=(7,),
    )
    if captured:
        runner.capture()
    return runner


def engine_of(runner: PlanRunner, *, ahead: bool, blocks: int = BLOCKS, micro_batches: int = 1) -> PortableEngine:
    limits = Capacity(
        block_size=16, num_blocks=blocks, max_batch_size=SLOTS, max_num_tokens=64, max_seq_len=LENGTH, vocab_size=VOCAB, tp=1, pp=1
    )
    batch = Scheduler(limits, async_scheduling=ahead, micro_batches=micro_batches, eos_ids=(7,))
    return PortableEngine(batch, runner, limits, close=runner.close)


def both(folder: Path, *, blocks: int = BLOCKS, captured: bool = True) -> tuple[PortableEngine, PortableEngine]:
    """(engine over the CPU runner, engine one plan ahead over the GPU runner)."""
    model, weights = open_artifact(folder).model, whole_weights(folder)
    plain = make_stage(model, weights)
    cache = KvCache(model, plain.shard, blocks=blocks, block_size=16, dtype=plain.dtype, device=plain.device)
    host = CpuRunner(plain, cache, pipeline=Solo(), tensor=Solo(), slots=SLOTS, max_seq_len=LENGTH, eos_ids=(7,))
    device = make_gpu_runner(make_stage(model, weights, kernels=kernels), RankGroups(), blocks=blocks, captured=captured)
    return engine_of(host, ahead=False, blocks=blocks), engine_of(device, ahead=True, blocks=blocks)


KINDS = (
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=11, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=12, max_tokens=17, logprobs=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=20),
    SamplingParams(temperature=0.0, max_tokens=9, prompt_logprobs=1, logprobs=1),
    SamplingParams(temperature=0.7, seed=2**62 + 5, max_tokens=1),
    SamplingParams(temperature=0.0, min_tokens=5, max_tokens=12, stop_ids=(3, 5, 9, 11, 20)),
)


def requests(count: int) -> list[Submit]:
    return [request([(7 * i + 3 * j) % 300 for j in range(2 + 9 * i)], KINDS[i % len(KINDS)], id=i) for i in range(count)]


@pytest.mark.parametrize("captured", [True, False])
def test_one_plan_ahead_says_what_the_host_says(folder: Path, captured: bool) -> None:
    host, device = both(folder, captured=captured)
    expected, found = serve(host, requests(14)), serve(device, requests(14))
    for a, b in zip(expected, found, strict=True):
        assert (a.tokens == b.tokens and a.end == b.end) or not margin_violations(a, b, 1e-4)
        np.testing.assert_allclose([x.logprob for x in a.logprobs], [x.logprob for x in b.logprobs], atol=1e-4)
        assert [x.top_ids for x in a.logprobs] == [x.top_ids for x in b.logprobs]
        if a.prompt_logprobs is not None:
            assert b.prompt_logprobs is not None
            np.testing.assert_allclose([x.logprob for x in a.prompt_logprobs[1:]], [x.logprob for x in b.prompt_logprobs[1:]], atol=1e-4)
    stats = device.stats()
    assert stats.free_blocks == device.capacity.num_blocks
    device.close()


def test_steps_are_replayed_and_repeated_inputs_are_not_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    _, device = both(folder)
    replay, send = Graphs.replay, Submissions.send
    monkeypatch.setattr(Graphs, "replay", lambda self, size: (replayed.update([size]), replay(self, size)))
    monkeypatch.setattr(Submissions, "send", lambda self, step, words, updates: (sent.update([words]), send(self, step, words, updates)))
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    serve(device, [request([7 * i + j for j in range(11)], params, id=i) for i in range(3)])
    # Three prompts in one step of 33 tokens; then 99 steps of three sequences, which all get a block in every 16th step.
    assert replayed == {64: 1, 4: 99}
    assert sent.total() == 100 and sent[0] >= 90, "the inputs of a step that repeats are written again"


def test_more_sequences_than_any_graph_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner_module, "DECODE_GRAPH_SIZES", (1, 2))
    monkeypatch.setattr(gpu_runner_module, "MIXED_GRAPH_SIZES", (4,))
    host, device = both(folder)
    crowd = requests(SLOTS)
    assert [stream.tokens for stream in serve(device, crowd)] == [stream.tokens for stream in serve(host, crowd)]


def test_slot_updates_without_room_are_sent_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Submissions, "room", lambda self, words: 2)
    host, device = both(folder)
    crowd = requests(6)
    assert [stream.tokens for stream in serve(device, crowd)] == [stream.tokens for stream in serve(host, crowd)]


def test_sequences_that_lack_blocks_are_computed_again(folder: Path) -> None:
    host, device = both(folder, blocks=10)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=60, ignore_eos=True)
    crowd = [request([7 * i + j for j in range(4)], params, id=i) for i in range(9)]
    assert [stream.tokens for stream in serve(device, crowd)] == [stream.tokens for stream in serve(host, crowd)]
    assert device.stats().preemptions_total > 0 and device.stats().free_blocks == 10


def test_cancels_amid_steps_leave_nothing(folder: Path) -> None:
    _, device = both(folder)
    draw, streams = random.Random(4), {i: Stream() for i in range(20)}
    for i, submit in enumerate(requests(20)):
        device.submit(i, submit)
    for _ in range(30):
        for emission in device.step():
            streams[emission.id].tokens += emission.tokens
            streams[emission.id].end = emission.end
        victim = draw.randrange(20)
        if victim in streams and streams[victim].end is None:
            device.cancel(victim)
            del streams[victim]
    drain(device, streams)
    stats = device.stats()
    assert (stats.free_blocks, stats.running, stats.waiting) == (device.capacity.num_blocks, 0, 0)


def placeholder_plans(pairs: int) -> list[StepPlan]:
    """Pairs of sequences, each pair in plans of its own, that go on from placeholders; another sequence joins in between."""
    plain, warm = SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=3)
    found = []
    for pair in range(pairs):
        one, two = 2 * pair, 2 * pair + 1
        found.append(
            StepPlan(
                step=len(found) + 1,
                slots=column([one, two]),
                starts=column([0, 0]),
                lengths=column([5 + pair, 21]),
                tokens=column([(11 * i + pair) % 300 for i in range(26 + pair)]),
                sample=column([1, 1]),
                block_slots=column([one, two, two]),
                block_ids=column([9 * pair + 1, 9 * pair + 2, 9 * pair + 3]),
                opened=[OpenSlot(one, plain, 5 + pair), OpenSlot(two, warm, 21)],
            )
        )
    for turn in range(4 * pairs):
        pair, done = turn % pairs, turn // pairs
        late, newcomer = turn == 2 * pairs, 2 * pairs
        found.append(
            StepPlan(
                step=len(found) + 1,
                slots=column([2 * pair, 2 * pair + 1] + [newcomer] * late),
                starts=column([5 + pair + done, 21 + done] + [0] * late),
                lengths=column([1, 1] + [9] * late),
                tokens=column([PLACEHOLDER, PLACEHOLDER] + list(range(40, 49)) * late),
                sample=column([1, 1] + [1] * late),
                block_slots=column([newcomer] * late),
                block_ids=column([60] * late),
                opened=[OpenSlot(newcomer, plain, 9)] * late,
            )
        )
    return found


@pytest.mark.parametrize("pp", [2, 3])
def test_tokens_for_placeholders_come_back_through_a_pipeline(folder: Path, pp: int) -> None:
    """Sampled tokens reach the first stage over a group of their own; the results are those of one stage, to the bit."""
    model, weights = open_artifact(folder).model, whole_weights(folder)
    returns = InProcess.create(pp)

    def member(group: Group) -> list[StepResult]:
        torch.set_num_threads(1)
        back = returns[group.rank] if group.size > 1 else Solo()
        runner = make_gpu_runner(
            make_stage(model, weights, Parallel(pp=group.size), group.rank, kernels=kernels), RankGroups(pipeline=group, token_return=back)
        )
        answers = (runner.issue(plan) for plan in placeholder_plans(pp))
        return [answer.result() for answer in answers if answer is not None]

    expected = in_threads(1, member)[0]
    assert len(expected) == len(placeholder_plans(pp)) and all(min(view(result.tokens)) >= 0 for result in expected)
    found = in_threads(pp, member)
    assert found[-1] == expected and not any(found[:-1])


class Recording:
    """A runner that records its plans and their results."""

    def __init__(self, runner: GpuRunner) -> None:
        self.runner, self.plans, self.answers = runner, list[StepPlan](), list[StepResult]()

    def issue(self, plan: StepPlan) -> PendingResult:
        answer = self.runner.issue(plan)
        assert answer is not None
        self.plans.append(plan)
        self.answers.append(answer.result())
        return answer

    def close(self) -> None:
        self.runner.close()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_batchs_plans_say_the_same_on_two_ranks(folder: Path, tp: int, pp: int) -> None:
    """Plans as a leader makes them: most repeat the previous one, with sequences that join and end and blocks that are appended in
    between."""
    model, weights = open_artifact(folder).model, whole_weights(folder)
    alone = Recording(make_gpu_runner(make_stage(model, weights, kernels=kernels), RankGroups()))
    crowd = [request([(7 * i + 3 * j) % 300 for j in range(3 + 9 * i)], KINDS[i % 2], id=i) for i in range(9)]
    serve(engine_of(alone, ahead=True, micro_batches=pp), crowd)
    assert sum(plan.repeats > 0 for plan in alone.plans) > 20
    back = InProcess.create(2)

    def member(group: Group) -> list[StepResult]:
        torch.set_num_threads(1)
        groups = RankGroups(tensor=group) if tp == 2 else RankGroups(pipeline=group, token_return=back[group.rank])
        tensor = group if tp == 2 else None
        stage = make_stage(model, weights, Parallel(tp=tp, pp=pp), group.rank, tensor=tensor, kernels=kernels)
        runner = make_gpu_runner(stage, groups)
        return [answer.result() for answer in map(runner.issue, alone.plans) if answer is not None]

    found = in_threads(2, member)
    assert found[-1] == alone.answers
    assert found[0] == (alone.answers if tp == 2 else [])


def test_graph_sizes_hold_every_batch() -> None:
    for sequences in (1, 2, 3, 5, 8, 63, 64, 65, 511, 512):
        sizes = graph_sizes(DECODE_GRAPH_SIZES, sequences)
        assert sizes[-1] >= sequences and (len(sizes) == 1 or sizes[-2] < sequences)
    assert graph_sizes(DECODE_GRAPH_SIZES, 4096) == DECODE_GRAPH_SIZES
    assert graph_sizes(MIXED_GRAPH_SIZES, 8192) == MIXED_GRAPH_SIZES


def test_a_staging_buffer_waits_for_the_work_that_read_it() -> None:
    waited: list[int] = []

    class Counting(FakeDevice):
        def event(self):  # type: ignore[no-untyped-def]
            event = super().event()
            recorded: list[int] = []
            event.record = lambda: recorded.append(1)  # type: ignore[method-assign]
            event.synchronize = lambda: waited.extend(recorded)  # type: ignore[method-assign]
            return event

    staging = Staging(Counting(), words=9, depth=2)
    for number in range(5):
        assert staging.send(np.arange(number + 4, dtype=np.int32)).tolist() == list(range(number + 4))
        staging.sent()
    assert len(waited) == 1 + 1 + 2  # the earlier sends of the same buffer, in the third, the fourth and the fifth send
