"""The pure half of the load generator: arrivals, traces, prompts, and statistics against distributions that are known."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from orchestrator.loadgen import prompts, settings
from orchestrator.loadgen.schedule import BLOCK, ContextLimit, PlannedRequest, Range, TraceRecord, arrivals, records, replayed, synthetic
from orchestrator.loadgen.stats import LatencyHistogram, RequestSample, RunStats
from workers.protocol.errors import Rejected


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_variation_that_was_asked_for(burstiness: float, variation: float) -> None:
    times = np.array(list(islice(arrivals(20.0, burstiness, 7), 40_000)))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 20.0, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.04)
    if burstiness == 1.0:
        # Poisson: as many arrivals a second on average as their variance.
        counts = np.bincount(times.astype(int))[:-1]
        assert counts.mean() == pytest.approx(20.0, rel=0.04) and counts.var() == pytest.approx(20.0, rel=0.15)


def test_a_seed_is_a_schedule() -> None:
    first, again, other = (list(islice(arrivals(5.0, 1.0, seed), 100)) for seed in (1, 1, 2))
    assert first == again and first != other
    lengths = [
        [(one.input, one.output) for one in islice(synthetic(Range(5, 9), Range(1, 3), ContextLimit(None), seed), 200)]
        for seed in (1, 1, 2)
    ]
    assert lengths[0] == lengths[1] != lengths[2]
    assert {input for input, _ in lengths[0]} == set(range(5, 10)) and {output for _, output in lengths[0]} == {1, 2, 3}


@pytest.mark.parametrize("draw", ["exponential", "lognormal", "uniform"])
def test_percentiles_are_within_a_bucket(draw: str) -> None:
    values = getattr(np.random.default_rng(3), draw)(size=50_000) * 0.1
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(float(value))
    for share in (0.01, 0.5, 0.9, 0.95, 0.99, 0.999):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.006)
    spread = histogram.percentiles()
    assert spread.count == 50_000 and spread.mean == pytest.approx(values.mean() * 1000, rel=1e-6)
    assert (spread.min, spread.max) == (pytest.approx(values.min() * 1000, abs=1e-4), pytest.approx(values.max() * 1000, abs=1e-4))


def test_the_ends_of_a_histogram() -> None:
    histogram = LatencyHistogram()
    assert histogram.percentiles().p99 == 0.0
    for value in (0.0, 1e-9, 1e9):
        histogram.add(value)
    assert (
        histogram.quantile(0.5) <= 1.01e-6
        and histogram.quantile(1.0) == pytest.approx(1e5, rel=0.1)
        and histogram.percentiles().max == 1e12
    )


def sample(intended: float, *pieces: float, sent: float | None = None, tokens: int = 0) -> RequestSample:
    made = RequestSample(intended, 10)
    made.sent(intended if sent is None else sent)
    for when in pieces:
        made.piece(when)
    if tokens:
        made.counted(12, tokens, 4)
    return made


def test_latencies_count_from_the_intended_time() -> None:
    """A request that could only be sent 5 s late was 5 s late for its user, too."""
    stats = RunStats()
    stats.begin(1.0)
    stats.done(sample(1.0, 6.5, 6.7, 7.1, sent=6.0, tokens=5))
    found = stats.summary(0.0)
    assert found.latency_ms["queue"].max == 5000 and found.latency_ms["ttft"].max == 5500 and found.latency_ms["e2e"].max == 6100
    assert (found.latency_ms["itl"].count, found.latency_ms["itl"].max) == (2, pytest.approx(400))
    assert found.latency_ms["tpot"].max == pytest.approx(150), "600 ms for the four tokens after the first"
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens, found.uncounted) == (12, 4, 5, 0)
    assert found.duration_s == pytest.approx(6.1) and found.output_tokens_per_s == pytest.approx(5 / 6.1, rel=1e-3)


def test_goodput_is_of_all_that_was_sent() -> None:
    stats = RunStats({"ttft": 500.0, "itl": 100.0})
    ends = [sample(0.0, 0.4, 0.45), sample(0.0, 0.6, 0.65), sample(0.0, 0.4, 0.9), sample(0.0, 0.5)]
    for _ in range(5):
        stats.begin(0.0)
    for one in ends:
        stats.done(one)
    stats.fail("overloaded", "full", 1.0)
    found = stats.summary(0.5)
    assert found.goodput is not None and (found.goodput.requests, found.goodput.share) == (2, 0.4)
    assert found.goodput.requests_per_s == pytest.approx(2.0) and found.client.cpu == 0.5
    assert (found.succeeded, found.failed, found.uncounted, found.client.peak_in_flight) == (4, 1, 4, 5)


def test_kinds_of_errors_are_bounded() -> None:
    stats = RunStats()
    for index in range(1000):
        stats.begin(0.0)
        stats.fail(f"code-{index}", f"first of {index}\x1b[31m", 1.0)
    errors = stats.summary(0.0).errors
    assert len(errors) == 33 and errors["other"].count == 968
    assert errors["code-0"].example == "first of 0\\x1b[31m"


def lines(*rows: dict[str, Any]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def rounded(groups: int, size: int) -> list[TraceRecord]:
    return [
        TraceRecord(timestamp=3000.0 * group, input_length=600, output_length=5, hash_ids=[0, 1 + group])
        for group in range(groups)
        for _ in range(size)
    ]


def test_rounded_arrivals_are_spread_over_their_three_seconds() -> None:
    times = [one.at for one in replayed(rounded(200, 20), ContextLimit(None), 1)]
    assert times == sorted(times) and len(set(times)) == 4000
    offsets = [at - 3.0 * (index // 20) for index, at in enumerate(times) if at is not None]
    assert min(offsets) >= 0.0 and max(offsets) < 3.0
    assert np.mean(offsets) == pytest.approx(1.5, rel=0.05) and np.std(offsets) == pytest.approx(3 / 12**0.5, rel=0.05)
    assert times == [one.at for one in replayed(rounded(200, 20), ContextLimit(None), 1)]
    assert times != [one.at for one in replayed(rounded(200, 20), ContextLimit(None), 2)]
    assert [one.at for one in replayed(rounded(3, 2), ContextLimit(None), 1, spread_s=0.0)] == [0.0, 0.0, 3.0, 3.0, 6.0, 6.0]


def test_exact_arrivals_stay_as_they_are() -> None:
    exact = [TraceRecord(timestamp=500.0 + 40.0 * index, input_length=5, output_length=2) for index in range(5)]
    assert [one.at for one in replayed(exact, ContextLimit(None), 1)] == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])
    assert [one.at for one in replayed(exact, ContextLimit(None), 1, speed=4.0)] == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])


def test_lengths_are_cut_and_counted() -> None:
    context_limit = ContextLimit(1000)
    trace = [
        TraceRecord(timestamp=0.0, input_length=a, output_length=b, hash_ids=list(range(40)))
        for a, b in ((900, 100), (9000, 100), (900, 900), (5000, 3000))
    ]
    planned = list(replayed(trace, context_limit, 1))
    assert [(one.input, one.output) for one in planned] == [(900, 100), (900, 100), (500, 500), (500, 500)]
    assert (context_limit.requests, context_limit.input_tokens, context_limit.output_tokens) == (3, 8100 + 400 + 4500, 400 + 2500)
    assert [len(one.blocks) for one in planned] == [2, 2, 1, 1]
    with pytest.raises(Rejected):
        ContextLimit(1)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([b"{"], "t:1 is not a request"),
        ([b'{"timestamp":0,"input_length":1,"output_length":1}', b"", b'{"timestamp":1}'], "t:3 is not a request"),
        (lines({"timestamp": 0, "input_length": 0, "output_length": 1}), "t:1 is not a request"),
        (lines(*({"timestamp": at, "input_length": 1, "output_length": 1} for at in (9, 1))), "go back"),
        ([], "the trace is empty"),
    ],
)  # fmt: skip
def test_a_trace_that_is_none(rows: list[bytes], says: str) -> None:
    with pytest.raises(Rejected, match=says):
        list(replayed(records(rows, "t"), ContextLimit(None), 1))


def test_equal_blocks_are_equal_text_and_others_are_not() -> None:
    first, second, alone = (
        prompts.token_ids(planned, 5)
        for planned in (
            PlannedRequest(index=0, input=3 * BLOCK - 7, output=1, blocks=(0, 4, 9)),
            PlannedRequest(index=1, input=3 * BLOCK, output=1, blocks=(0, 4, 8)),
            PlannedRequest(index=2, input=3 * BLOCK, output=1),
        )
    )
    assert (len(first), len(second), len(alone)) == (3 * BLOCK - 7, 3 * BLOCK, 3 * BLOCK)
    assert first[: 2 * BLOCK] == second[: 2 * BLOCK] and first[2 * BLOCK :] != second[2 * BLOCK : -7]
    assert first[:16] != alone[:16] and first[:BLOCK] != first[BLOCK : 2 * BLOCK]
    assert min(first) >= 32 and max(first) < 256 and len(set(first)) > 200
    again = prompts.token_ids(PlannedRequest(index=7, input=BLOCK, output=1, blocks=(0,)), 5)
    assert again == first[:BLOCK] and again != prompts.token_ids(PlannedRequest(index=7, input=BLOCK, output=1, blocks=(0,)), 6)


def test_prompts_of_their_own_share_nothing() -> None:
    made = [tuple(prompts.token_ids(PlannedRequest(index=index, input=64, output=1), 1)[:16]) for index in range(500)]
    assert len(set(made)) == 500
    words = prompts.text(PlannedRequest(index=0, input=64, output=1), 1).split(" ")
    assert len(words) == 64 and len(set(words)) > 20


def test_what_flags_mean() -> None:
    made = settings.LoadSettings(target="t", concurrency=4, rate=10.0, requests=3, input_len="7", output_len="2:2", max_len=100)
    planned = list(settings.plan(made, ContextLimit(made.max_len), []))
    assert [(one.input, one.output, one.index) for one in planned] == [(7, 2, 0), (7, 2, 1), (7, 2, 2)]
    assert all(later.at > earlier.at for earlier, later in pairwise(planned) if later.at is not None and earlier.at is not None)
    assert settings.objectives(["ttft:500", "tpot:20.5"]) == {"ttft": 500.0, "tpot": 20.5}
    for slo in ("ttft", "ttft:soon", "speed:3"):
        with pytest.raises(Rejected):
            settings.objectives([slo])


@pytest.mark.parametrize(
    "flags",
    [
        {"rate": 0.0}, {"rate": float("inf")}, {"burstiness": -1.0}, {"duration_s": 0.0}, {"speed": 2.0}, {"spread_s": 1.0},
        {"timeout_s": 0.0},
        {"trace": "t", "rate": 1.0}, {"trace": "t", "input_len": "5"}, {"trace": "t", "spread_s": -1.0}, {"input_len": "x"},
        {"input_len": "9:3"}, {"output_len": "0"}, {"output_len": "-1"},
    ],
)  # fmt: skip
def test_flags_that_mean_nothing(flags: dict[str, Any]) -> None:
    with pytest.raises(Rejected):
        settings.check(settings.LoadSettings(target="t", concurrency=1, **flags))
