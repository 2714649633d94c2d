"""The RPC table against a real router, by an authenticated peer: what is no message is answered as malformed, what asks for the
impossible as HTTP would, and others never notice.
"""

from __future__ import annotations

import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tests.inputs.table import IDS, ROWS, Row
from tests.inputs.world import CHAT, PATIENCE_S, World, growth, text
from tests.support.figures import crowd, figure
from tests.support.gang import wait_for
from tests.support.rpc_peer import Peer
from workers.protocol import messages
from workers.protocol.messages import (
    MAX_FRAME,
    UNLIMITED,
    Accepted,
    Cancel,
    Credit,
    Done,
    Failed,
    Report,
    Tokens,
)

pack = msgspec.msgpack.encode


@pytest.fixture
def peer(world: World) -> Iterator[Peer]:
    made = Peer(world)
    yield made
    made.close()
    world.good_rpc()


class _Canary:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._path),)


def junk(canary: Path) -> list[tuple[str, bytes]]:
    """What is no message, by the number of its row."""
    good = messages.encode(Cancel(boot="x", stream=1))
    fields = {"type": "cancel", "boot": "x", "stream": 1}
    objects = np.array([_Canary(canary)], dtype=object)
    return [
        ("R1", b""),
        ("R5", os.urandom(100)),
        ("R5", b"\x00"),
        ("R5", b"\xc1"),
        ("R5", b"\xdb\xff\xff\xff\xff"),
        ("R5", b"\xdd\xff\xff\xff\xff"),
        ("R7", good + b"\x00"),
        ("R7", good[:-1]),
        ("R8", b"\x91" * 100_000),
        ("R8", b"\x81\xa1a" * 100_000),
        ("R8", pack(fields)[:-1] + b"\x91" * 100_000),
        ("R10", pack({**fields, "stream": msgspec.msgpack.Ext(5, b"x")})),
        ("R10", b"\xd6\xff\x00\x00\x00\x00"),
        ("R10", pack({**fields, "boot": b"x"})),
        ("R11", pickle.dumps(_Canary(canary))),
        ("R11", pickle.dumps(_Canary(canary), protocol=0)),
        ("R11", pickle.dumps(_Canary(canary), protocol=5)),
        ("R11", pickle.dumps(objects)),
        ("R11", pack({**fields, "boot": pickle.dumps(_Canary(canary))})),
        ("R12", pack({**fields, "type": "frobnicate"})),
        ("R12", pack({key: value for key, value in fields.items() if key != "type"})),
        ("R12", pack({**fields, "stream": "one"})),
        ("R12", pack({**fields, "stream": 1.5})),
        ("R12", pack({**fields, "stream": None})),
        ("R12", pack([fields])),
        ("R12", messages.encode(Cancel(boot="x", stream=1)).replace(b"boot", b"b\xffot")),
    ]


