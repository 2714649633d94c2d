"""The wire codec: what it carries, and what it refuses."""

from __future__ import annotations

import contextlib
import datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.protocol import messages
from workers.protocol.errors import EngineFault, NotFound, TriremeError, from_code
from workers.protocol.specs import ConfigError, Parallel, PortableSpec, ReplicaSpec, uniform_decoder

SUBMIT = messages.Submit(
    boot="b",
    stream=7,
    attempt=2,
    client="c",
    request_id="r",
    model="m",
    prompt_ids=[1, 2],
    task=messages.GenerateTask(params=messages.SamplingParams(seed=5), emitted=[9]),
)
DONE = messages.Done(boot="b", stream=1, attempt=1, reason="stop", usage=messages.Usage(prompt_tokens=1, output_tokens=1))
ids = st.integers(min_value=0, max_value=2**31 - 1)


def test_a_submit_survives_the_wire() -> None:
    assert messages.decode_to_replica(messages.encode(SUBMIT)) == SUBMIT


@given(st.lists(st.tuples(ids, ids, ids, st.lists(ids, max_size=5)), max_size=20))
def test_tokens_survive_the_wire(rows: list[tuple[int, int, int, list[int]]]) -> None:
    message = messages.Tokens(
        boot="b", streams=[r[0] for r in rows], attempts=[r[1] for r in rows], firsts=[r[2] for r in rows], tokens=[r[3] for r in rows]
    )
    assert messages.decode_from_replica(messages.encode(message)) == message


def test_an_unknown_field_is_ignored() -> None:
    raw = msgspec.msgpack.decode(messages.encode(SUBMIT))
    raw["from_the_future"] = [1, {"a": 2}]
    assert messages.decode_to_replica(msgspec.msgpack.encode(raw)) == SUBMIT


def _with(**changes: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(messages.encode(SUBMIT)) | changes)


BAD = {
    "empty": b"",
    "random bytes": b"\xc1\xff\x00\x9d" * 8,
    "truncated": messages.encode(SUBMIT)[:-1],
    "trailing bytes": messages.encode(SUBMIT) + b"\x00",
    "deep nesting": b"\x91" * 100_000,
    "oversized claim": b"\xdd\xff\xff\xff\xff",
    "ext type": _with(boot=msgspec.msgpack.Ext(1, b"x")),
    "timestamp": _with(boot=datetime.datetime.now(datetime.UTC)),
    "bin for str": _with(boot=b"b"),
    "string for int": _with(stream="7"),
    "float for int": _with(stream=7.5),
    "bool for int": _with(stream=True),
    "unknown tag": _with(type="exec"),
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    "other direction": messages.encode(DONE),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_malformed(name: str) -> None:
    with pytest.raises(messages.Malformed):
        messages.decode_to_replica(BAD[name])


@given(st.binary(max_size=200))
def test_noise_never_escapes_as_another_error(noise: bytes) -> None:
    for decode in (messages.decode_to_replica, messages.decode_from_replica, messages.decode_from_client, messages.decode_to_client):
        with contextlib.suppress(messages.Malformed):
            decode(noise)


def test_error_codes_come_back_as_their_class() -> None:
    def leaves(cls: type[TriremeError]) -> list[type[TriremeError]]:
        return [cls] + [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]

    for cls in leaves(TriremeError):
        if cls.__module__ == "workers.protocol.errors" and cls is not TriremeError:
            assert type(from_code(cls.code, "x")) is cls
    assert type(from_code("model_not_found", "x")) is NotFound
    assert type(from_code("never heard of", "x")) is EngineFault


def test_specs_refuse_what_cannot_mean_anything() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 3, "num_kv_heads": 2, "head_dim": 4, "vocab_size": 8}
    with pytest.raises(ConfigError, match="cannot share"):
        uniform_decoder(architecture="llama", max_position=8, **shape)
    good = uniform_decoder(architecture="llama", max_position=8, **(shape | {"num_kv_heads": 3}))
    Parallel(tp=3, pp=2).check(good)
    with pytest.raises(ConfigError, match="query heads"):
        Parallel(tp=4).check(good)
    with pytest.raises(ConfigError, match="layers"):
        Parallel(pp=3).check(good)
    with pytest.raises(ConfigError, match="max_num_tokens"):
        PortableSpec(max_batch_size=64, max_num_tokens=32)
    with pytest.raises(ConfigError):
        ReplicaSpec(name="a/b", model="m", artifact="x")


def test_rank_order_is_stage_major() -> None:
    layout = Parallel(tp=2, pp=3)
    assert [(layout.pp_rank(r), layout.tp_rank(r)) for r in range(layout.world)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_what_a_replica_says_is_whole_or_refused() -> None:
    whole = messages.Tokens(boot="b", streams=[1, 2], attempts=[1, 1], firsts=[0, 0], tokens=[[1], [2]])
    assert messages.decode_from_replica(messages.encode(whole)) == whole
    for column, short in (("attempts", [1]), ("firsts", [0]), ("tokens", [[1]]), ("logprobs", [None])):
        fields = msgspec.msgpack.decode(messages.encode(whole)) | {column: short}
        with pytest.raises(messages.Malformed):
            messages.decode_from_replica(msgspec.msgpack.encode(fields))
    capacity = messages.Capacity(block_size=1, num_blocks=1, max_batch_size=1, max_num_tokens=1, max_seq_len=1, vocab_size=1, tp=1, pp=1)
    hello = messages.Hello(boot="b", protocol=messages.PROTOCOL, replica="r", model="m", epoch=1, resume="valid", capacity=capacity)
    for size in (0, -1, 2**31):
        fields = msgspec.msgpack.decode(messages.encode(hello))
        fields["capacity"]["block_size"] = size
        with pytest.raises(messages.Malformed):
            messages.decode_from_replica(msgspec.msgpack.encode(fields))
