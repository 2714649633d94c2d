"""Prometheus families of a router's routing core and of the replicas' last reports.

Owns names, help texts and units. Everything is read at the scrape, from the dispatcher's status and the core's statistics. Must never keep
a number of its own, and must never take a label from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from orchestrator.router.core.stats import Histogram, ModelStats
from orchestrator.router.key_limits import KeyUsage, Reason
from workers import __version__
from workers.protocol.messages import STEP_TOKEN_BUCKETS
from workers.protocol.status import ReplicaStatus, RouterStatus, RoutingState

#: Delays of the event loop below this are not reported, seconds.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

#: API keys with series of their own.
KEY_SERIES = 256

#: Per replica: metric name, help, whether it only grows, how its value is read.
_REPLICA_SERIES: tuple[tuple[str, str, bool, Callable[[ReplicaStatus], float]], ...] = (
    ("trireme_num_requests_running", "Sequences in the running batch", False, lambda replica: replica.running),
    ("trireme_num_requests_waiting", "Sequences waiting at the replica", False, lambda replica: replica.waiting),
    ("trireme_router_placed_choices", "Choices of this router at the replica", False, lambda replica: replica.choices),
    (
        "trireme_router_paused_choices",
        "Choices of this router at the replica whose clients take nothing now",
        False,
        lambda replica: replica.paused,
    ),
    ("trireme_generation_tokens_per_second", "Output tokens a second, as last reported", False, lambda replica: replica.tok_s),
    ("trireme_step_seconds", "Duration of a step, as last reported", False, lambda replica: replica.step_ms * 0.001),
    ("trireme_step_age_seconds", "Age of the running step, as last reported", False, lambda replica: replica.busy_ms * 0.001),
    ("trireme_replica_signal_age_seconds", "Time since the replica was last heard", False, lambda replica: replica.signal_age_s),
    ("trireme_kv_cache_blocks", "Blocks in the KV pool", False, lambda replica: replica.num_blocks),
    ("trireme_prompt_tokens_waiting", "Prompt tokens still to be computed", False, lambda replica: replica.prefill_tokens),
    ("trireme_replica_prompt_tokens", "Prompt tokens computed", True, lambda replica: replica.prompt_tokens_total),
    ("trireme_replica_generation_tokens", "Output tokens generated", True, lambda replica: replica.output_tokens_total),
    ("trireme_prefix_cache_queries", "Prompt tokens looked up in the prefix cache", True, lambda replica: replica.prefix_queries_total),
    ("trireme_prefix_cache_hits", "Prompt tokens found in the prefix cache", True, lambda replica: replica.prefix_hits_total),
    ("trireme_num_preemptions", "Sequences preempted for want of KV blocks", True, lambda replica: replica.preemptions_total),
)

#: Facts of a replica that are labels: name, how it is read.
_CONFIG_LABELS: tuple[tuple[str, Callable[[ReplicaStatus], object]], ...] = (
    ("num_blocks", lambda replica: replica.num_blocks),
    ("block_size", lambda replica: replica.block_size),
    ("tp", lambda replica: replica.tp),
    ("pp", lambda replica: replica.pp),
    ("engine", lambda replica: replica.engine),
    ("dtype", lambda replica: replica.dtype),
    ("resume", lambda replica: replica.resume),
    ("max_batch_size", lambda replica: replica.max_batch_size),
    ("max_num_tokens", lambda replica: replica.max_num_tokens),
    ("max_seq_len", lambda replica: replica.max_seq_len),
)

#: Per model: metric name, help, which histogram.
_MODEL_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStats], Histogram]], ...] = (
    ("trireme_request_queue_time_seconds", "From the arrival of a choice until it is first sent to a replica", lambda stats: stats.queue),
    ("trireme_request_prefill_time_seconds", "From the first sending of a choice to its first token", lambda stats: stats.prefill),
    ("trireme_request_decode_time_seconds", "From the first token of a choice to its last", lambda stats: stats.decode),
    ("trireme_request_inference_time_seconds", "From the first sending of a choice to its last token", lambda stats: stats.inference),
    ("trireme_request_params_n", "Choices that requests ask for", lambda stats: stats.choices),
    ("trireme_request_params_max_tokens", "Output tokens that requests ask for at most", lambda stats: stats.limits),
    ("trireme_router_expected_wait_seconds", "Expected wait for the first token at the chosen replica", lambda stats: stats.expected_wait),
    (
        "trireme_router_actual_wait_seconds",
        "Actual wait for the first token at the chosen replica, over the same choices",
        lambda stats: stats.actual_wait,
    ),
    (
        "trireme_router_wait_error_seconds",
        "Difference of expected and actual wait, without its sign, of each choice",
        lambda stats: stats.wait_error,
    ),
    ("trireme_router_failover_pause_seconds", "From the loss of the replica of a choice to its next token", lambda stats: stats.pause),
)


def histogram(name: str, text: str, histograms: Mapping[str, Histogram]) -> HistogramMetricFamily:
    """One family by model. ``name``: the whole name of the metric."""
    family = HistogramMetricFamily(name, text, labels=["model_name"])
    for model, found in histograms.items():
        family.add_metric([model], buckets=found.cumulated(), sum_value=found.total)
    return family


def core(status: RouterStatus, by_model: Mapping[str, ModelStats]) -> Iterator[Metric]:
    """The routing core: queues, decisions, moves, and estimates beside what came."""
    queued = GaugeMetricFamily("trireme_router_queued_choices", "Choices waiting at this router for a replica", labels=["model_name"])
    decisions = CounterMetricFamily("trireme_router_decisions", "Placements by what decided", labels=["model_name", "reason"])
    moved = CounterMetricFamily("trireme_router_moved_choices", "Choices that lost their replica", labels=["model_name", "cause"])
    outcomes = CounterMetricFamily(
        "trireme_router_failovers", "Choices that lost their replica, by outcome", labels=["model_name", "cause", "outcome"]
    )
    losses = CounterMetricFamily("trireme_router_replica_losses", "Replicas that this router lost", labels=["model_name", "cause"])
    hits = CounterMetricFamily(
        "trireme_router_prefix_hit_tokens", "Cached prompt tokens of ended choices, as expected and as found", labels=["model_name", "kind"]
    )
    for model, stats in by_model.items():
        queued.add_metric([model], status.queue.get(model, 0))
        for reason, count in stats.decisions.items():
            decisions.add_metric([model, reason], count)
        for cause, count in stats.moved.items():
            moved.add_metric([model, cause], count)
            outcomes.add_metric([model, cause, "resumed"], stats.resumed[cause])
            outcomes.add_metric([model, cause, "failed"], stats.failed[cause])
        for kind, count in stats.losses.items():
            losses.add_metric([model, kind], count)
        hits.add_metric([model, "expected"], stats.expected_hits)
        hits.add_metric([model, "actual"], stats.actual_hits)
    yield from (queued, decisions, moved, outcomes, losses, hits, _events(status))
    for name, text, pick in _MODEL_HISTOGRAMS:
        yield histogram(name, text, {model: pick(stats) for model, stats in by_model.items()})


def _events(status: RouterStatus) -> Metric:
    events = CounterMetricFamily("trireme_router_events", "What the routing core counts: choices, tokens and losses", labels=["event"])
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


def api_keys(usages: Sequence[KeyUsage]) -> Iterator[Metric]:
    """What each API key has used. The first :data:`KEY_SERIES` keys have series of their own, all others together one."""
    requests = CounterMetricFamily("trireme_key_requests", "Requests admitted for an API key", labels=["key", "tenant"])
    tokens = CounterMetricFamily("trireme_key_tokens", "Tokens of requests that have ended", labels=["key", "tenant", "kind"])
    refused = CounterMetricFamily("trireme_key_refused", "Requests beyond a limit of an API key", labels=["key", "tenant", "limit"])
    running = GaugeMetricFamily("trireme_key_inflight_requests", "Requests that run for an API key", labels=["key", "tenant"])
    rows = [([usage.key, usage.tenant], [usage]) for usage in usages[:KEY_SERIES]]
    if len(usages) > KEY_SERIES:
        rows.append((["other", "other"], list(usages[KEY_SERIES:])))
    for labels, several in rows:
        requests.add_metric(labels, sum(usage.requests for usage in several))
        tokens.add_metric([*labels, "prompt"], sum(usage.prompt_tokens for usage in several))
        tokens.add_metric([*labels, "output"], sum(usage.output_tokens for usage in several))
        for limit in get_args(Reason):
            refused.add_metric([*labels, limit], sum(usage.refused[limit] for usage in several))
        running.add_metric(labels, sum(usage.running for usage in several))
    yield from (requests, tokens, refused, running)


def replicas(status: RouterStatus, models: Sequence[str]) -> Iterator[Metric]:
    """Every replica that this router remembers."""
    states = GaugeMetricFamily("trireme_replicas", "Replicas known to this router", labels=["model_name", "state"])
    for model in models:
        for state in get_args(RoutingState):
            states.add_metric([model, state], sum(replica.model == model and replica.state == state for replica in status.replicas))
    yield states
    # Of a replica without a heartbeat nothing is known: its totals would read 0, and a rate would take its return for a leap.
    heard = [replica for replica in status.replicas if replica.reported]
    for name, text, grows, value in _REPLICA_SERIES:
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        family = kind(name, text, labels=["model_name", "replica"])
        for replica in heard:
            family.add_metric([replica.model, replica.name], float(value(replica)))
        yield family
    usage = GaugeMetricFamily("trireme_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", labels=["model_name", "replica"])
    for replica in heard:
        if replica.num_blocks:
            usage.add_metric([replica.model, replica.name], 1.0 - replica.free_blocks / replica.num_blocks)
    yield from (usage, _config(heard), _steps(heard))


def _config(replicas: Sequence[ReplicaStatus]) -> Metric:
    labels = ["model_name", "replica", *(name for name, _ in _CONFIG_LABELS)]
    config = GaugeMetricFamily("trireme_cache_config_info", "Always 1", labels=labels)
    for replica in replicas:
        config.add_metric([replica.model, replica.name, *(str(value(replica)) for _, value in _CONFIG_LABELS)], 1)
    return config


def _steps(replicas: Sequence[ReplicaStatus]) -> Metric:
    """A step counts the prompt tokens that it computes and the tokens that it decodes; an engine that does not say so has no series."""
    steps = HistogramMetricFamily("trireme_iteration_tokens_total", "Tokens of a step", labels=["model_name", "replica"])
    for replica in replicas:
        counts = replica.step_tokens or []
        if len(counts) == len(STEP_TOKEN_BUCKETS) + 1:
            found = Histogram(STEP_TOKEN_BUCKETS)
            found.counts = list(counts)
            steps.add_metric([replica.model, replica.name], buckets=found.cumulated(), sum_value=float(replica.step_tokens_total))
    return steps
