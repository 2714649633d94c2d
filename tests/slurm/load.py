"""Constant load on one endpoint: streams over HTTP and calls over RPC in closed loops, each answer compared with the expected one."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.client import AsyncClient, ClientKeys
from tests.load.wire import stream
from workers.protocol.errors import TriremeError
from workers.protocol.specs import RouterAddress

#: Longest that one answer may take, seconds.
ANSWER_S = 120.0


class Load:
    """Runs in a thread of its own between ``start`` and ``stop``. ``wrong``: what failed or was not the right answer, in words.

    ``right`` judges a prompt's answer: its text, or with ``exact`` the logprob of each token (HTTP) or the token ids (RPC) in its stead.
    """

    def __init__(
        self, url: str, rpc: Sequence[RouterAddress], key_file: str, model: str, tokens: int, right: Callable[[str, str], bool], *,
        streams: int, calls: int, exact: bool,
    ) -> None:  # fmt: skip
        self._url, self._rpc, self._model, self._tokens, self._right = url, rpc, model, tokens, right
        self._keys = msgspec.json.decode(Path(key_file).read_bytes(), type=ClientKeys)
        self._exact = exact
        self._readers, self._callers = streams, calls
        self._over = threading.Event()
        self.answered = 0
        self.longest = 0.0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends when the last request has ended."""
        self._over.set()
        self._thread.join(2 * ANSWER_S)
        assert not self._thread.is_alive(), "a request never ended"

    async def _run(self) -> None:
        client = AsyncClient(list(self._rpc), model=self._model, keys=self._keys)
        try:
            readers = [self._loop(f"http {index}", self._read) for index in range(self._readers)]
            await asyncio.gather(*readers, *(self._loop(f"rpc {index}", self._call(client)) for index in range(self._callers)))
        finally:
            client.close()

    async def _loop(self, name: str, ask: Callable[[str], Any]) -> None:
        turn = 0
        while not self._over.is_set():
            prompt = f"{name} {turn % 4}"
            begun = time.monotonic()
            try:
                text = await asyncio.wait_for(ask(prompt), ANSWER_S)
            except (TriremeError, OSError, EOFError, TimeoutError) as error:
                self.wrong.append(f"{prompt}: {type(error).__name__} {error}")
                await asyncio.sleep(0.2)  # a door that refuses at once must not be asked in a spin
            else:
                self.answered += 1
                self.longest = max(self.longest, time.monotonic() - begun)
                if not self._right(prompt, text):
                    self.wrong.append(f"{prompt}: {text!r}")
            turn += 1

    async def _read(self, prompt: str) -> str:
        body = {"model": self._model, "prompt": prompt, "max_tokens": self._tokens, "temperature": 0.0, "ignore_eos": True}
        answer = await stream(self._url, body | ({"logprobs": 0} if self._exact else {}))
        data = b"".join(piece for _, piece in answer.reads)
        if answer.status != 200 or b"data: [DONE]" not in data or b'"error":' in data:
            raise OSError(f"HTTP status {answer.status}: ...{data[-300:]!r}")
        if not self._exact:
            return answer.text()
        chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
        shown = [choice["logprobs"]["token_logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        return repr([value for values in shown for value in values])

    def _call(self, client: AsyncClient) -> Callable[[str], Any]:
        async def ask(prompt: str) -> str:
            reply = await client.complete(prompt, max_tokens=self._tokens, temperature=0.0, ignore_eos=True).result()
            return repr(reply.choices[0].tokens) if self._exact else reply.choices[0].text

        return ask
