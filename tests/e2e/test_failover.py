"""A replica's death, hang or drain is a pause: requests of every kind go on elsewhere, exact to the token, the text and the logprob."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from orchestrator.client import AsyncClient
from orchestrator.launch.control import Control, Status
from tests.e2e.deployment import MODEL, deployed, wait_for_state, write_config
from tests.tiny import tiny_model
from workers.engine.guided import guide_factory
from workers.fake import BYTES, BYTES_EOS, expected_tokens, score, state_of
from workers.wire import GuideSpec, Logprobs, SamplingParams

OUTPUT = 120
#: Tokens that clients hold together before something happens.
BEGUN = 300
ADMISSION = {"replica_limit": 100}
REGEX = "([a-z]{7} ){13,14}"
SCHEMA = '{"type": "array", "items": {"enum": ["alpha", "beta", "gamma"]}, "minItems": 12, "maxItems": 14}'


class Choice(msgspec.Struct):
    """What one choice is, or should be. Ids are printable bytes, so text and ids are the same thing."""

    tokens: list[int] = []
    text: str = ""
    reason: str = ""
    logprobs: list[float] = []


class Case(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    body: dict[str, Any]
    params: SamplingParams
    door: str
    guide: GuideSpec | None = None

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))


class Progress:
    """Tokens that reached clients, over all; ``begun``: enough of them."""

    def __init__(self) -> None:
        self._tokens = 0
        self.begun = asyncio.Event()

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        if self._tokens >= BEGUN:
            self.begun.set()


def cases() -> list[Case]:
    """Every kind over every door. A stop string is four of the oracle's own bytes, so it is always split over chunks."""
    found = []
    for index, door in enumerate(("http", "rpc", "rpc ids")):
        for copy in range(2):
            seed = 100 * index + 10 * copy

            def add(name: str, guide: GuideSpec | None = None, *, temperature: float = 0.0, **body: Any) -> None:
                params = SamplingParams(max_tokens=OUTPUT, temperature=temperature, seed=seed, stop_ids=BYTES_EOS)  # noqa: B023
                common = {"max_tokens": OUTPUT, "temperature": temperature, "seed": seed}  # noqa: B023
                prompt = f"{name} over {door}, copy {copy}"  # noqa: B023
                found.append(Case(prompt=prompt, body=common | body, params=params, door=door, guide=guide))  # noqa: B023

            add("seeded", temperature=0.9)
            add("two", n=2, temperature=0.7)
            add("scored", logprobs=2)
            add("regex", GuideSpec(kind="regex", text=REGEX), guided_regex=REGEX)
            add("schema", GuideSpec(kind="json_schema", text=SCHEMA), guided_json=SCHEMA)
            if door != "rpc ids":
                add("echo", echo=True, logprobs=0)
                whole = bytes(
                    expected_tokens(f"stopped over {door}, copy {copy}".encode(), SamplingParams(max_tokens=OUTPUT, temperature=0))
                )
                add("stopped", stop=[whole[80:84].decode(), "never"])
    return found


def expected(case: Case, folder: Path) -> list[Choice]:
    prompt = list(case.prompt.encode())
    choices = []
    for index in range(case.n):
        params = msgspec.structs.replace(case.params, seed=case.params.seed + index)
        guide = guide_factory(folder / "tokenizer" / "tokenizer.json", BYTES, BYTES_EOS)(case.guide) if case.guide is not None else None
        tokens = expected_tokens(prompt, params, guide=guide, eos_ids=BYTES_EOS)
        reason = "length" if len(tokens) == OUTPUT and not (guide is not None and guide.done()) else "stop"
        text = bytes(tokens).decode()
        for stop in case.body.get("stop", ()):
            if (at := text.find(stop)) >= 0:
                tokens, text, reason = tokens[: at + len(stop)], text[:at], "stop"
        scores = [score(state_of(prompt + tokens[:i]), token, 0).logprob or 0.0 for i, token in enumerate(tokens)]
        choices.append(Choice(tokens=tokens, text=text, reason=reason, logprobs=scores if "logprobs" in case.body else []))
    return choices


async def ask_http(client: httpx.AsyncClient, case: Case, progress: Progress) -> list[Choice]:
    """The streamed answer; its ids are the bytes of its text, less a stop string."""
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
                    assert shown["logprobs"]["text_offset"] == [len(choice.logprobs) + i for i in range(len(shown["logprobs"]["tokens"]))]
                    choice.logprobs += shown["logprobs"]["token_logprobs"]
                progress.add(len(shown["text"]))
    assert done == 1
    if case.body.get("echo"):
        (choice,) = choices
        assert choice.text.startswith(case.prompt) and choice.logprobs[0] is None
        assert len(choice.logprobs) == len(choice.text)
        choice.text, choice.logprobs = choice.text[len(case.prompt) :], choice.logprobs[len(case.prompt) :]
    assert usage["prompt_tokens"] == len(case.prompt)
    for choice in choices:
        choice.tokens = list(choice.text.encode())
    stop = len(case.body["stop"][0]) if "stop" in case.body else 0
    assert usage["completion_tokens"] == sum(len(choice.tokens) for choice in choices) + stop
    return choices


