"""TensorRT-LLM behind the Engine seam, without TensorRT-LLM: a runtime that a test scripts delta by delta."""

from __future__ import annotations

import msgspec
import pytest

from workers.engines.trtllm.engine import RuntimeStats, TrtllmEngine, warm_up
from workers.engines.trtllm.error_map import explain
from workers.engines.trtllm.hot_prefixes import HotPrefixes
from workers.engines.trtllm.sequence import Delta, Job, TrtllmLimits, continued_seed
from workers.protocol.engine import PAUSE_S, Emission, Fault, Finish
from workers.protocol.errors import ArtifactError, ConfigError, EngineFault, EnvironmentFault, Rejected, TooLong, TriremeError, Unsupported
from workers.protocol.messages import UNLIMITED, Capacity, GenerateTask, GuideSpec, SamplingParams, Submit
from workers.protocol.trtllm_options import LlmOptions, SchedulerOptions, TrtllmOptions, given
from workers.scheduler.block_pool import prefix_hashes

EOS = (258, 256)
CAPACITY = Capacity(
    block_size=32, num_blocks=64, max_batch_size=8, max_num_tokens=256, max_seq_len=1024, vocab_size=320, tp=2, pp=2, max_logprobs=0,
    guided=False, engine="trtllm",
)  # fmt: skip


