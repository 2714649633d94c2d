"""One stream with the default model: the replica that runs it is killed in the middle, and the figures are printed.

Its resume class is margin: tokens that differ from an undisturbed run are counted, and each must be a near tie there.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrator.client import AsyncClient
from tests.faults.stage import Healed, Stage, staged
from tests.faults.streams import Arrivals
from tests.reference.default_model import NAME, artifact
from tests.support.deployment import MODEL
from tests.support.figures import lines

pytestmark = [pytest.mark.mpi, pytest.mark.model, pytest.mark.long, pytest.mark.timeout(900)]
PROMPT = "Once upon a time, in a village by the sea, there lived a fisherman who had three daughters. " * 4
OUTPUT, KILL_AT = 96, 32
#: Natural-log distance between the two best tokens below which rounding may choose either.
NEAR = 1e-2


async def ask(stage: Stage, disturb: bool) -> tuple[list[int], list[float], Arrivals, Healed | None]:
    """(tokens, distance of the two best at each, arrivals, the replica's fate)."""
    arrivals = Arrivals(1, KILL_AT)
    async with AsyncClient([address.endpoint for address in stage.status.rpc], model=MODEL) as client:
        call = client.complete(PROMPT, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, logprobs=2)
        tokens: list[int] = []
        gaps: list[float] = []
        healing: asyncio.Future[Healed] | None = None

        def strike() -> Healed:
            name = next(row["name"] for row in stage.router()["replicas"] if row["choices"])
            return stage.heal(stage.strike(name, stage.pid(name, 0)))

        async for piece in call.stream():
            assert piece.first == len(tokens), "a gap or a repeat"
            tokens += piece.tokens
            gaps += [entry.top_logprobs[0] - entry.top_logprobs[1] for entry in piece.logprobs or ()]
            arrivals.add(0, len(piece.tokens))
            if disturb and healing is None and arrivals.begun.is_set():
                healing = asyncio.ensure_future(asyncio.to_thread(strike))
        return tokens, gaps, arrivals, None if healing is None else await healing


def test_a_stream_of_the_default_model_goes_on() -> None:
    artifact()
    cache = str(Path.home() / ".cache" / "trireme")
    with staged(path=NAME, engine="portable", replicas=2, kv_tokens=4096, max_seq_len=1024, deployment={"cache_dir": cache}) as stage:
        whole, gaps, quiet, _ = asyncio.run(ask(stage, disturb=False))
        tokens, _, arrivals, healed = asyncio.run(ask(stage, disturb=True))
    assert healed is not None and len(tokens) == OUTPUT
    strike = healed.strike
    parted = next((at for at, (a, b) in enumerate(zip(whole, tokens, strict=True)) if a != b), None)
    times = quiet.times[0]
    flips = "none" if parted is None else f"1 (token {parted}, distance {gaps[parted]:.1e})"
    lines.append(
        f"default model, fp32, one stream of {(len(times) - 1) / (times[-1] - times[0]):.1f} tok/s: killed -> detection "
        f"{strike.detection:.2f} s, next token {arrivals.pause(strike.at, strike.lost):.2f} s, "
        f"replica ready {healed.ready - strike.at:.1f} s; margin flips: {flips}"
    )
    assert parted is None or gaps[parted] < NEAR, "it parted where the choice was clear"
