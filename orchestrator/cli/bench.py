"""`trireme bench`: puts load on an OpenAI endpoint or on the RPC servers of a deployment, and measures it.

Owns the flags, the process's timers and signals, and the progress. :mod:`orchestrator.loadgen` decides what is sent and counted.
"""

from __future__ import annotations

import gzip
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from orchestrator.cli.console import INTERRUPTED, Console
from orchestrator.cli.generate_request import (
    KEY_VARIABLE,
    Model,
    Name,
    Rpc,
    Temperature,
    Url,
    http_address,
    open_backend,
)
from orchestrator.cli.option_structs import with_option_structs
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, NAME_ONE, RunDir, pick
from workers.protocol.errors import EngineFault, EnvironmentFault, Rejected

if TYPE_CHECKING:
    from orchestrator.loadgen.runner import LoadRun
    from orchestrator.loadgen.schedule import ContextLimit
    from orchestrator.loadgen.settings import LoadSettings
    from orchestrator.loadgen.stats import Summary
    from orchestrator.loadgen.target import LoadTarget

#: Requests in flight without --concurrency: exactly this number in a closed loop, at most this number in an open one.
CLOSED, OPEN = 8, 1024
#: Requests of a run without --requests, --duration and --trace.
REQUESTS = 100
#: Tokens of the context kept free for a prompt of words: a word may be several tokens, and a chat template adds some.
SLACK_TOKENS = 64
TICK_S = 0.25
#: Signals that end a run early; its report is printed all the same.
ENDING = (signal.SIGINT, signal.SIGTERM)
LOST = 5