def test_what_is_no_message(world: World, peer: Peer, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    rows = junk(canary)
    slowest = 0.0
    with growth(world.keyed.process.pid) as grown:
        for number, frame in rows:
            started = time.monotonic()
            answer = peer.failure(frame)
            slowest = max(slowest, time.monotonic() - started)
            assert answer.code == "malformed" and answer.message.isprintable() and len(answer.message) < 300, number
        for frames in ([b"a"] * 2, [b""] * 3, [b"a"] * 1000):
            assert peer.failure(*frames).code == "malformed", "R3"
    figure("RPC table: slowest answer to what is no message", slowest, 1.0)
    figure("RPC table: memory that it left behind", max(0.0, grown[0]), 5.0, "MB")
    assert not canary.exists()
    counted = world.client.status()["rpc"]["malformed"]
    assert counted >= len(rows) + 3


def test_unknown_fields_are_ignored(peer: Peer) -> None:
    peer.send(pack({"type": "query", "boot": peer.boot, "stream": 3, "what": "models", "flux": [1, {"a": None}], "version": 99}))
    answer = peer.hear()
    assert isinstance(answer, Report) and answer.stream == 3


def test_a_frame_that_is_too_large_ends_the_connection_and_nothing_else(world: World, peer: Peer) -> None:
    peer.event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    with growth(world.keyed.process.pid) as grown:
        peer.send(bytes(MAX_FRAME + 1))
        peer.event(zmq.EVENT_DISCONNECTED)
        world.good_rpc()
        peer.event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        peer.answers()
    figure("R4 a frame that is too large: memory", max(0.0, grown[0]), 20.0, "MB")


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_validator_is_that_of_http(world: World, peer: Peer, row: Row) -> None:
    """R13: the same limits, and the same words."""
    over_http = world.post(row.path, content=row.content, headers={"content-type": "application/json"}).json()["error"]
    endpoint = "chat" if row.path == CHAT else "completions"
    peer.tell(peer.generate(1, secrets.token_hex(4), endpoint=endpoint, body=row.content))
    answer = peer.failed()
    assert (answer.code, answer.message, answer.param) == (over_http["code"], over_http["message"], over_http["param"])
    assert (answer.stream, answer.attempt) == (1, 0)


BAD_GENERATES: list[tuple[str, dict[str, Any], str]] = [
    ("R12", {"request_id": ""}, "invalid_request"),
    ("R12", {"request_id": "x" * 129}, "invalid_request"),
    ("R12", {"request_id": "a\nb"}, "invalid_request"),
    ("R12", {"boot": "x" * 10_000}, "invalid_request"),
    ("R12", {"attempt": -1}, "invalid_request"),
    ("R12", {"attempt": 2**63}, "invalid_request"),
    ("R16", {"credit": 0}, "invalid_request"),
    ("R16", {"credit": -5}, "invalid_request"),
    ("R16", {"credit": 2**63}, "invalid_request"),
    ("R17", {"deadline_ms": 0}, "deadline_exceeded"),
    ("R17", {"deadline_ms": -(2**63)}, "deadline_exceeded"),
    ("R13", {"journal": messages.Journal(prompt_ids=[], seed=1, emitted=[])}, "invalid_request"),
    ("R13", {"journal": messages.Journal(prompt_ids=[2**63], seed=1, emitted=[[]])}, "invalid_request"),
    ("R13", {"journal": messages.Journal(prompt_ids=[1], seed=1, emitted=[[-1]])}, "invalid_request"),
    ("R13", {"journal": messages.Journal(prompt_ids=[1], seed=1, emitted=[[1, 2**63]])}, "invalid_request"),
    ("R13", {"journal": messages.Journal(prompt_ids=[1], seed=1, emitted=[[1], [1]])}, "invalid_request"),
    ("R13", {"journal": messages.Journal(prompt_ids=[1], seed=1, emitted=[[1] * 5])}, "invalid_request"),
]


@pytest.mark.parametrize(("number", "fields", "code"), BAD_GENERATES, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD_GENERATES)])
def test_a_request_that_cannot_be(world: World, peer: Peer, number: str, fields: dict[str, Any], code: str) -> None:
    peer.tell(peer.generate(7, **{"request_id": secrets.token_hex(4), **fields}))
    answer = peer.failed()
    assert (answer.code, answer.stream) == (code, 7), answer


@pytest.mark.parametrize("deadline_ms", [100 * 365 * 86_400_000, 2**64 - 1])
def test_deadlines_are_cut_to_the_routers_own(peer: Peer, deadline_ms: int) -> None:
    """R17: a hundred years are as long as the router's patience. Without credit the sequence would wait for ever."""
    started = time.monotonic()
    peer.tell(peer.generate(1, secrets.token_hex(4), credit=1, deadline_ms=deadline_ms))
    end = peer.until_end(1)[1]
    assert isinstance(end, Failed) and end.code == "deadline_exceeded"
    figure("R17 a deadline of 100 years ends after", time.monotonic() - started, PATIENCE_S + 0.5)


@pytest.mark.parametrize("tokens", [-1, 0, 2**63, UNLIMITED + 1])
def test_credit_that_cannot_be(peer: Peer, tokens: int) -> None:
    assert peer.failure(pack({"type": "credit", "boot": peer.boot, "streams": [1], "tokens": [tokens]})).code == "invalid_request"
    assert peer.failure(pack({"type": "credit", "boot": peer.boot, "streams": [1, 2], "tokens": [5]})).code == "invalid_request"