async def ask_rpc(client: AsyncClient, case: Case, progress: Progress) -> list[Choice]:
    call = client.complete(case.prompt, texts=case.door == "rpc", **case.body)
    choices = [Choice() for _ in range(case.n)]
    async for piece in call.stream():
        choice = choices[piece.choice]
        assert piece.first == len(choice.tokens) and not choice.reason, "a gap, a repeat, or something after the end"
        choice.tokens = choice.tokens + piece.tokens
        choice.text += piece.text
        choice.logprobs = choice.logprobs + [entry.logprob or 0.0 for entry in piece.logprobs or ()]
        choice.reason = piece.finish_reason or ""
        progress.add(len(piece.tokens))
    reply = await call.result()
    assert reply.attempts == 0, "the door lived: it is the router that goes on"
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


async def run_all(status: Status, asked: list[Case], disturb: Callable[[], None] | None = None) -> list[list[Choice]]:
    """Ask all at once; ``disturb`` when the answers are well under way."""
    progress = Progress()
    limits = httpx.Limits(max_connections=len(asked))
    async with (
        httpx.AsyncClient(base_url=status.url, timeout=120, limits=limits, trust_env=False) as http,
        AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as rpc,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(ask_http(http, case, progress) if case.door == "http" else ask_rpc(rpc, case, progress)) for case in asked
        ]
        if disturb is not None:
            await asyncio.wait_for(progress.begun.wait(), 60)
            await asyncio.to_thread(disturb)
    return [task.result() for task in tasks]


async def counts(status: Status) -> dict[str, int]:
    """The router's totals once nothing runs: what was cancelled is free too."""
    async with httpx.AsyncClient(base_url=status.url, trust_env=False) as http:
        for _ in range(400):
            found = (await http.get("/status")).json()
            if not found["running"] and all(row["running"] == row["waiting"] == 0 for row in found["replicas"]):
                return dict(found["counts"])
            await asyncio.sleep(0.05)
    raise AssertionError(f"rows are left: {found}")


@pytest.fixture(scope="module")
def up() -> Iterator[tuple[Control, Status, Path]]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        changes = {"hang_floor_s": 2.0, "drain_grace_s": 0.2, "admission": ADMISSION}
        with deployed(write_config(Path(folder), deployment=changes, max_batch_size=32)) as (control, status):
            yield control, status, Path(folder)


def _signal(control: Control, replica: str, rank: int, number: signal.Signals) -> None:
    rows = {row.name: row for model in control.status().models for row in model.rows}
    os.kill(next(pid for r, _, pid in rows[replica].pids if r == rank), number)


def _busiest(status: Status) -> str:
    """The replica that runs most rows now: a grammar being compiled may hold one of them up while the other finishes."""
    rows = httpx.get(f"{status.url}/status", trust_env=False).json()["replicas"]
    return str(max(rows, key=lambda row: int(row["rows"]))["name"])


#: What happens -> what does it. The victims alternate, so that none is in back-off for long.
DISTURBANCES: dict[str, Callable[[Control], None]] = {
    "leader killed": lambda control: _signal(control, "left", 0, signal.SIGKILL),
    "other rank killed": lambda control: _signal(control, "right", 1, signal.SIGKILL),
    "other rank stopped": lambda control: _signal(control, "left", 1, signal.SIGSTOP),
    "leader stopped": lambda control: _signal(control, "right", 0, signal.SIGSTOP),
    "drained": lambda control: control.drain("left"),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_requests_of_every_kind_go_on_exactly(up: tuple[Control, Status, Path], what: str) -> None:
    control, _, folder = up
    status = wait_for_state(control, "READY", 90)
    before, asked = asyncio.run(counts(status)), cases()
    answers = asyncio.run(run_all(status, asked, lambda: DISTURBANCES[what](control)))
    for case, answer in zip(asked, answers, strict=True):
        for choice, want in zip(answer, expected(case, folder), strict=True):
            if case.door == "rpc ids":
                want.text = ""
            if case.door == "http":
                want.tokens = list(want.text.encode())
            assert choice == want, f"{case.prompt!r}, {what}"
    after = asyncio.run(counts(status))
    assert after["resubmitted"] > before["resubmitted"], "it hit nobody: the test proved nothing"
    assert after["failed"] == before["failed"] and after["gaps"] == before["gaps"]


def test_the_portable_engine_goes_on_bit_by_bit() -> None:
    """Fixed shapes on one layout are ``resume: bitwise``: killed or not, greedy, sampled and guided answers are equal."""
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as name:
        folder = Path(name)
        model = tiny_model(folder / "tiny", max_position=1024)
        file = write_config(
            folder, deployment={"cache_dir": str(folder / "cache"), "admission": ADMISSION}, path=str(model), engine="portable",
            fixed_shape=True, max_seq_len=1024, kv_tokens=16384, max_num_tokens=64, replicas=[{"name": "left"}, {"name": "right"}],
        )  # fmt: skip
        with deployed(file) as (control, status):
            asked = [
                Case(
                    prompt=f"request {index}",
                    body={"max_tokens": 900, "temperature": index % 2 * 0.9, "seed": index, "ignore_eos": True} | extra,
                    params=SamplingParams(),
                    door="rpc",
                )
                for index, extra in enumerate(
                    ({}, {}, {"n": 2}, {"logprobs": 1}, {"guided_regex": "[a-z ]{300}"}, {"presence_penalty": 1.5})
                )
            ]
            undisturbed = asyncio.run(run_all(status, asked))
            again = asyncio.run(run_all(status, asked, lambda: _signal(control, _busiest(status), 0, signal.SIGKILL)))
            found = asyncio.run(counts(status))
            assert found["resubmitted"] > 0, "it hit nobody: the test proved nothing"
            assert again == undisturbed