InputLen = Annotated[str, typer.Option("--input-len", metavar="N|A:B", help="Tokens of a prompt, 512 by default; A:B = a range.")]
Slo = Annotated[list[str] | None, typer.Option("--slo", metavar="FIGURE:MS", help="Objective for goodput: ttft, itl, tpot, e2e or queue.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="table|json", help="Format of the report.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the report as JSON to this file.")]

#: Makes the target once the loop runs; ``clock`` is what answers are timed by.
MakeTarget = Callable[[Callable[[], float]], "LoadTarget"]


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, when, and what to count."""

    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=1, help="Requests in flight; with a rate or trace, at most.")
    ] = None
    rate: Annotated[float | None, typer.Option("--rate", "-r", help="Requests a second, sent without waiting for answers (open loop).")] = (
        None
    )
    burstiness: Annotated[float, typer.Option("--burstiness", help="1 = Poisson arrivals, less comes in bursts, more is steadier.")] = 1.0
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", min=1, help="Number of requests; 100 without a duration or a trace.")
    ] = None
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Send for this many seconds.")] = None
    input_len: InputLen = ""
    output_len: Annotated[str, typer.Option("--output-len", metavar="N|A:B", help="Tokens of an answer, 128 by default.")] = ""
    trace: Annotated[Path | None, typer.Option("--trace", help="Replay a .jsonl or .jsonl.gz of timestamps and lengths.")] = None
    speed: Annotated[float, typer.Option("--speed", help="Replay a trace this many times as fast.")] = 1.0
    spread: Annotated[float | None, typer.Option("--spread", help="Seconds over which equal timestamps of a trace are spread.")] = None
    max_len: Annotated[
        int | None, typer.Option("--max-len", min=2, help="Cut requests to this context; by default the served model's.")
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same arrivals, lengths and prompts.")] = 0
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat endpoint; prompts are words.")] = False
    words: Annotated[bool, typer.Option("--text", help="Send prompts as words instead of token ids.")] = False
    temperature: Temperature = 0.0
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let answers end at end-of-sequence (no ignore_eos).")] = False
    slo: Slo = None
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Requests sent before the run; they do not count.")] = 0
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which a request fails.")] = 600.0


@with_option_structs
def bench(
    context: typer.Context,
    url: Url = "",
    rpc: Rpc = False,
    name: Name = "",
    model: Model = "",
    *,
    load: LoadOptions,
    form: Output = "table",
    out: Out = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Put load on a deployment, or on any OpenAI endpoint, and measure it."""
    if form not in ("table", "json"):
        raise Rejected(f"-o {form} is not a form", hint="use table or json")
    if rpc and load.chat:
        raise Rejected("--chat is asked over HTTP", hint="leave out --rpc or --chat")
    settings = settings_of(load, model)
    if rpc:
        name = pick(name, run_dir, NAME_ONE).name
    else:
        url, name = http_address(url, name, run_dir), ""
    settings = measured_against(settings, url, rpc, name, run_dir)
    run(context.obj, settings, target_of(settings, url, rpc, name, run_dir), form, out)


def settings_of(load: LoadOptions, model: str) -> LoadSettings:
    """The settings from the flags, still without a target. Raises Rejected on flags that exclude each other or have no effect."""
    from orchestrator.loadgen.settings import LoadSettings, check, objectives

    open_loop, endless = load.rate is not None or load.trace is not None, load.duration is None and load.trace is None
    settings = LoadSettings(
        target="", model=model, endpoint="chat" if load.chat else "completions",
        concurrency=load.concurrency or (OPEN if open_loop else CLOSED), rate=load.rate, burstiness=load.burstiness,
        requests=load.requests or (REQUESTS if endless else None), duration_s=load.duration, input_len=load.input_len,
        output_len=load.output_len, trace=str(load.trace or ""), speed=load.speed, spread_s=load.spread, max_len=load.max_len,
        seed=load.seed, words=load.words or load.chat, full=not load.stop_at_eos, temperature=load.temperature, warmup=load.warmup,
        timeout_s=load.timeout, objectives=objectives(load.slo or []),
    )  # fmt: skip
    check(settings)
    return settings


def measured_against(settings: LoadSettings, url: str, rpc: bool, name: str, run_dir: str) -> LoadSettings:
    """The settings with their target, with the served model's name and context length if the endpoint reports them.

    Raises NotFound.
    """
    with closing(open_backend(url, rpc, name, run_dir)) as backend:
        try:
            card = backend.card(settings.model)
        except EngineFault:
            if not settings.model:
                raise
            card = {"id": settings.model}  # an endpoint that lists no models may serve this one all the same
    context = card.get("max_model_len")
    slack = SLACK_TOKENS if settings.words else 0
    limit = settings.max_len or (context - slack if context and context > 2 * slack else context)
    target = f"rpc {name}" if rpc else url
    return msgspec.structs.replace(settings, target=target, model=settings.model or card["id"], max_len=limit)


def target_of(settings: LoadSettings, url: str, rpc: bool, name: str, run_dir: str) -> MakeTarget:
    if not rpc:
        from orchestrator.loadgen.http_target import HttpTarget

        key = os.environ.get(KEY_VARIABLE, "")
        return lambda clock: HttpTarget(url, model=settings.model, endpoint=settings.endpoint, key=key, clock=clock)
    from orchestrator.cli.generate_backends import client_keys
    from orchestrator.loadgen.rpc_target import RpcTarget

    status = pick(name, run_dir).status()
    keys = client_keys(status)
    return lambda clock: RpcTarget(status.rpc, model=settings.model, keys=keys, clock=clock)


def run(console: Console, settings: LoadSettings, make: MakeTarget, form: str, out: Path | None) -> None:
    """Send the load and print the report. Exit code 5 when nothing was answered, 130 after Ctrl-C or SIGTERM."""
    import asyncio

    import uvloop

    from orchestrator.cli import bench_report
    from orchestrator.loadgen.schedule import ContextLimit

    console.say(bench_report.describe(settings))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    date, context_limit = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), ContextLimit(settings.max_len)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary, interrupted = runner.run(_measure(console, settings, make, context_limit, read_lines(settings.trace)))
    report = bench_report.BenchReport.of(date, settings, summary, context_limit, interrupted)
    if out is not None:
        bench_report.write(out, report)
    console.out(bench_report.as_json(report) if form == "json" else bench_report.render(report))
    for doubt in bench_report.doubts(report):
        console.warn(doubt)
    if interrupted or not summary.succeeded:
        raise typer.Exit(INTERRUPTED if interrupted else LOST)


async def _measure(
    console: Console, settings: LoadSettings, make: MakeTarget, context_limit: ContextLimit, lines: Iterator[bytes]
) -> tuple[Summary, bool]:
    """(the summary, whether a signal ended the run)."""
    from orchestrator.loadgen.runner import LoadRun, RunOptions, clock
    from orchestrator.loadgen.settings import plan, warmup
    from orchestrator.loadgen.stats import RunStats

    def options(seed: int) -> RunOptions:
        return RunOptions(
            concurrency=settings.concurrency, seed=seed, timeout_s=settings.timeout_s, words=settings.words, ignore_eos=settings.full,
            temperature=settings.temperature, duration_s=settings.duration_s if seed == settings.seed else None,
        )  # fmt: skip

    target = make(clock)
    try:
        if settings.warmup:
            # Prompts other than those of the run, so that the run does not hit them in the prefix cache.
            warm = LoadRun(target, warmup(settings), options(settings.seed + 1), RunStats())
            if await _until_end(console, "warm-up", warm, settings.warmup, timed=False):
                return warm.stats.summary(0.0), True
        load = LoadRun(target, plan(settings, context_limit, lines), options(settings.seed), RunStats(settings.objectives))
        spent = time.process_time()
        total = settings.requests or int(settings.duration_s or 0)
        interrupted = await _until_end(console, "load", load, total, timed=settings.requests is None and settings.duration_s is not None)
        return load.stats.summary(time.process_time() - spent), interrupted
    finally:
        await target.close()


async def _until_end(console: Console, phase: str, load: LoadRun, total: int, *, timed: bool) -> bool:
    """Run a load and show its progress, in finished requests, or in seconds if the number of requests is not known. Returns True if Ctrl-C
    or SIGTERM ended it."""
    import asyncio

    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        load.stop()

    loop = asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, interrupt)
    running = asyncio.create_task(load.run())
    try:
        with console.progress(lambda count: f"{count} s" if timed else f"{count} requests") as progress:
            over = False
            while not over:
                over = bool((await asyncio.wait({running}, timeout=TICK_S))[0])
                progress(phase, min(int(load.elapsed), total) if timed else load.stats.over, total)
        await running
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)
    return interrupted


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a trace, unpacked where it is gzip; none without one. Raises EnvironmentFault."""
    if not path:
        return
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            yield from gzip.GzipFile(fileobj=plain) if packed else plain
    except (OSError, EOFError) as error:
        raise EnvironmentFault(f"{path} cannot be read", str(error), "name a .jsonl or .jsonl.gz file") from None
