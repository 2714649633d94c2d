"""F30 and friends on FakeEngine: requests of every kind go on elsewhere, exact to the token, the text and the logprob."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.stage import HANG_S, NEXT_TOKEN_S, Healed, Stage, Strike, staged
from tests.faults.streams import Case, Choice, counts, run_all
from tests.support.figures import figure
from workers.engines.fake import BYTES, BYTES_EOS, expected_tokens, score, state_of
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.sampling.llguidance_guide import guide_factory

pytestmark = pytest.mark.mpi
OUTPUT = 120
#: Tokens that clients hold together before something happens.
BEGUN = 300
REGEX = "([a-z]{7} ){13,14}"
SCHEMA = '{"type": "array", "items": {"enum": ["alpha", "beta", "gamma"]}, "minItems": 12, "maxItems": 14}'


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
        params = SamplingParams(
            max_tokens=OUTPUT, temperature=case.params.temperature, seed=case.params.seed + index, stop_ids=case.params.stop_ids
        )
        guide = guide_factory(folder / "tokenizer" / "tokenizer.json", BYTES, BYTES_EOS)(case.guide) if case.guide is not None else None
        tokens = expected_tokens(prompt, params, guide=guide, eos_ids=BYTES_EOS)
        reason = "length" if len(tokens) == OUTPUT and not (guide is not None and guide.done()) else "stop"
        text = bytes(tokens).decode()
        for stop in case.body.get("stop", ()):
            if (at := text.find(stop)) >= 0:
                tokens, text, reason = tokens[: at + len(stop)], text[:at], "stop"
        scores = [score(state_of(prompt + tokens[:i]), token, 0).logprob or 0.0 for i, token in enumerate(tokens)]
        choice = Choice(tokens=tokens, text=text, reason=reason, logprobs=scores if "logprobs" in case.body else [])
        if case.door == "rpc ids":
            choice.text = ""
        if case.door == "http":
            choice.tokens = list(choice.text.encode())
        choices.append(choice)
    return choices


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(max_batch_size=64, max_num_tokens=256, deployment={"drain_grace_s": 0.2}) as stage:
        yield stage


def drain(stage: Stage) -> float:
    at = time.monotonic()
    stage.control.drain("left")
    return at


def kill(replica: str, rank: int, number: signal.Signals) -> Callable[[Stage], Healed]:
    return lambda stage: stage.heal(stage.strike(replica, stage.pid(replica, rank), number))


#: What happens -> what does it, how it is noticed and what its clients may wait. The victims alternate: none is in back-off for long.
FAULTS: dict[str, tuple[Callable[[Stage], Healed], float, float]] = {
    "F05 leader killed": (kill("left", 0, signal.SIGKILL), 0.5, NEXT_TOKEN_S),
    "F01 rank killed": (kill("right", 1, signal.SIGKILL), 0.5, NEXT_TOKEN_S),
    "F03 rank stopped": (kill("left", 1, signal.SIGSTOP), HANG_S, HANG_S),
    "F05 leader stopped": (kill("right", 0, signal.SIGSTOP), 1.5, HANG_S),
}


def check(stage: Stage, answers: list[list[Choice]], what: str) -> None:
    for case, answer in zip(cases(), answers, strict=True):
        assert answer == expected(case, stage.folder), f"{case.prompt!r}, {what}"


@pytest.mark.parametrize("what", FAULTS)
def test_requests_of_every_kind_go_on_exactly(stage: Stage, what: str) -> None:
    disturb, detection, next_token = FAULTS[what]
    status = stage.ready()
    before = asyncio.run(counts(status))
    run = asyncio.run(run_all(status, cases(), lambda: disturb(stage), enough=BEGUN))
    check(stage, run.answers, what)
    after = asyncio.run(counts(status))
    assert after["resubmitted"] > before["resubmitted"], "it hit nobody: the test proved nothing"
    assert after["failed"] == before["failed"] and after["gaps"] == before["gaps"]
    strike: Strike = run.verdict.strike
    run.verdict.figures(
        f"{what}, every kind of request (fake engine)",
        run.arrivals.pause(strike.at, strike.lost),
        detection=detection,
        next_token=next_token,
    )


def test_a_drained_replicas_requests_move_exactly(stage: Stage) -> None:
    """F27: what is not done within the grace goes on elsewhere, and the replica comes back."""
    status = stage.ready()
    old, before = stage.row("left"), asyncio.run(counts(status))
    run = asyncio.run(run_all(status, cases(), lambda: drain(stage), enough=BEGUN))
    check(stage, run.answers, "drained")
    after = asyncio.run(counts(status))
    assert after["resubmitted"] > before["resubmitted"] and after["replicas_lost"] > before["replicas_lost"]
    assert after["failed"] == before["failed"] and after["gaps"] == before["gaps"]
    figure("F27 drain -> next token at the client", run.arrivals.pause(run.verdict, run.verdict + 2.0), NEXT_TOKEN_S)
    stage.ready()
    assert stage.row("left").epoch > old.epoch and stage.row("left").restarts == old.restarts, "a drain is no failure"
