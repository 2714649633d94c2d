"""Prometheus families of what a router knows beyond its doors: its routing core, and every replica as last heard of.

Owns names, help texts and units; everything is read at the scrape, from the dispatcher's status and the core's tallies. Must never keep a
number of its own, and must never take a label from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from orchestrator.router.core.stats import Histogram, ModelStats
from workers import __version__
from workers.protocol.messages import STEP_TOKEN_BUCKETS
from workers.protocol.status import ReplicaStatus, RouterStatus, RoutingState

#: Loop turns that come late by less are no news: seconds.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

#: Per replica: metric name, help, whether it only grows, how its value is read.
_REPLICA_SERIES: tuple[tuple[str, str, bool, Callable[[ReplicaStatus], float]], ...] = (
    ("num_requests_running", "Rows in the running batch", False, lambda row: row.running),
    ("num_requests_waiting", "Rows waiting at the replica", False, lambda row: row.waiting),
    ("router_placed_rows", "Rows of this router at the replica", False, lambda row: row.rows),
    ("router_paused_rows", "Those of them whose clients take nothing now", False, lambda row: row.paused),
    ("generation_tokens_per_second", "Output tokens a second, as last reported", False, lambda row: row.tok_s),
    ("step_seconds", "Duration of a step, as last reported", False, lambda row: row.step_ms * 0.001),
    ("step_age_seconds", "Age of the running step, as last reported", False, lambda row: row.busy_ms * 0.001),
    ("replica_signal_age_seconds", "Time since the replica was last heard", False, lambda row: row.signal_age_s),
    ("kv_cache_blocks", "Blocks in the KV pool", False, lambda row: row.num_blocks),
    ("prompt_tokens_waiting", "Prompt tokens still to be computed", False, lambda row: row.prefill_tokens),
    ("replica_prompt_tokens", "Prompt tokens computed", True, lambda row: row.prompt_tokens_total),
    ("replica_generation_tokens", "Output tokens generated", True, lambda row: row.output_tokens_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", True, lambda row: row.prefix_queries_total),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", True, lambda row: row.prefix_hits_total),
    ("num_preemptions", "Rows preempted for want of KV blocks", True, lambda row: row.preemptions_total),
)

#: Per model: metric name, help, which histogram.
_TALLY_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStats], Histogram]], ...] = (
    ("request_queue_time_seconds", "A row's wait at this router for its first place", lambda tally: tally.queue),
    ("request_prefill_time_seconds", "From a row's first place to its first token", lambda tally: tally.prefill),
    ("request_decode_time_seconds", "From a row's first token to its last", lambda tally: tally.decode),
    ("request_inference_time_seconds", "From a row's first place to its last token", lambda tally: tally.inference),
    ("request_params_n", "Choices that requests ask for", lambda tally: tally.choices),
    ("request_params_max_tokens", "Output tokens that requests ask for at most", lambda tally: tally.limits),
    ("router_expected_wait_seconds", "Expected wait for the first token at the chosen replica", lambda tally: tally.expected_wait),
    ("router_actual_wait_seconds", "Wait for the first token at the chosen replica, over the same rows", lambda tally: tally.actual_wait),
    ("router_wait_error_seconds", "Difference of the two, either way, row by row", lambda tally: tally.wait_error),
    ("router_failover_pause_seconds", "From a row's loss of its place to its next token", lambda tally: tally.pause),
)


def histogram(name: str, text: str, rows: Mapping[str, Histogram]) -> HistogramMetricFamily:
    """One family by model."""
    family = HistogramMetricFamily(f"trireme_{name}", text, labels=["model_name"])
    for model, row in rows.items():
        family.add_metric([model], buckets=row.cumulated(), sum_value=row.total)
    return family


def core(status: RouterStatus, tallies: Mapping[str, ModelStats]) -> Iterator[Metric]:
    """The routing core: lines, decisions, moves, and guesses against what came."""
    queued = GaugeMetricFamily("trireme_router_queued_requests", "Rows waiting at this router for a replica", labels=["model_name"])
    decisions = CounterMetricFamily("trireme_router_decisions", "Placements by what decided", labels=["model_name", "reason"])
    moved = CounterMetricFamily("trireme_router_moved_rows", "Rows that lost their place", labels=["model_name", "cause"])
    outcomes = CounterMetricFamily(
        "trireme_router_failovers", "Rows that lost their place, by what became of them", labels=["model_name", "cause", "outcome"]
    )
    losses = CounterMetricFamily("trireme_router_replica_losses", "Replicas that this router lost", labels=["model_name", "cause"])
    hits = CounterMetricFamily(
        "trireme_router_prefix_hit_tokens", "Cached prompt tokens of ended rows: as guessed and as found", labels=["model_name", "kind"]
    )
    for model, tally in tallies.items():
        queued.add_metric([model], status.queue.get(model, 0))
        for reason, count in tally.decisions.items():
            decisions.add_metric([model, reason], count)
        for cause, count in tally.moved.items():
            moved.add_metric([model, cause], count)
            outcomes.add_metric([model, cause, "resumed"], tally.resumed[cause])
            outcomes.add_metric([model, cause, "failed"], tally.failed[cause])
        for kind, count in tally.losses.items():
            losses.add_metric([model, kind], count)
        hits.add_metric([model, "expected"], tally.expected_hits)
        hits.add_metric([model, "actual"], tally.actual_hits)
    yield from (queued, decisions, moved, outcomes, losses, hits, _events(status))
    for name, text, pick in _TALLY_HISTOGRAMS:
        yield histogram(name, text, {model: pick(tally) for model, tally in tallies.items()})


def _events(status: RouterStatus) -> Metric:
    events = CounterMetricFamily("trireme_router_events", "What the routing core counts: rows, tokens and losses", labels=["event"])
    for event, count in status.counts.items():
        events.add_metric([event], count)
    return events


def process(status: RouterStatus, lag: Histogram) -> Iterator[Metric]:
    """The router process itself."""
    info = GaugeMetricFamily("trireme_router_info", "Always 1", labels=["router", "version"])
    info.add_metric([status.router, __version__], 1)
    yield info
    late = HistogramMetricFamily("trireme_router_loop_lag_seconds", "How late the event loop woke a task that it should have woken")
    late.add_metric([], buckets=lag.cumulated(), sum_value=lag.total)
    yield late


def replicas(status: RouterStatus, models: Sequence[str]) -> Iterator[Metric]:
    """Every replica that this router remembers."""
    states = GaugeMetricFamily("trireme_replicas", "Replicas known to this router", labels=["model_name", "state"])
    for model in models:
        for state in get_args(RoutingState):
            states.add_metric([model, state], sum(row.model == model and row.state == state for row in status.replicas))
    yield states
    # Of one that is not heard nothing is known: its totals would read 0, and a rate would take its return for a leap.
    heard = [row for row in status.replicas if row.reported]
    for name, text, grows, value in _REPLICA_SERIES:
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        family = kind(f"trireme_{name}", text, labels=["model_name", "replica"])
        for row in heard:
            family.add_metric([row.model, row.name], float(value(row)))
        yield family
    usage = GaugeMetricFamily("trireme_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", labels=["model_name", "replica"])
    for row in heard:
        if row.num_blocks:
            usage.add_metric([row.model, row.name], 1.0 - row.free_blocks / row.num_blocks)
    yield from (usage, _config(heard), _steps(heard))


def _config(rows: Sequence[ReplicaStatus]) -> Metric:
    facts = ("num_blocks", "block_size", "tp", "pp", "engine", "dtype", "resume", "max_batch_size", "max_num_tokens", "max_seq_len")
    config = GaugeMetricFamily("trireme_cache_config_info", "Always 1", labels=["model_name", "replica", *facts])
    for row in rows:
        values = (
            row.num_blocks, row.block_size, row.tp, row.pp, row.engine, row.dtype, row.resume, row.max_batch_size, row.max_num_tokens,
            row.max_seq_len,
        )  # fmt: skip
        config.add_metric([row.model, row.name, *map(str, values)], 1)
    return config


def _steps(rows: Sequence[ReplicaStatus]) -> Metric:
    """A step counts the prompt tokens that it computes and the tokens that it decodes; an engine that does not say so has no series."""
    steps = HistogramMetricFamily("trireme_iteration_tokens_total", "Tokens of a step", labels=["model_name", "replica"])
    for row in rows:
        counts = row.step_tokens or []
        if len(counts) == len(STEP_TOKEN_BUCKETS) + 1:
            found = Histogram(STEP_TOKEN_BUCKETS)
            found.counts = list(counts)
            steps.add_metric([row.model, row.name], buckets=found.cumulated(), sum_value=float(row.step_tokens_total))
    return steps
