"""CPU time that the HTTP API spends on one streamed token: ``python -m bench.http_api [--streams 128] [--tokens 400] [--stops]``.

A server process runs the real HTTP API over a dispatcher that gives every stream one token a step; this process is its clients. Prints
microseconds of the server's CPU time per token: of everything (dispatcher, detokenizer, JSON, ASGI, sockets), and of the detokenizer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from orchestrator.auth.api_keys import Salting
from orchestrator.config.router_spec import HttpSpec, ModelCard, RouterSpec
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.frontend.detokenizer import Detokenizer, TextRule
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.frontend.text_models import TextModel, TextModels, load_texts
from orchestrator.router.http.app import build_app
from orchestrator.router.http.server import bind, serve
from orchestrator.router.interfaces import Watcher
from orchestrator.router.metrics import Metrics, RequestMeter
from orchestrator.router.tenant_caps import TenantCaps
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage
from workers.protocol.status import ModelStatus, RouterStatus


class Stepping:
    """A dispatcher that starts when the last of its streams was submitted, and then gives each stream one token a step."""

    def __init__(self, streams: int, step_s: float) -> None:
        self._waiting, self._step_s = streams, step_s
        self._live: list[tuple[RouterRequest, Watcher]] = []
        self._position = 0
        self.started = 0.0
        self.spent = 0.0

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> Stepping:
        self._live.append((ask, watcher))
        if len(self._live) == self._waiting:
            self.started = time.process_time()
            asyncio.get_running_loop().call_soon(self._step)
        return self

    def cancel(self) -> None: ...

    def finish(self, choice: int) -> None: ...

    def credit(self, tokens: int) -> None: ...

    def model(self, name: str) -> ModelStatus:
        return ModelStatus(name="tiny", ready=1, max_seq_len=1 << 20, vocab_size=259, block_size=16, guided=True)

    def ready(self) -> bool:
        return True

    def status(self) -> RouterStatus:
        return RouterStatus(router="bench")

    def _step(self) -> None:
        position, self._position = self._position, self._position + 1
        for ask, watcher in self._live:
            if position < ask.params.max_tokens:
                watcher.on_tokens(0, position, [97 + position % 26], None)
            else:
                watcher.on_done(0, "length", Usage(prompt_tokens=len(ask.prompt_ids), output_tokens=position), None)
        if position < self._live[0][0].params.max_tokens:
            asyncio.get_running_loop().call_later(self._step_s, self._step)
        else:
            asyncio.get_running_loop().call_soon(self._stop)

    def _stop(self) -> None:
        self.spent = time.process_time() - self.started


class Nothing:
    """A sink that discards everything."""

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None: ...

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None: ...

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None: ...

    def on_failed(self, choice: int, error: TriremeError) -> None: ...


def texts_of(folder: str) -> TextModels:
    return load_texts([ModelCard(name="tiny", tokenizer=str(tiny_tokenizer(Path(folder))))])


def run_server(report: Connection, folder: str, streams: int, step_s: float) -> None:
    async def main() -> None:
        dispatcher = Stepping(streams, step_s)
        http = HttpSpec(port=0)
        listener = bind(http)
        texts = texts_of(folder)
        spec = RouterSpec(name="bench", back="", rpc="", models=(), http=http)
        app = build_app(
            spec,
            dispatcher,
            Preprocessor(texts, dispatcher, spec.admission, Salting(b"salt")),
            Metrics(["tiny"]),
            TenantCaps(spec.admission),
        )
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(app, listener, stop, grace_s=2))
        report.send(listener.getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, report.recv)
        report.send(dispatcher.spent)
        stop.set()
        await serving
        texts.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def read_streams(port: int, streams: int, body: bytes) -> int:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        received = b"".join([part async for part in reader])
        writer.close()
        assert b"data: [DONE]" in received
        return received.count(b'"content":"') - 1

    return sum(await asyncio.gather(*(one() for _ in range(streams))))


def text_layer_us(model: TextModel, stops: tuple[str, ...], tokens: int = 100_000) -> float:
    meter = Metrics(["tiny"]).request("tiny", choices=1, prompt_tokens=1)
    watcher = Detokenizer(
        model.table, TextRule(stops=stops), Nothing(), finish=lambda choice: None, choices=1, prompt_tokens=1, meter=meter
    )
    started = time.process_time()
    for position in range(tokens):
        watcher.on_tokens(0, position, [97 + position % 26], None)
    return (time.process_time() - started) / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--stops", action="store_true")
    options = parser.parse_args()
    stops = ["\n\nUser:", "STOP"] if options.stops else []
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "max_tokens": options.tokens,
        "stop": stops or None,
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=run_server, args=(theirs, folder, options.streams, options.step_ms / 1000), daemon=True
        )
        server.start()
        tokens = asyncio.run(read_streams(ours.recv(), options.streams, json.dumps(body).encode()))
        ours.send("done")
        spent = ours.recv()
        server.join(20)
        texts = texts_of(folder)
        alone = text_layer_us(texts.models[0], tuple(stops))
        texts.close()
    assert tokens == options.streams * options.tokens, f"{tokens} tokens arrived"
    whole = spent / tokens * 1e6
    print(f"{options.streams} streams x {options.tokens} tokens: {whole:.1f} us of CPU a token, text layer alone {alone:.2f} us")


if __name__ == "__main__":
    main()