class Scripted:
    """A Runtime that answers what a test puts into ``coming``."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.cancelled: list[int] = []
        self.coming: list[Delta] = []
        self.now = RuntimeStats(num_blocks=64, free_blocks=60, block_size=32)
        self.refusal: TriremeError | None = None

    def start(self, job: Job) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.jobs[len(self.jobs) + 1] = job
        return len(self.jobs)

    def cancel(self, handle: int) -> None:
        self.cancelled.append(handle)

    def poll(self, wait_s: float) -> list[Delta]:
        found, self.coming = self.coming, []
        return found

    def stats(self) -> RuntimeStats:
        return self.now

    def close(self, bound_s: float) -> None:
        """Nothing runs."""


class Bench:
    """An engine on a scripted runtime, with a clock that a test moves."""

    def __init__(self, *, max_input_len: int = 1024, guided: bool = False) -> None:
        self.runtime, self.time = Scripted(), 100.0
        limits = TrtllmLimits(
            capacity=msgspec.structs.replace(CAPACITY, guided=guided),
            max_input_len=max_input_len,
            eos_ids=EOS,
        )
        self.prefixes = HotPrefixes(32)
        self.engine = TrtllmEngine(self.runtime, limits, self.prefixes, poll_s=0.0, hang_s=5.0, clock=lambda: self.time)

    def submit(self, id: int = 1, *, emitted: list[int] | None = None, credit: int = UNLIMITED, salt: str = "", **params: object) -> None:
        self.engine.submit(id, request(emitted=emitted, credit=credit, salt=salt, **params))

    def step(self, *deltas: Delta) -> list[Emission]:
        self.runtime.coming += deltas
        found = self.engine.step()
        self.engine.check()
        return found


def request(
    prompt: list[int] | None = None, *, emitted: list[int] | None = None, credit: int = UNLIMITED, salt: str = "", **params: object
) -> Submit:
    given = {"temperature": 0.0, "max_tokens": 8} | params
    return Submit(
        boot="b", stream=1, attempt=0, client="c", request_id="q", model="m", prompt_ids=prompt or [1, 2, 3], salt=salt,
        task=GenerateTask(params=SamplingParams(**given), emitted=emitted or [], credit=credit),
    )  # fmt: skip


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_deltas_become_emissions_and_length_ends(bench: Bench) -> None:
    bench.submit(max_tokens=3)
    assert bench.engine.busy() and bench.runtime.jobs[1].input_ids == [1, 2, 3] and bench.runtime.jobs[1].stops == (256, 258)
    assert bench.step(Delta(1, [50])) == [Emission(1, 0, [50])]
    (last,) = bench.step(Delta(1, [51, 52], final=True))
    assert (last.first, last.tokens) == (1, [51, 52]) and isinstance(last.end, Finish) and last.end.reason == "length"
    assert last.end.usage.output_tokens == 3 and not bench.engine.busy()


def test_a_stop_id_ends_whether_it_is_returned_or_not(bench: Bench) -> None:
    bench.submit(1)
    bench.submit(2)
    bench.submit(3, stop_ids=(77,), ignore_eos=True)
    ends = {
        emission.id: emission for emission in bench.step(Delta(1, [50, 256, 99]), Delta(2, [50], final=True), Delta(3, [77], final=True))
    }
    assert ends[1].tokens == [50] and ends[1].end is not None and ends[1].end.stop_id == 256  # type: ignore[union-attr]
    assert bench.runtime.cancelled == [1], "it runs on beyond its end"
    assert ends[2].tokens == [50] and isinstance(ends[2].end, Finish) and ends[2].end.reason == "stop"
    assert ends[3].tokens == [] and isinstance(ends[3].end, Finish) and ends[3].end.stop_id == 77


def test_what_ended_too_early_goes_on_from_there(bench: Bench) -> None:
    bench.submit(min_tokens=5, max_tokens=8, stop_ids=(60,))
    assert bench.runtime.jobs[1].min_new == 5
    (first,) = bench.step(Delta(1, [60, 61], final=True))
    assert first.tokens == [60, 61] and first.end is None, "below min_tokens a stop id is a token like any other"
    job = bench.runtime.jobs[2]
    assert job.input_ids == [1, 2, 3, 60, 61] and (job.min_new, job.max_new) == (3, 6)
    (fault,) = bench.step(Delta(2, [], final=True))
    assert isinstance(fault.end, Fault), "no progress twice would never end"


def test_a_journal_is_continued_and_never_repeated(bench: Bench) -> None:
    bench.submit(emitted=[70, 71], temperature=0.7, seed=9, min_tokens=3)
    job = bench.runtime.jobs[1]
    assert job.input_ids == [1, 2, 3, 70, 71] and (job.max_new, job.min_new) == (6, 1)
    assert job.seed == continued_seed(9, 2) != 9 and 0 <= job.seed < 2**63
    assert bench.step(Delta(1, [72])) == [Emission(1, 2, [72])]
    bench.submit(2, emitted=[70] * 8)
    (over,) = bench.step()
    assert over.first == 8 and isinstance(over.end, Finish) and over.end.reason == "length" and 2 not in bench.runtime.jobs


def test_credit_holds_tokens_back_and_a_pause_gives_the_cache_up(bench: Bench) -> None:
    bench.submit(credit=2)
    assert [e.tokens for e in bench.step(Delta(1, [50, 51, 52]))] == [[50, 51]]
    assert bench.step(Delta(1, [53])) == []
    bench.time += PAUSE_S + 0.1
    assert bench.step() == [] and bench.runtime.cancelled == [1] and not bench.engine.busy()
    assert bench.step(Delta(1, [54])) == [], "what comes late of a cancelled job is nobody's"
    bench.engine.credit(1, 3)
    assert bench.engine.busy()
    assert [e.tokens for e in bench.step()] == [[52, 53]]
    assert bench.runtime.jobs[2].input_ids == [1, 2, 3, 50, 51, 52, 53] and bench.runtime.jobs[2].max_new == 4
    assert [(e.first, e.tokens) for e in bench.step(Delta(2, [54]))] == [(4, [54])]
    bench.engine.credit(99, 1)
    bench.engine.cancel(1)
    assert bench.runtime.cancelled == [1, 2] and bench.step(Delta(2, [55])) == []


def test_the_end_waits_behind_tokens_without_credit(bench: Bench) -> None:
    bench.submit(max_tokens=3, credit=1)
    (first,) = bench.step(Delta(1, [50, 51, 52], final=True))
    assert first.tokens == [50] and first.end is None
    bench.engine.credit(1, 5)
    (last,) = bench.step()
    assert last.tokens == [51, 52] and isinstance(last.end, Finish)


def test_logprobs_come_one_a_token_or_the_sequence_fails(bench: Bench) -> None:
    bench.submit(logprobs=0)
    (emission,) = bench.step(Delta(1, [50, 51], [-0.5, -0.25]))
    assert emission.logprobs is not None and [(e.token, e.logprob, e.top_ids) for e in emission.logprobs] == [
        (50, -0.5, []),
        (51, -0.25, []),
    ]
    (failed,) = bench.step(Delta(1, [52], None))
    assert isinstance(failed.end, Fault) and not failed.tokens


def test_errors_end_one_sequence_only(bench: Bench) -> None:
    bench.submit(1)
    bench.submit(2)
    found = {e.id: e for e in bench.step(Delta(1, [], error="bad words", final=True), Delta(2, [50]))}
    assert found[1].end == Fault("engine_fault", "bad words") and found[2].tokens == [50]
    bench.runtime.refusal = EngineFault("no more")
    with pytest.raises(EngineFault):
        bench.submit(3)
    bench.engine.check()


@pytest.mark.parametrize(
    ("params", "error", "word"),
    [
        ({"prompt_logprobs": 0}, Unsupported, "prompt_logprobs"),
        ({"allowed_token_ids": (1,)}, Unsupported, "allowed_token_ids"),
        ({"logprobs": 1}, Rejected, "logprobs"),
        ({"guide": GuideSpec(kind="json")}, Unsupported, "guided"),
        ({"max_tokens": 2000}, TooLong, "context"),
        ({"temperature": -1.0}, Rejected, "temperature"),
    ],
)
def test_what_it_cannot_do_is_refused_at_submit(bench: Bench, params: dict[str, object], error: type[TriremeError], word: str) -> None:
    with pytest.raises(error, match=word):
        bench.submit(**params)
    bench.engine.check()
    assert not bench.engine.busy()


def test_inputs_beyond_the_engines_are_refused_and_so_is_half_a_guided_answer() -> None:
    small = Bench(max_input_len=4)
    with pytest.raises(TooLong, match="5 tokens"):
        small.engine.submit(1, request([1, 2, 3, 4, 5]))
    with pytest.raises(EngineFault, match="another replica"):
        small.submit(emitted=[7, 8])
    guided = Bench(guided=True)
    guided.submit(1, guide=GuideSpec(kind="regex", text="a+"))
    with pytest.raises(EngineFault, match="guided"):
        guided.submit(2, guide=GuideSpec(kind="regex", text="a+"), emitted=[97])
    with pytest.raises(Unsupported, match="grammar"):
        guided.submit(3, guide=GuideSpec(kind="grammar", text='start: "a"'))


def test_a_runtime_without_iterations_ends_the_replica(bench: Bench) -> None:
    bench.submit()
    for _ in range(20):
        bench.time += 1.0
        bench.runtime.now = RuntimeStats(num_blocks=64, iteration=bench.runtime.now.iteration + 1)
        bench.step()
    with pytest.raises(EngineFault, match="no iteration"):
        for _ in range(20):
            bench.time += 1.0
            bench.step()


def test_a_freeze_of_the_replica_is_not_a_hang(bench: Bench) -> None:
    bench.submit()
    bench.step()
    for _ in range(3):
        bench.time += 60.0
        assert bench.step() == []
    with pytest.raises(EngineFault, match="no iteration"):
        for _ in range(100):
            bench.time += 0.5
            bench.step()


def test_idleness_is_not_a_hang(bench: Bench) -> None:
    bench.time += 1000.0
    assert not bench.engine.busy()
    bench.submit()
    assert bench.step() == []


def test_a_warm_up_that_brings_nothing_is_bounded() -> None:
    with pytest.raises(EngineFault, match="warm-up"):
        warm_up(Scripted(), 0.0, eos_ids=())
    failing = Scripted()
    failing.coming = [Delta(1, [], error="CUDA error", final=True)]
    with pytest.raises(EngineFault, match="CUDA error"):
        warm_up(failing, 1e18, eos_ids=(5,))


def test_prefixes_are_reported_in_our_hashes() -> None:
    hot = HotPrefixes(4)
    tokens, ours = list(range(12)), prefix_hashes(list(range(12)), 4, "salt")
    hot.stored(None, [(901, tokens[:4])])
    assert hot.hot() == [], "no sequence was expected to store it"
    hot.expect([*tokens, 99], "salt")
    hot.stored(None, [(901, tokens[:4]), (902, tokens[4:8])])
    hot.stored(902, [(903, tokens[8:])])
    hot.stored(777, [(904, tokens[8:])])
    assert hot.hot() == ours
    hot.removed([903, 5])
    assert hot.hot() == ours[:2]
    hot.take_event(7)
    hot.take_event(8)
    assert hot.hot() == ours[:2]
    hot.take_event(10)
    assert hot.hot() == [], "an event was lost"


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("CUDA runtime error in cudaMalloc: out of memory", EnvironmentFault, "GPU memory"),
        (
            "Assertion stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not match",
            ArtifactError,
            "another TensorRT version",
        ),
        ("generated on an incompatible device, expecting compute 9.0 got compute 8.0", ArtifactError, "another GPU"),
        ("Failed to deserialize cuda engine", ArtifactError, "cannot read its engine"),
        ("Assertion failed: mpiSize == tp * pp * cp (3 vs 4)", ArtifactError, "another number of ranks"),
        ("something new", EngineFault, "could not start"),
    ],
)
def test_known_words_get_a_cause_and_a_remedy(text: str, error: type[TriremeError], word: str) -> None:
    found = explain(RuntimeError(text), 3)
    assert type(found) is error and word in found.what and "rank 3" in found.what and text.split(":")[0][:20] in found.why and found.hint


def test_options_mean_something_to_their_backend_only() -> None:
    TrtllmOptions(chunked_context=True, guided_decoding="xgrammar").refuse_others("executor")
    with pytest.raises(ConfigError, match=r"trtllm\.llm "):
        TrtllmOptions(llm=LlmOptions(attn_backend="TRTLLM")).refuse_others("executor")
    with pytest.raises(ConfigError, match=r"trtllm\.scheduler"):
        TrtllmOptions(scheduler=SchedulerOptions(context_chunking_policy="EQUAL_PROGRESS")).refuse_others("llmapi")
    assert given(SchedulerOptions(context_chunking_policy="EQUAL_PROGRESS")) == {"context_chunking_policy": "EQUAL_PROGRESS"}
