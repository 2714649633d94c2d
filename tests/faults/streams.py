"""Streaming requests of every kind over both doors: what was asked, what came, and when.

Owns the clients. Judges nothing but the protocol itself (order, one end, usage): what the tokens must be is the caller's to know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, TypeVar

import httpx
import msgspec

from orchestrator.client import AsyncClient
from orchestrator.control.host.control_socket import DeploymentStatus
from tests.support.deployment import MODEL
from workers.engines.fake import score, state_of
from workers.protocol.messages import GuideSpec, Logprobs, SamplingParams

T = TypeVar("T")
#: Longest that any answer may take, seconds.
ANSWER_S = 180.0


class Choice(msgspec.Struct):
    """What one choice is, or should be. ``tokens``: ids where the door shows them, else the bytes of a :attr:`Case.plain` text."""

    tokens: list[int] = []
    text: str = ""
    reason: str = ""
    logprobs: list[float] = []


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``door``: http, rpc, or rpc ids (without text). ``plain``: each token is one printable byte, as FakeEngine's are."""

    prompt: str
    body: dict[str, Any]
    params: SamplingParams = SamplingParams()
    door: str
    guide: GuideSpec | None = None
    plain: bool = True

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))


class Arrivals:
    """When tokens reached clients, by request, in seconds of the monotonic clock. ``begun``: all together hold ``enough`` of them.

    A text over HTTP whose tokens are not all printable tells less: a token that shows nothing sends nothing, and is not timed.
    """

    def __init__(self, requests: int, enough: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(requests)]
        self._missing = enough
        self.begun = asyncio.Event()

    def add(self, request: int, tokens: int, *, timed: bool = True) -> None:
        if tokens:
            if timed:
                self.times[request].append(time.monotonic())
            self._missing -= tokens
            if self._missing <= 0:
                self.begun.set()

    def pause(self, since: float, until: float) -> float:
        """The longest that a client waited for its next token from ``since`` on, of all waits that began before ``until``."""
        waits = [
            after - max(before, since) for times in self.times for before, after in pairwise(times) if before <= until and after > since
        ]
        return max(waits, default=0.0)


class Run(msgspec.Struct, Generic[T]):
    """The result of :func:`run_all`. ``verdict``: what the disturbance returned."""

    answers: list[list[Choice]]
    arrivals: Arrivals
    verdict: T


async def ask_http(client: httpx.AsyncClient, case: Case, add: Callable[[int], None]) -> list[Choice]:
    """The streamed answer."""
    body = {"model": MODEL, "prompt": case.prompt, "stream": True, "stream_options": {"include_usage": True}, **case.body}
    choices = [Choice() for _ in range(case.n)]
    usage: dict[str, Any] = {}
    done = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not done, "something came after the end"
            if line == "data: [DONE]":
                done += 1
                continue
            chunk = msgspec.json.decode(line[6:])
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for shown in chunk["choices"]:
                choice = choices[shown["index"]]
                assert not choice.reason, "a choice went on after its end"
                choice.text += shown["text"]
                choice.reason = shown["finish_reason"] or ""
                if shown["logprobs"]:
                    assert not case.plain or shown["logprobs"]["text_offset"] == [
                        len(choice.logprobs) + i for i in range(len(shown["logprobs"]["tokens"]))
                    ]
                    choice.logprobs += shown["logprobs"]["token_logprobs"]
                add(len(shown["text"]))
    assert done == 1
    if case.body.get("echo"):
        (choice,) = choices
        assert choice.text.startswith(case.prompt) and choice.logprobs[0] is None
        assert len(choice.logprobs) == len(choice.text)
        choice.text, choice.logprobs = choice.text[len(case.prompt) :], choice.logprobs[len(case.prompt) :]
    assert usage["prompt_tokens"] == len(case.prompt)
    if case.plain:
        for choice in choices:
            choice.tokens = list(choice.text.encode())
        stop = len(case.body["stop"][0]) if "stop" in case.body else 0
        assert usage["completion_tokens"] == sum(len(choice.tokens) for choice in choices) + stop
    elif case.body.get("ignore_eos"):
        assert usage["completion_tokens"] == case.n * case.body["max_tokens"]
    return choices


