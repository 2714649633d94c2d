"""The report of `trireme bench`: as a value, as JSON and as text. Owns only its format."""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator.cli.console import table
from orchestrator.loadgen.schedule import ContextLimit
from orchestrator.loadgen.settings import LoadSettings
from orchestrator.loadgen.stats import METRICS, Percentiles, Summary
from workers import __version__
from workers.files import replace_file
from workers.protocol.errors import EnvironmentFault

#: Above these limits the generator itself affects the figures: p99 of the delay of its timers in ms, and cores in use.
LATE_MS, BUSY_CORES = 10.0, 0.9


class PromptCuts(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that were cut from requests so that they fit the context."""

    requests: int
    input_tokens: int
    output_tokens: int


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """``date``: the start, UTC. ``interrupted``: Ctrl-C or SIGTERM ended the run."""

    date: str
    version: str
    settings: LoadSettings
    summary: Summary
    cut: PromptCuts
    interrupted: bool

    @classmethod
    def of(cls, date: str, settings: LoadSettings, summary: Summary, context_limit: ContextLimit, interrupted: bool) -> BenchReport:
        cut = PromptCuts(
            requests=context_limit.requests, input_tokens=context_limit.input_tokens, output_tokens=context_limit.output_tokens
        )
        return cls(date=date, version=__version__, settings=settings, summary=summary, cut=cut, interrupted=interrupted)


def as_json(report: BenchReport) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def write(path: Path, report: BenchReport) -> None:
    """Write the report as JSON, atomically. Raises EnvironmentFault."""
    try:
        replace_file(path, (as_json(report) + "\n").encode(), mode=0o666)
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written", error.strerror or str(error), "name another --out") from None


def describe(settings: LoadSettings) -> str:
    """One line of what will be sent where."""
    if settings.trace:
        how = f"{settings.trace} at {settings.speed:g} x its speed"
    elif settings.rate is not None:
        arrivals = "Poisson" if settings.burstiness == 1.0 else f"gamma({settings.burstiness:g})"
        how = f"open loop, {settings.rate:g} requests/s, {arrivals} arrivals"
    else:
        how = f"closed loop of {settings.concurrency}"
    ends = [f"{settings.requests} requests"] if settings.requests else []
    ends += [f"{settings.duration_s:g} s"] if settings.duration_s else []
    return f"{settings.model} at {settings.target}: {', '.join([how, *ends])}, seed {settings.seed}"


def render(report: BenchReport) -> str:
    """The report as text."""
    summary, cut = report.summary, report.cut
    rows = [[METRICS[name], *_row(spread)] for name, spread in summary.latency_ms.items()]
    lines = [
        table(["MS", "MEAN", "P50", "P90", "P95", "P99", "MAX"], rows),
        "",
        f"{summary.sent} requests in {summary.duration_s:.1f} s: {summary.succeeded} answered, {summary.failed} failed"
        + (f", {summary.abandoned} abandoned" if summary.abandoned else ""),
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tok/s, {summary.total_tokens_per_s:.1f} in all",
        f"{summary.prompt_tokens} prompt tokens ({summary.cached_tokens} cached), {summary.output_tokens} output tokens",
    ]
    if summary.goodput is not None:
        within = ", ".join(f"{name} {bound:g} ms" for name, bound in summary.goodput.objectives.items())
        lines.append(f"goodput {summary.goodput.requests_per_s:.2f} requests/s: {summary.goodput.share:.1%} within {within}")
    lines += [f"failed with {code}: {errors.count}, the first: {errors.example}" for code, errors in summary.errors.items()]
    if cut.requests:
        left_out = f"{cut.input_tokens} tokens of prompts and {cut.output_tokens} of answers were left out"
        lines.append(f"{cut.requests} requests were cut to {report.settings.max_len} tokens: {left_out}")
    if summary.uncounted:
        lines.append(f"{summary.uncounted} answers came without usage: their events were counted as tokens")
    client = summary.client
    lines.append(
        f"generator: timers {client.late.p99:.1f} ms late at p99, {client.cpu:.2f} cores, {client.peak_in_flight} in flight at most"
    )
    return "\n".join(lines)


def doubts(report: BenchReport) -> list[str]:
    """Reasons why the figures may not describe the server."""
    client, found = report.summary.client, []
    if client.late.p99 > LATE_MS or client.cpu > BUSY_CORES:
        found.append("the generator did not get the time that it needs, and this is in the figures: give it its own cores, or less load")
    if report.settings.open and client.peak_in_flight >= report.settings.concurrency:
        found.append(f"requests waited for one of {report.settings.concurrency} places in flight, and this wait is in the figures")
    return found


def _row(spread: Percentiles) -> list[str]:
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
    return [f"{value:.2f}" if spread.count else "-" for value in values]
