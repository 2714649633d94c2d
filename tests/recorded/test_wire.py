"""Every message on a ZeroMQ socket, filled and as short as it may be, as the project's own encoder writes it.

A file holds the decoded msgpack (in the order of the wire) and the length of each frame; ``bytes`` are shown as ``{"bytes": text}``.
``constants.json`` has the protocol's number and limits, ``directions.json`` which messages each side takes. Record again:
``python -m tests.recorded.record wire``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from tests.recorded.recording import as_json, check, check_names
from workers.protocol import messages
from workers.protocol.specs import Quant, RouterAddress
from workers.protocol.status import EngineStats

AREA = "wire"
DIRECTIONS: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
    "to replica": (messages.ToReplica, messages.decode_to_replica),
    "from replica": (messages.FromReplica, messages.decode_from_replica),
    "from client": (messages.FromClient, messages.decode_from_client),
    "to client": (messages.ToClient, messages.decode_to_client),
}
GUIDE = messages.GuideSpec(kind="json_schema", text='{"type": "integer"}', whitespace=" ?")
SHORT_PARAMS = messages.SamplingParams()
PARAMS = messages.SamplingParams(
    temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.25, frequency_penalty=-0.25, repetition_penalty=1.5,
    logit_bias={65: 2.0, 300: -1.0}, allowed_token_ids=(5, 6), bad_words=((7,), (8, 9)), seed=2**62, max_tokens=100, min_tokens=2,
    stop_ids=(7, 258), ignore_eos=True, logprobs=2, prompt_logprobs=1, guide=GUIDE,
)  # fmt: skip
SHORT_CAPACITY = messages.Capacity(
    block_size=16, num_blocks=64, max_batch_size=8, max_num_tokens=256, max_seq_len=1024, vocab_size=320, tp=1, pp=1
)
CAPACITY = messages.Capacity(
    block_size=32, num_blocks=4096, max_batch_size=64, max_num_tokens=2048, max_seq_len=8192, vocab_size=49152, tp=4, pp=2, guided=False,
    max_logprobs=5, engine="trtllm", dtype="bf16", prefix_cache=False,
    quant=Quant(
        quant_algo="W4A16", kv_cache_quant_algo="FP8", group_size=64, has_zero_point=True, pre_quant_scale=True,
        exclude_modules=("lm_head",),
    ),
)  # fmt: skip
USAGE = messages.Usage(prompt_tokens=10, output_tokens=5, cached_tokens=3, preemptions=1)
SHORT_USAGE = messages.Usage(prompt_tokens=10, output_tokens=5)
FIRST, NEXT = messages.Logprobs(104, None, [], []), messages.Logprobs(105, -0.5, [105, 106], [-0.5, -1.5])

#: Tag of a message -> (filled, short).
MESSAGES: dict[str, tuple[Any, Any]] = {
    "submit": (
        messages.Submit(
            boot="b1", stream=3, attempt=1, client="alice", request_id="q1", model="m", prompt_ids=[104, 105],
            task=messages.GenerateTask(params=PARAMS, emitted=[72, 73], credit=256), salt="salt", deadline_ms=5000,
            marks=("x-1", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ),
        messages.Submit(
            boot="b1", stream=3, attempt=0, client="alice", request_id="q1", model="m", prompt_ids=[104],
            task=messages.GenerateTask(params=SHORT_PARAMS),
        ),
    ),
    "attach": (
        messages.Attach(boot="b1", stream=3, attempt=1, client="alice", request_id="q1", have=5, credit=256),
        messages.Attach(boot="b1", stream=3, attempt=1, client="alice", request_id="q1", have=0),
    ),
    "cancel": (messages.Cancel(boot="b1", stream=3, attempt=1), messages.Cancel(boot="b1", stream=3)),
    "credit": (messages.Credit(boot="b1", streams=[3, 4], tokens=[10, 20]), messages.Credit(boot="b1", streams=[], tokens=[])),
    "router_heartbeat": (
        messages.RouterHeartbeat(
            boot="b1", router="router0",
            routers=(
                RouterAddress(endpoint="tcp://127.0.0.1:8200", server_key="k" * 40),
                RouterAddress(endpoint="tcp://[::1]:8201", server_key="l" * 40),
            ),
            keys=[messages.KeyUse("0123456789ab", 3, 1500, 700, 1)],
        ),
        messages.RouterHeartbeat(boot="b1", router="router0"),
    ),
    "hello": (
        messages.Hello(
            boot="b2", protocol=messages.PROTOCOL, replica="a", model="m", epoch=2**50, resume="margin", capacity=CAPACITY,
        ),
        messages.Hello(
            boot="b2", protocol=messages.PROTOCOL, replica="a", model="m", epoch=1, resume="bitwise", capacity=SHORT_CAPACITY
        ),
    ),
    "accepted": (
        messages.Accepted(boot="b2", stream=3, attempt=1, seed=9, prompt_ids=[104, 105], prompt_tokens=2),
        messages.Accepted(boot="b2", stream=3, attempt=0),
    ),
    "heartbeat": (
        messages.Heartbeat(
            boot="b2", step=100, busy_ms=1.5, predicted_ms=2.5, draining=True,
            keys=[messages.KeyUse("0123456789ab", 2, 800, 0, 3), messages.KeyUse("ba9876543210", 1, 40, 10, 2)],
            stats=EngineStats(
                running=3, waiting=2, free_blocks=10, prefill_tokens=128, step_ms=2.25, prompt_tokens_total=1000, output_tokens_total=500,
                prefix_queries_total=40, prefix_hits_total=20, preemptions_total=1,
                step_tokens=[1] * (len(messages.STEP_TOKEN_BUCKETS) + 1), step_tokens_total=1500, prefixes=[1, 2**63],
            ),
        ),
        messages.Heartbeat(boot="b2", step=0, busy_ms=0.0, predicted_ms=0.0, stats=EngineStats(free_blocks=64)),
    ),
    "tokens": (
        messages.Tokens(
            boot="b2", streams=[3, 4], attempts=[0, 1], firsts=[0, 5], tokens=[[105], [106, 107]], logprobs=[[NEXT], None],
            prompt_logprobs=[(3, [FIRST, NEXT])], cached=[(9, 16)], texts=["i", "jk"], choices=[0, 1],
        ),
        messages.Tokens(boot="b2", streams=[], attempts=[], firsts=[], tokens=[]),
    ),
    "done": (
        messages.Done(boot="b2", stream=3, attempt=1, reason="length", usage=USAGE, stop_id=258, choice=1, text="tail"),
        messages.Done(boot="b2", stream=3, attempt=0, reason="stop", usage=SHORT_USAGE),
    ),
    "failed": (
        messages.Failed(
            boot="b2", stream=3, attempt=1, code="overloaded", message="full", retry_after=1.5, param="prompt", choice=1
        ),
        messages.Failed(boot="b2", stream=3, attempt=0, code="engine_fault", message=""),
    ),
    "bye": (messages.Bye(boot="b2", reason="stale"), messages.Bye(boot="b2", reason="")),
    "generate": (
        messages.Generate(
            boot="b3", stream=1, request_id="q1", endpoint="chat", body=b'{"model":"m"}', attempt=1, credit=256, deadline_ms=5000,
            texts=False, journal=messages.Journal(prompt_ids=[104, 105], seed=9, emitted=[[72], []]),
        ),
        messages.Generate(boot="b3", stream=1, request_id="q1", endpoint="completions", body=b""),
    ),
    "query": (messages.Query(boot="b3", stream=1, what="story", about="cmpl-1"), messages.Query(boot="b3", stream=1, what="models")),
    "report": (messages.Report(boot="b1", stream=1, body=b'{"router":"router0"}'), messages.Report(boot="b1", stream=1, body=b"")),
}  # fmt: skip
CONSTANTS, TAKEN = "constants.json", "directions.json"
NAMES = [*(f"{tag}.json" for tag in MESSAGES), CONSTANTS, TAKEN]


def tags(union: Any) -> list[str]:
    return [str(kind.__struct_config__.tag) for kind in get_args(union)]


def decoded(frame: bytes) -> dict[str, Any]:
    """The frame as any reader of msgpack sees it."""
    return {"length": len(frame), "decoded": readable(msgspec.msgpack.decode(frame, strict=False))}


def readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.decode()}
    if isinstance(value, dict):
        return {key: readable(inner) for key, inner in value.items()}
    return [readable(inner) for inner in value] if isinstance(value, list | tuple) else value


def recordings() -> dict[str, str]:
    frames = {
        f"{tag}.json": {"filled": decoded(messages.encode(full)), "short": decoded(messages.encode(short))}
        for tag, (full, short) in MESSAGES.items()
    }
    constants = {
        "PROTOCOL": messages.PROTOCOL, "MAX_FRAME": messages.MAX_FRAME, "HIGH_WATER": messages.HIGH_WATER, "UNLIMITED": messages.UNLIMITED,
        "STEP_TOKEN_BUCKETS": list(messages.STEP_TOKEN_BUCKETS),
    }  # fmt: skip
    taken = {name: tags(union) for name, (union, _) in DIRECTIONS.items()}
    return {name: as_json(value) for name, value in {**frames, CONSTANTS: constants, TAKEN: taken}.items()}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_the_message_is_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_every_message_is_recorded() -> None:
    assert MESSAGES.keys() == {tag for union, _ in DIRECTIONS.values() for tag in tags(union)}
    check_names(AREA, NAMES)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_was_written_is_read_again(direction: str) -> None:
    union, decode = DIRECTIONS[direction]
    for tag, pair in MESSAGES.items():
        for message in pair:
            if tag in tags(union):
                assert decode(messages.encode(message)) == message
            else:
                with pytest.raises(messages.Malformed):
                    decode(messages.encode(message))


@pytest.mark.parametrize("tag", MESSAGES)
def test_the_filled_message_has_every_field(tag: str) -> None:
    """So that a new field without a recording fails. Structs inside of it too."""
    full, _ = MESSAGES[tag]
    for struct in structs(full):
        written = msgspec.to_builtins(struct)
        if isinstance(written, dict):
            absent = set(struct.__struct_encode_fields__) - written.keys()
            assert not absent, f"{type(struct).__name__} has no value for {absent}"
        for field in msgspec.structs.fields(struct):
            if field.default is not msgspec.NODEFAULT:
                assert getattr(struct, field.name) != field.default, f"{type(struct).__name__}.{field.name} has its default"


def structs(value: Any) -> list[Any]:
    """The struct itself and those in its fields."""
    if isinstance(value, msgspec.Struct):
        return [value, *(inner for field in value.__struct_fields__ for inner in structs(getattr(value, field)))]
    return [inner for part in value for inner in structs(part)] if isinstance(value, list | tuple) else []
