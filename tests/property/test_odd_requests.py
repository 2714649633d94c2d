"""Whatever can be decoded may be submitted: it runs or is refused, and costs the sequence beside it nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference.engine import Stream, request, serve
from tests.support.examples import examples
from tests.support.tiny_models import IM_END, tiny_model
from workers.engines.fake import FakeEngine
from workers.engines.portable import build
from workers.protocol.engine import Engine
from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec, SamplingParams, Submit, decode_to_replica, encode
from workers.protocol.specs import FakeOptions, FakeSpec, PortableSpec, ReplicaSpec
from workers.sampling.grammar_checker import compiler

VOCAB = 321
LIMITS = {"kv_tokens": 4096, "max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 256}
#: Steps within which an odd sequence and its mate must be done, whatever was asked.
STEPS = 400
GOOD = request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))

FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0, 2.0, 5e-324, 1e-320, 1e-40, 1e-6, 1e30, 1e308, math.nan, math.inf, -math.inf)
INTEGERS = (0, 1, -1, -100, 2, 20, 21, VOCAB - 1, VOCAB, 10**6, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
GUIDES = (
    ("json_schema", "["), ("json_schema", "null"), ("json_schema", "false"), ("json_schema", '{"$ref": "#"}'), ("json_schema", "[" * 60000),
    ("json_schema", '{"type": "string", "pattern": "(a{1000}){1000}"}'), ("json_schema", '{"type": "number", "multipleOf": 0}'),
    ("json", "anything"), ("regex", ""), ("regex", "("), ("regex", "(a{1,1000}){1,1000}"), ("regex", "(" * 30000 + "a" + ")" * 30000),
    ("regex", "(?=a)b"), ("grammar", ""), ("grammar", "start: start"), ("grammar", "start: " + "(" * 32000),
    ("grammar", "start: X\nX: /(a{1000}){1000}/"), ("choice", ""), ("choice", '[""]'), ("choice", '["\\ud83d"]'), ("choice", '{"a": 1}'),
)  # fmt: skip

floats, integers = st.sampled_from(FLOATS), st.sampled_from(INTEGERS)
fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": floats, "top_p": floats, "min_p": floats, "presence_penalty": floats, "frequency_penalty": floats,
    "repetition_penalty": floats, "top_k": integers, "seed": integers, "max_tokens": integers, "min_tokens": integers,
    "logprobs": st.none() | integers, "prompt_logprobs": st.none() | integers, "ignore_eos": st.booleans(),
    "logit_bias": st.none() | st.dictionaries(integers, floats, max_size=3), "stop_ids": st.lists(integers, max_size=3).map(tuple),
    "guide": st.integers(0, len(GUIDES) - 1),  # by its index: a text may be too long to print
}  # fmt: skip
#: Mostly a few odd fields on an ordinary request: of many, one hides the others.
params = st.lists(st.sampled_from(sorted(fields)), min_size=0, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
)
ids = st.lists(integers, max_size=3) | st.just([5] * 300) | st.just([7, 8, 9])


@pytest.fixture(scope="module", params=["fake", "portable"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tiny_model(tmp_path_factory.mktemp("model"), heads=9, kv_heads=3, vocab=VOCAB)
    if request.param == "fake":
        return FakeEngine(
            FakeSpec(**LIMITS, options=FakeOptions(fake_step_ms=0.0)),
            vocab_size=VOCAB,
            guides=compiler(folder / "tokenizer.json", VOCAB, (IM_END,)),
        )
    return build(ReplicaSpec(name="r", model="m", artifact=str(folder), engine=PortableSpec(**LIMITS)), None)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def number() -> Callable[[], int]:
    return iter(range(10**9)).__next__


def survives(engine: Engine, number: Callable[[], int], odd: Submit, expected: list[int]) -> None:
    odd_id, good_id = number(), number()
    streams = {odd_id: Stream(), good_id: Stream()}
    try:
        engine.submit(odd_id, odd)
    except Rejected:
        del streams[odd_id]
    engine.submit(good_id, GOOD)
    for _ in range(STEPS):
        for emission in engine.step():
            streams[emission.id].tokens += emission.tokens
            streams[emission.id].end = emission.end
        if not engine.busy():
            break
    assert all(stream.end is not None for stream in streams.values())
    assert streams[good_id].tokens == expected
    assert engine.stats().free_blocks == engine.capacity.num_blocks


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=params, prompt=ids, emitted=st.just([]) | ids)
def test_an_odd_request_runs_or_is_refused(
    engine: Engine, number: Callable[[], int], chosen: dict[str, Any], prompt: list[int], emitted: list[int]
) -> None:
    if "guide" in chosen:
        kind, text = GUIDES[chosen["guide"]]
        chosen = chosen | {"guide": GuideSpec(kind=kind, text=text)}
    odd = request(prompt, SamplingParams(**({"max_tokens": 4} | chosen)), emitted=emitted)
    try:
        decoded = decode_to_replica(encode(odd))
    except (Rejected, OverflowError):  # not even a message
        return
    assert isinstance(decoded, Submit)
    survives(engine, number, decoded, serve_once(engine))


@pytest.mark.parametrize("name", sorted(fields.keys() - {"guide", "logit_bias", "stop_ids", "ignore_eos"}))
def test_each_number_at_each_edge(engine: Engine, number: Callable[[], int], name: str) -> None:
    is_float = isinstance(getattr(SamplingParams(), name), float)
    for value in FLOATS if is_float else INTEGERS:
        for temperature in (0.0, 1.0):
            chosen = {"temperature": temperature, "max_tokens": 4, name: value}
            survives(engine, number, request([5, 6], SamplingParams(**chosen)), serve_once(engine))


@pytest.mark.parametrize(("kind", "text"), GUIDES, ids=range(len(GUIDES)))
def test_each_bad_grammar(engine: Engine, number: Callable[[], int], kind: Any, text: str) -> None:
    odd = request([5, 6], SamplingParams(max_tokens=6, guide=GuideSpec(kind=kind, text=text)))
    survives(engine, number, odd, serve_once(engine))


_expected: dict[int, list[int]] = {}


def serve_once(engine: Engine) -> list[int]:
    """What the good request gives alone."""
    if id(engine) not in _expected:
        _expected[id(engine)] = serve(engine, [GOOD])[0].tokens
    return _expected[id(engine)]