async def ask_rpc(client: AsyncClient, case: Case, add: Callable[[int], None], *, attempts: int | None = 0) -> list[Choice]:
    """``attempts``: how often the client must have asked again; None = any number."""
    call = client.complete(case.prompt, texts=case.door == "rpc", **case.body)
    choices = [Choice() for _ in range(case.n)]
    async for piece in call.stream():
        choice = choices[piece.choice]
        assert piece.first == len(choice.tokens) and not choice.reason, "a gap, a repeat, or something after the end"
        choice.tokens = choice.tokens + piece.tokens
        choice.text += piece.text
        choice.logprobs = choice.logprobs + [entry.logprob or 0.0 for entry in piece.logprobs or ()]
        choice.reason = piece.finish_reason or ""
        add(len(piece.tokens))
    reply = await call.result()
    assert attempts is None or reply.attempts == attempts, "the door lived: it is the router that goes on"
    for choice, whole in zip(choices, reply.choices, strict=True):
        assert whole.tokens == choice.tokens and whole.usage.output_tokens == len(choice.tokens)
        assert whole.usage.prompt_tokens == len(case.prompt)
        assert case.door == "rpc" or not choice.text
    if case.body.get("echo"):
        assert reply.prompt_logprobs is not None
        _check_prompt(reply.prompt_logprobs, case)
    return choices


def _check_prompt(scores: list[Logprobs], case: Case) -> None:
    prompt = list(case.prompt.encode())
    assert [entry.token for entry in scores] == prompt
    assert [entry.logprob for entry in scores[1:]] == [score(state_of(prompt[:i]), prompt[i], 0).logprob for i in range(1, len(prompt))]


async def run_all(status: DeploymentStatus, asked: list[Case], disturb: Callable[[], T], *, enough: int) -> Run[T]:
    """Ask all at once, call ``disturb`` in a thread when the answers are ``enough`` tokens on their way, and wait for every answer."""
    arrivals = Arrivals(len(asked), enough)
    limits = httpx.Limits(max_connections=len(asked))

    def counter(index: int) -> Callable[[int], None]:
        timed = asked[index].plain or asked[index].door != "http"
        return lambda tokens: arrivals.add(index, tokens, timed=timed)

    async with (
        httpx.AsyncClient(base_url=status.url, timeout=ANSWER_S, limits=limits, trust_env=False) as http,
        AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as rpc,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(ask_http(http, case, counter(i)) if case.door == "http" else ask_rpc(rpc, case, counter(i)))
            for i, case in enumerate(asked)
        ]
        await asyncio.wait_for(arrivals.begun.wait(), ANSWER_S)
        verdict = await asyncio.to_thread(disturb)
    return Run([task.result() for task in tasks], arrivals, verdict)


def warm(status: DeploymentStatus) -> None:
    """A replica's first guided request pays for a process that tries grammars, and its mates wait: have every replica pay now."""
    body = {"max_tokens": 1, "temperature": 0.0, "guided_regex": "[a-z]{9}"}
    cases = [Case(prompt=f"warm {index}", body=body, door="rpc", plain=False) for index in range(12)]
    asyncio.run(run_all(status, cases, lambda: None, enough=1))


async def counts(status: DeploymentStatus) -> dict[str, int]:
    """The router's totals once nothing runs: what was cancelled is free too, and every block is back."""
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=status.url, trust_env=False) as http:
        for _ in range(400):
            found = (await http.get("/status")).json()
            living = [row for row in found["replicas"] if row["state"] == "ready"]
            idle = all(row["running"] == row["waiting"] == 0 and row["free_blocks"] == row["num_blocks"] for row in living)
            if idle and not found["running"]:
                return dict(found["counts"])
            await asyncio.sleep(0.05)
    raise AssertionError(f"sequences are left: {found}")
