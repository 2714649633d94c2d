"""The Prometheus series: there from the start, right after traffic, and no more of them whatever comes."""

from __future__ import annotations

import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.auth.api_keys import KeyLimits
from orchestrator.router.key_limits import KeyLimiter
from orchestrator.router.metric_families import KEY_SERIES
from orchestrator.router.metrics import Metrics
from tests.support.scripted_router import ScriptedDispatcher
from workers.protocol.errors import RateLimited
from workers.protocol.messages import Usage

#: Facts, not counts.
ALWAYS = ("trireme_router_info",)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Of the router's own prefix: what ``process_`` says is this process's, as every client library says it."""
    families = text_string_to_metric_families(metrics.render().decode())
    found = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    return {key: value for key, value in found.items() if not key[0].startswith("process_")}


def one(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[(name, tuple(sorted(labels.items())))]


def test_every_series_is_there_at_the_start_and_zero() -> None:
    found = samples(Metrics(["m"]))
    assert all(value == 0 for (name, _), value in found.items() if name not in ALWAYS)
    names = {name for name, _ in found}
    for suffix in (
        "prompt_tokens_total", "generation_tokens_total", "request_success_total", "request_error_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_sum",
        "router_refused_requests_total", "router_queued_choices", "replicas", "router_decisions_total", "router_failovers_total",
        "request_queue_time_seconds_bucket", "router_actual_wait_seconds_bucket", "router_loop_lag_seconds_bucket",
    ):  # fmt: skip
        assert f"trireme_{suffix}" in names
    assert ("trireme_time_to_first_token_seconds_bucket", (("le", "0.001"), ("model_name", "m"))) in found


def test_a_request_is_counted() -> None:
    metrics = Metrics(["m"])
    meter = metrics.request("m", choices=2, prompt_tokens=7)
    assert one(metrics, "trireme_router_inflight_requests", model_name="m") == 0, "it may still be refused"
    meter.admitted()
    assert one(metrics, "trireme_router_inflight_requests", model_name="m") == 1
    meter.first(1, time.monotonic())
    meter.tokens(1, 3, 0.3)
    meter.ended("stop", Usage(prompt_tokens=7, output_tokens=4, cached_tokens=2))
    assert one(metrics, "trireme_e2e_request_latency_seconds_count", model_name="m") == 0
    meter.failed("nan_logits")
    assert one(metrics, "trireme_router_inflight_requests", model_name="m") == 0
    assert one(metrics, "trireme_prompt_tokens_total", model_name="m") == 7
    assert one(metrics, "trireme_generation_tokens_total", model_name="m") == 4
    assert one(metrics, "trireme_time_to_first_token_seconds_count", model_name="m") == 1
    assert one(metrics, "trireme_inter_token_latency_seconds_count", model_name="m") == 3
    assert one(metrics, "trireme_inter_token_latency_seconds_sum", model_name="m") == pytest.approx(0.3)
    assert one(metrics, "trireme_request_success_total", model_name="m", finished_reason="stop") == 1
    assert one(metrics, "trireme_request_error_total", model_name="m", code="nan_logits") == 1
    assert one(metrics, "trireme_e2e_request_latency_seconds_count", model_name="m") == 1


def test_leaving_is_nobodys_error_and_counts_once() -> None:
    metrics = Metrics(["m"])
    meter = metrics.request("m", choices=2, prompt_tokens=1)
    meter.admitted()
    meter.ended("length", Usage(prompt_tokens=1, output_tokens=1))
    meter.left()
    meter.left()
    assert one(metrics, "trireme_request_success_total", model_name="m", finished_reason="cancelled") == 1
    assert one(metrics, "trireme_router_inflight_requests", model_name="m") == 0


def test_replicas_come_from_the_dispatcher() -> None:
    metrics = Metrics(["tiny"], ScriptedDispatcher().status)
    assert one(metrics, "trireme_num_requests_running", model_name="tiny", replica="r0") == 2
    assert one(metrics, "trireme_num_requests_waiting", model_name="tiny", replica="r0") == 1
    assert one(metrics, "trireme_kv_cache_usage_perc", model_name="tiny", replica="r0") == 0.6
    assert one(metrics, "trireme_replicas", model_name="tiny", state="ready") == 1


def test_no_request_makes_a_series() -> None:
    metrics = Metrics(["m"])
    before = len(samples(metrics))
    for index in range(1000):
        metrics.refused(f"code{index}")
        metrics.request("m", choices=1, prompt_tokens=1).failed(f"code{index}")
    assert len(samples(metrics)) == before
    assert one(metrics, "trireme_router_refused_requests_total", code="other") == 1000


def test_names_keep_prometheus_rules() -> None:
    assert all(re.fullmatch(r"trireme_[a-z0-9_]+", name) for name, _ in samples(Metrics(["m"], ScriptedDispatcher().status)))


def test_keys_have_series_of_their_own_as_far_as_there_is_room() -> None:
    limiter = KeyLimiter()
    for number in range(KEY_SERIES + 10):
        limiter.check(f"k{number}", "alice", KeyLimits(rpm=1), 0.0)
        limiter.settle(limiter.admit(f"k{number}", 100, 0.0), 7, 5, 0.0)
    with pytest.raises(RateLimited):
        limiter.check("k3", "alice", KeyLimits(rpm=1), 0.0)
    metrics = Metrics(["m"], usage=lambda: limiter.usage(0.0))
    assert one(metrics, "trireme_key_requests_total", key="k3", tenant="alice") == 1
    assert one(metrics, "trireme_key_tokens_total", key="k3", tenant="alice", kind="prompt") == 7
    assert one(metrics, "trireme_key_tokens_total", key="other", tenant="other", kind="output") == 50
    assert one(metrics, "trireme_key_refused_total", key="k3", tenant="alice", limit="requests") == 1
    assert len([name for name, _ in samples(metrics) if name == "trireme_key_requests_total"]) == KEY_SERIES + 1
