"""The status page at ``/ui`` and its numbers at ``/ui/data``.

Owns the page's bytes, the headers that confine it, and the shape of its data. It has no counters: every number is read at the request from
the meters and the dispatcher's status, like ``/metrics``. The page itself holds no data of a deployment, so it is open to all who reach the
HTTP API; its data is not.
"""

from __future__ import annotations

import hashlib
import re
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from importlib import resources

import msgspec

from orchestrator.router.core.stats import LATENCY_BUCKETS, Histogram
from orchestrator.router.metrics import Metrics, ModelMeter
from workers import __version__
from workers.epoch import started_at
from workers.protocol.status import ReplicaLossStatus, ReplicaStatus, RouterHealthState, RouterStatus, RoutingState

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class OverallState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of this router. READY and DEGRADED serve every model."""

    state: RouterHealthState
    why: tuple[str, ...]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram, cumulated as in ``/metrics``: ``counts[i]`` observations of at most ``bounds[i]`` seconds, the last of any length."""

    counts: tuple[int, ...]
    total_s: float


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One model at this router. All but ``ready``, ``queue`` and ``in_flight`` count from the router's start."""

    name: str
    ready: int
    queue: int
    in_flight: int
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    success: dict[str, int]
    errors: dict[str, int]
    first_token: Latency
    inter_token: Latency


class ReplicaFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as this router knows it. ``epoch``: text, since it has more digits than JavaScript's numbers; ``launched``: the Unix
    time in it, 0 where it holds none; ``age_s``: in this state; ``choices``: this router's own there."""

    name: str
    model: str
    state: RoutingState
    reason: str = ""
    quarantined: bool = False
    epoch: str = ""
    launched: float = 0.0
    age_s: float = 0.0
    tp: int = 1
    pp: int = 1
    engine: str = ""
    dtype: str = ""
    max_batch_size: int = 0
    running: int = 0
    waiting: int = 0
    choices: int = 0
    tok_s: float = 0.0
    num_blocks: int = 0
    free_blocks: int = 0


class LossFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that was lost ``age_s`` ago with ``choices`` of this router's on it; ``drained``: it left on purpose."""

    replica: str
    model: str
    epoch: str
    reason: str
    choices: int
    drained: bool
    age_s: float


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the page shows. ``time`` and ``started``: Unix seconds; ``routers``: how many share the deployment;
    ``bounds``: of every latency, seconds."""

    version: str
    router: str
    routers: int
    time: float
    started: float
    verdict: OverallState
    bounds: tuple[float, ...]
    models: tuple[ModelFigures, ...]
    replicas: tuple[ReplicaFigures, ...]
    losses: tuple[LossFigures, ...]
    counts: dict[str, int]


class StatusPage:
    """The page and its data. ``status`` is the dispatcher's; ``routers``: of the whole deployment."""

    def __init__(self, name: str, routers: int, metrics: Metrics, status: Callable[[], RouterStatus]) -> None:
        self._name, self._routers, self._metrics, self._status = name, max(1, routers), metrics, status
        self._started = time.time()
        self.html = resources.files(__package__).joinpath("ui.html").read_bytes()
        self.headers = headers(self.html)

    def snapshot(self) -> Snapshot:
        status = self._status()
        replicas = tuple(map(_replica, status.replicas))
        losses = tuple(map(_loss, status.losses))
        models = tuple(_model(name, meter, status, replicas) for name, meter in self._metrics.models.items())
        return Snapshot(
            version=__version__,
            router=self._name,
            routers=self._routers,
            time=time.time(),
            started=self._started,
            verdict=judge(status.closing, models, replicas, losses),
            bounds=LATENCY_BUCKETS,
            models=models,
            replicas=replicas,
            losses=losses,
            counts=status.counts,
        )


def judge(closing: bool, models: Sequence[ModelFigures], replicas: Sequence[ReplicaFigures], losses: Sequence[LossFigures]) -> OverallState:
    """The verdict over what a router sees. It does not know how many replicas are wanted, so a replica that never connected is not
    missed."""
    if closing:
        return OverallState(state="DRAINING", why=("this router finishes what it has and takes nothing new",))
    if not replicas:
        return OverallState(state="STARTING", why=("no replica was heard of yet",))
    without = tuple(f"no replica of {model.name} is ready" for model in models if not model.ready)
    if without:
        return OverallState(state="UNAVAILABLE", why=without)
    why = [trouble for replica in replicas if (trouble := _trouble(replica, losses))]
    if why:
        return OverallState(state="DEGRADED", why=tuple(why))
    ready = sum(replica.state == "ready" for replica in replicas)
    return OverallState(state="READY", why=(f"{ready} replica{'s' if ready > 1 else ''} ready, every model served",))


def _trouble(replica: ReplicaFigures, losses: Sequence[LossFigures]) -> str:
    """What is wrong with one replica; empty for nothing."""
    if replica.state == "lost":
        last = next((loss for loss in reversed(losses) if loss.replica == replica.name), None)
        return "" if last is not None and last.drained else f"{replica.name} is lost: {replica.reason}"
    if replica.state == "draining":
        return f"{replica.name} drains"
    return f"{replica.name} is in quarantine: {replica.reason}" if replica.quarantined else ""


def headers(page: bytes) -> dict[str, str]:
    """What confines the page: its one script and one style by hash, data from its own origin, nothing else from anywhere."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        hashes[kind.decode()].append(f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'")
    policy = (
        "default-src 'none'", f"script-src {' '.join(hashes['script'])}", f"style-src {' '.join(hashes['style'])}", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )  # fmt: skip
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }


def _model(name: str, meter: ModelMeter, status: RouterStatus, replicas: Sequence[ReplicaFigures]) -> ModelFigures:
    return ModelFigures(
        name=name,
        ready=sum(replica.model == name and replica.state == "ready" for replica in replicas),
        queue=status.queue.get(name, 0),
        in_flight=meter.in_flight,
        prompt_tokens=meter.prompt_tokens,
        generation_tokens=meter.generation_tokens,
        cached_tokens=meter.cached_tokens,
        success=dict(meter.success),
        errors={code: count for code, count in meter.errors.items() if count},
        first_token=_latency(meter.first_token),
        inter_token=_latency(meter.inter_token),
    )


def _latency(histogram: Histogram) -> Latency:
    return Latency(counts=tuple(count for _, count in histogram.cumulated()), total_s=histogram.total)


def _replica(replica: ReplicaStatus) -> ReplicaFigures:
    return ReplicaFigures(
        name=replica.name,
        model=replica.model,
        state=replica.state,
        reason=replica.reason,
        quarantined=replica.quarantined,
        epoch=str(replica.epoch),
        launched=started_at(replica.epoch),
        age_s=replica.age_s,
        tp=replica.tp,
        pp=replica.pp,
        engine=replica.engine,
        dtype=replica.dtype,
        max_batch_size=replica.max_batch_size,
        running=replica.running,
        waiting=replica.waiting,
        choices=replica.choices,
        tok_s=replica.tok_s,
        num_blocks=replica.num_blocks,
        free_blocks=replica.free_blocks,
    )


def _loss(loss: ReplicaLossStatus) -> LossFigures:
    return LossFigures(
        replica=loss.replica,
        model=loss.model,
        epoch=str(loss.epoch),
        reason=loss.reason,
        choices=loss.choices,
        drained=loss.drained,
        age_s=loss.age_s,
    )
