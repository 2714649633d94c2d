"""Cost that rendering a chat in a sandbox process adds to a request: ``python -m bench.sandbox [--count 2000]``.

Prints the median and the 99th percentile of one render, in this process and in a sandbox process, and the router's own CPU for each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop

from orchestrator.router.frontend.chat_template import TemplateFile, TemplateSource
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.sandbox_worker import RenderJob
from tests.support.tiny_models import CHAT_TEMPLATE, SPECIALS


async def measure(title: str, count: int, render: Callable[[], Awaitable[object]]) -> None:
    times = []
    await render()
    cpu = time.process_time()
    for _ in range(count):
        started = time.perf_counter()
        await render()
        times.append((time.perf_counter() - started) * 1e6)
    cpu = (time.process_time() - cpu) / count * 1e6
    p99 = statistics.quantiles(times, n=100)[98]
    print(f"{title}: p50 {statistics.median(times):.0f} us, p99 {p99:.0f} us, router CPU {cpu:.0f} us")


async def run(count: int) -> None:
    source = TemplateSource(templates={"default": TemplateFile(source=CHAT_TEMPLATE, origin="x")}, specials=SPECIALS, tokens={})
    template, sandbox = source.compile(), SandboxPool({"m": source})
    for turns, words in ((1, 20), (20, 200)):
        job = RenderJob(model="m", messages=[{"role": "user", "content": "word " * words}] * turns)

        async def here(job: RenderJob = job) -> object:
            return template.render(job.messages)

        async def there(job: RenderJob = job) -> object:
            return await sandbox.render(job)

        shape = f"{turns} messages of {words} words"
        await measure(f"{shape}, here", count, here)
        await measure(f"{shape}, in a sandbox process", count, there)
    sandbox.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    uvloop.run(run(parser.parse_args().count))


if __name__ == "__main__":
    main()