def test_credit_for_what_is_over_or_another_s_is_ignored(world: World, peer: Peer) -> None:
    peer.tell(peer.generate(1, "over"))
    tokens, end = peer.until_end(1)
    assert len(tokens) == 4 and isinstance(end, Done)
    peer.tell(Credit(boot=peer.boot, streams=[1, 77], tokens=[5, 5]))
    peer.answers()


def test_a_sequence_without_credit_waits_for_it(peer: Peer) -> None:
    peer.tell(peer.generate(1, "paused", credit=2))
    got: list[int] = []
    while len(got) < 2:
        message = peer.hear()
        if isinstance(message, Tokens):
            got += [token for ids in message.tokens for token in ids]
    peer.answers()
    peer.tell(Credit(boot=peer.boot, streams=[1], tokens=[2]))
    rest, end = peer.until_end(1)
    assert len(got + rest) == 4 and isinstance(end, Done)


def test_nobody_cancels_what_is_not_theirs(world: World, peer: Peer) -> None:
    """R15: unknown, finished and another tenant's: the same answer, in the same time, and no effect."""
    mine = world.client.complete([4, 4], texts=False, max_tokens=400, ignore_eos=True)
    first = next(mine.stream())
    times: dict[str, list[float]] = {"unknown": [], "another's": [], "finished": []}
    peer.tell(peer.generate(1, "done"))
    peer.until_end(1)
    boot = world.client._protocol._boot
    for _ in range(30):
        for name, message in (
            ("unknown", Cancel(boot=peer.boot, stream=12345)), ("another's", Cancel(boot=boot, stream=mine._exchange.stream)),
            ("finished", Cancel(boot=peer.boot, stream=1)),
        ):  # fmt: skip
            started = time.monotonic()
            answer = peer.failure(messages.encode(message))
            times[name].append(time.monotonic() - started)
            assert (answer.code, answer.message) == ("not_found", "no such live request")
    medians = [sorted(found)[15] for found in times.values()]
    assert max(medians) < crowd() * (3 * min(medians) + 0.002), times
    assert first.tokens and len(mine.result().tokens) == 400
    # The name of another's request is free for this tenant: it gets an answer of its own.
    peer.tell(peer.generate(5, mine.request))
    assert len(peer.until_end(5)[0]) == 4


def test_a_repeat_runs_once(world: World, peer: Peer) -> None:
    """S4: the same (client, request) again and again, from one connection and another: one generation, the same tokens."""
    accepted = world.client.status()["counts"]["accepted"]
    body = msgspec.json.encode(text(prompt=[6, 6], max_tokens=50, seed=3, ignore_eos=True))
    other = Peer(world)
    try:
        for stream in range(1, 6):
            peer.tell(peer.generate(stream, "again", body=body))
        tokens, end = peer.until_end(5)
        assert len(tokens) >= 1 and isinstance(end, Done) and end.usage.output_tokens == 50
        other.tell(other.generate(1, "again", body=body))
        repeated, _ = other.until_end(1)
    finally:
        other.close()
    assert len(repeated) == 50 and repeated[-len(tokens) :] == tokens
    assert world.client.status()["counts"]["accepted"] == accepted + 1


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.SUB, zmq.PUSH, zmq.PAIR, zmq.PUB], ids=["REQ", "SUB", "PUSH", "PAIR", "PUB"])
def test_sockets_of_other_kinds(world: World, kind: int) -> None:
    """R19: what cannot talk to us is turned away by the handshake, and one that can is told so, or not heard."""
    stranger = Peer(world, kind=kind)
    try:
        if kind == zmq.REQ:
            malformed = world.client.status()["rpc"]["malformed"]
            stranger.send(b"hello")
            wait_for(lambda: world.client.status()["rpc"]["malformed"] == malformed + 1, what="the refusal")
        else:
            if kind == zmq.SUB:
                stranger.socket.subscribe(b"")
            stranger.event(zmq.EVENT_DISCONNECTED)
        world.good_rpc()
    finally:
        stranger.close()


def test_accepted_comes_first_and_holds_the_journal(peer: Peer) -> None:
    peer.tell(peer.generate(1, "first"))
    answer = peer.hear()
    while not isinstance(answer, Accepted):
        assert isinstance(answer, Tokens) and not any(answer.tokens), "a token before Accepted"
        answer = peer.hear()
    assert answer.prompt_ids == [1, 2, 3]
    assert peer.until_end(1)[0]
