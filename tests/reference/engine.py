"""Driving an engine to its end in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.protocol.engine import Engine, Fault, Finish
from workers.protocol.messages import GenerateTask, Logprobs, SamplingParams, Submit


@dataclass
class Stream:
    """All that an engine said of one row."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] | None = None
    end: Finish | Fault | None = None


def request(prompt: list[int], params: SamplingParams, *, id: int = 0, emitted: list[int] | None = None) -> Submit:
    return Submit(
        boot="test",
        stream=id,
        attempt=0,
        client="c",
        request_id=str(id),
        model="m",
        prompt_ids=prompt,
        task=GenerateTask(params=params, emitted=emitted or []),
    )


def drain(engine: Engine, streams: dict[int, Stream]) -> dict[int, Stream]:
    """Step until the engine has nothing to do; checks positions and that a row ends once."""
    while engine.busy():
        for emission in engine.step():
            stream = streams[emission.id]
            assert stream.end is None, "nothing follows the end"
            stream.tokens += emission.tokens
            stream.logprobs += emission.logprobs or []
            stream.prompt_logprobs = emission.prompt_logprobs or stream.prompt_logprobs
            stream.end = emission.end
    assert all(stream.end is not None for stream in streams.values())
    return streams


def serve(engine: Engine, requests: list[Submit]) -> list[Stream]:
    """Submit all at once and run to the end; the streams in order."""
    streams = {i: Stream() for i in range(len(requests))}
    for i, submit in enumerate(requests):
        engine.submit(i, submit)
    return list(drain(engine, streams).values())


def margin_violations(a: Stream, b: Stream, margin: float) -> list[tuple[int, float]]:
    """(position, gap) where greedy streams part although the best two log-probabilities were more than ``margin`` apart.

    Streams that part are not compared further: their prefixes differ. An allowed parting is printed, not hidden.
    """
    for position, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)):
        if x != y:
            top = a.logprobs[position].top_logprobs
            gap = top[0] - top[1]
            print(f"parted at {position}: top-1/top-2 gap {gap:.2e}")
            return [(position, gap)] if gap > margin else []
    assert len(a.tokens) == len(b.tokens)
    return []
