"""A dispatcher that plays scripts, behind a real HTTP API on a real socket, for tests of the frontends.

Owns one server thread with its event loop. Tokens come one a loop turn and obey credit, as a replica's do.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop

from orchestrator.auth.api_keys import ApiKeys, Salting
from orchestrator.config.router_spec import AdmissionSpec, HttpSpec, ModelCard, RouterSpec, TlsConfig
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.frontend.text_models import TextModels, load_texts
from orchestrator.router.http.app import build_app
from orchestrator.router.http.server import bind, serve
from orchestrator.router.http.tls import TlsFiles
from orchestrator.router.interfaces import Watcher
from orchestrator.router.metrics import Metrics, RequestMeter
from orchestrator.router.tenant_caps import TenantCaps
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage
from workers.protocol.status import ModelStatus, ReplicaStatus, RouterStatus

CONTEXT, VOCAB = 1024, 259


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice does: its text (or ids), then how it ends. ``hang``: after the text, nothing more ever comes."""

    text: str | bytes | list[int] = "Hello, world"
    reason: FinishReason = "stop"
    stop_id: int | None = None
    error: TriremeError | None = None
    hang: bool = False
    burst: int = 1


Script = Callable[[RouterRequest, int], Play]


class ScriptedTicket:
    def __init__(self, dispatcher: ScriptedDispatcher, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> None:
        self.ask, self.watcher, self.meter, self._dispatcher = ask, watcher, meter, dispatcher
        self.live = set(range(ask.n))
        self.allowed = ask.credit
        self.cancelled = False
        self.sent = [0] * ask.n
        for choice in range(ask.n):
            asyncio.get_running_loop().call_soon(self._step, choice)

    def cancel(self) -> None:
        if self.live:
            self.cancelled = True
            self.live.clear()
            self._dispatcher.cancelled.set()

    def stop_choice(self, choice: int) -> None:
        self.live.discard(choice)
        self._dispatcher.finished.append((self.ask.request_id, choice))

    def credit(self, tokens: int) -> None:
        self.allowed += tokens

    def _step(self, choice: int) -> None:
        if choice not in self.live:
            return
        play = self._dispatcher.script(self.ask, choice)
        ids = list(play.text.encode() if isinstance(play.text, str) else play.text)[: self.ask.params.max_tokens]
        position = self.sent[choice]
        if position == 0 and self.ask.params.prompt_logprobs is not None:
            self.watcher.on_prompt(choice, score(self.ask.prompt_ids, self.ask.params.prompt_logprobs, first=True))
        if position >= len(ids):
            self._end(choice, play, len(ids))
            return
        if self.allowed > position:
            tokens = ids[position : min(position + play.burst, self.allowed)]
            self.sent[choice] += len(tokens)
            if position == 0:
                self.meter.first(len(tokens), time.monotonic())
            else:
                self.meter.tokens(1, len(tokens), 0.001)
            wanted = self.ask.params.logprobs
            self.watcher.on_tokens(choice, position, tokens, None if wanted is None else score(tokens, wanted))
            asyncio.get_running_loop().call_soon(self._step, choice)
        else:
            self._dispatcher.starved.set()
            asyncio.get_running_loop().call_later(0.005, self._step, choice)

    def _end(self, choice: int, play: Play, output: int) -> None:
        if play.hang:
            return
        self.live.discard(choice)
        if play.error is not None:
            self.watcher.on_failed(choice, play.error)
            return
        usage = Usage(prompt_tokens=len(self.ask.prompt_ids), output_tokens=output, cached_tokens=3)
        reason = "length" if output == self.ask.params.max_tokens else play.reason
        self.watcher.on_done(choice, reason, usage, play.stop_id)


def score(ids: list[int], count: int, *, first: bool = False) -> list[Logprobs]:
    """Made-up logprobs: the token itself is the best, its successors follow."""
    rows = [Logprobs(id, -0.5, [id + i for i in range(count)], [-0.5 - i for i in range(count)]) for id in ids]
    if first:
        rows[0] = Logprobs(ids[0], None, [], [])
    return rows


class ScriptedDispatcher:
    """Implements :class:`orchestrator.router.interfaces.Dispatcher` for one model, ``tiny``."""

    def __init__(self) -> None:
        self.script: Script = lambda ask, choice: Play()
        self.asks: list[RouterRequest] = []
        self.tickets: list[ScriptedTicket] = []
        self.finished: list[tuple[str, int]] = []
        self.cancelled, self.starved = threading.Event(), threading.Event()
        self.refusal: TriremeError | None = None
        self.is_ready = True

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> ScriptedTicket:
        if self.refusal is not None:
            raise self.refusal
        ticket = ScriptedTicket(self, ask, watcher, meter)
        self.asks.append(ask)
        self.tickets.append(ticket)
        return ticket

    def model(self, name: str) -> ModelStatus | None:
        return ModelStatus(name="tiny", ready=1, max_seq_len=CONTEXT, vocab_size=VOCAB, block_size=16, guided=True)

    def ready(self) -> bool:
        return self.is_ready

    def status(self) -> RouterStatus:
        replica = ReplicaStatus(
            name="r0", model="tiny", state="ready", reported=True, running=2, waiting=1, num_blocks=10, free_blocks=4
        )  # fmt: skip
        return RouterStatus(router="test", queue={"tiny": 0}, counts={"resubmitted": 0}, replicas=(replica,))

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


def tiny_texts(folder: Path, chat_template: str = CHAT_TEMPLATE, generation: dict[str, Any] | None = None) -> TextModels:
    """``generation``: what is in generation_config.json; None = there is none."""
    tokenizer = tiny_tokenizer(folder)
    (tokenizer / "chat_template.jinja").write_text(chat_template)
    if generation is not None:
        (tokenizer / "generation_config.json").write_text(json.dumps(generation))
    return load_texts([ModelCard(name="tiny", tokenizer=str(tokenizer), aliases=("tiny-alias",), created=1)])


class ServedDoor:
    """The HTTP API on a loopback port, in a separate thread, and a client for it; a context manager."""

    def __init__(
        self, folder: Path, keys: ApiKeys | None = None, *, texts: TextModels | None = None, allowed_origins: tuple[str, ...] = (),
        trusted_proxies: tuple[str, ...] = (), admission: AdmissionSpec | None = None,
        tls: TlsConfig | None = None,
    ) -> None:  # fmt: skip
        self.keys, self.salting = keys, Salting(b"salt")
        self.dispatcher = ScriptedDispatcher()
        self.texts = texts or tiny_texts(folder)
        self.metrics = Metrics(["tiny"], self.dispatcher.status)
        http = HttpSpec(port=0, max_body_bytes=1 << 20, allowed_origins=allowed_origins, trusted_proxies=trusted_proxies, tls=tls)
        self.spec = RouterSpec(
            name="test", back="", rpc="", models=(self.texts.models[0].card,), http=http, admission=admission or AdmissionSpec()
        )
        self.preprocessor = Preprocessor(self.texts, self.dispatcher, self.spec.admission, self.salting)
        self.caps = TenantCaps(self.spec.admission)
        self._listener = bind(http)
        self.port = int(self._listener.getsockname()[1])
        self.tls = TlsFiles(tls) if tls is not None else None
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._up = threading.Event()

    def __enter__(self) -> ServedDoor:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def freeze(self, seconds: float) -> None:
        """Block the server's event loop for this time, starting now."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(time.sleep, seconds)

    def __exit__(self, *exception: Any) -> None:
        self.http.close()
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"
        self.texts.close()

    def _run(self) -> None:
        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            app = build_app(self.spec, self.dispatcher, self.preprocessor, self.metrics, self.caps, self.keys)
            self._up.set()
            await serve(
                app, self._listener, self._stop, tls=self.tls, trusted_proxies=(self.spec.http or HttpSpec()).trusted_proxies, grace_s=1
            )

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
