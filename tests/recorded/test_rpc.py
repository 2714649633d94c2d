"""What an RPC client gets from a router, message by message, and what the answers to its queries hold.

The client is a bare socket. A file holds the decoded messages in both directions; nonces are masked. Record again:
``python -m tests.recorded.record rpc``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import zmq

from tests.recorded.recording import as_json, check, check_names, without
from tests.recorded.stage import Stage
from tests.support.impostor import dealer
from workers.protocol import messages
from workers.protocol.messages import Accepted, Cancel, Credit, Done, Generate, Journal, Query, Submit, Tokens, Usage

AREA = "rpc"
BOUND_MS = 20_000
#: New in every run, or a matter of time.
NEW_EACH_TIME = ("boot", "age_s", "signal_age_s")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64, "seed": 1}
TEXT = {"model": "m", "prompt": "hi", "max_tokens": 64, "seed": 1}
NAMES = ["chat.json", "two_choices.json", "ids.json", "journal.json", "cancel.json", "refusals.json", "queries.json"]


class Talk:
    """A client's socket, and what was said on it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.said: list[dict[str, Any]] = []

    def say(self, message: Any) -> None:
        self._socket.send(messages.encode(message))
        self.said.append({"client": readable(msgspec.msgpack.decode(messages.encode(message)))})

    def say_raw(self, frame: bytes) -> None:
        self._socket.send(frame)
        self.said.append({"client": {"raw": frame.decode()}})

    def hear(self) -> dict[str, Any]:
        """The next message; the router's sign of life, which comes by the clock, is passed over."""
        while self._socket.poll(BOUND_MS):
            message = msgspec.msgpack.decode(self._socket.recv())
            if message["type"] != "tokens" or any(message["tokens"]):
                self.said.append({"router": without(readable(message), NEW_EACH_TIME)})
                return dict(message)
        raise AssertionError("the router says nothing")


def readable(value: Any) -> Any:
    """JSON that is sent as bytes is shown as what it says."""
    if isinstance(value, bytes):
        try:
            return {"bytes of JSON": json.loads(value)}
        except ValueError:
            return {"bytes": value.decode().splitlines()[0]}
    if isinstance(value, dict):
        return {key: readable(inner) for key, inner in value.items()}
    return [readable(inner) for inner in value] if isinstance(value, list) else value


def generate(stream: int, body: dict[str, Any], **fields: Any) -> Generate:
    endpoint: Any = "chat" if "messages" in body else "completions"
    return Generate(boot="client-boot", stream=stream, request_id=f"q{stream}", endpoint=endpoint, body=json.dumps(body).encode(), **fields)


def answered(stage: Stage, talk: Talk, asked: Generate, pieces: Sequence[Sequence[str]]) -> None:
    """Ask; the replica says ``pieces``, each a text a row, and waits with the next until the client has the previous one."""
    replica, boot = stage.replica, stage.replica.boot
    talk.say(asked)
    rows = [replica.hear(Submit) for _ in pieces[0]]
    talk.hear()
    sent = [len(row.task.emitted) for row in rows]
    for row in rows:
        replica.tell(Accepted(boot=boot, stream=row.stream, attempt=row.attempt))
    for texts in pieces:
        tokens = [list(text.encode()) for text in texts]
        replica.tell(
            Tokens(
                boot=boot, streams=[row.stream for row in rows], attempts=[row.attempt for row in rows], firsts=list(sent), tokens=tokens
            )
        )
        sent = [count + len(ids) for count, ids in zip(sent, tokens, strict=True)]
        talk.hear()
    for row, count in zip(rows, sent, strict=True):
        usage = Usage(prompt_tokens=len(row.prompt_ids), output_tokens=count, cached_tokens=1)
        replica.tell(Done(boot=boot, stream=row.stream, attempt=row.attempt, reason="stop", usage=usage, stop_id=258))
        talk.hear()


def recordings() -> dict[str, str]:
    found: dict[str, list[dict[str, Any]]] = {}
    with Stage() as stage:

        def talk(name: str) -> Talk:
            made = Talk(sockets[name])
            found[name] = made.said
            return made

        opened = {name: dealer(stage.state.rpc) for name in NAMES}
        sockets = {name: manager.__enter__() for name, manager in opened.items()}
        try:
            answered(stage, talk("chat.json"), generate(1, CHAT), [["He"], ["llo"]])
            answered(stage, talk("two_choices.json"), generate(2, CHAT | {"n": 2}), [["a", "x"], ["b", "y"]])
            answered(stage, talk("ids.json"), generate(3, TEXT, texts=False), [["He"], ["llo"]])
            journal = Journal(prompt_ids=list(b"hi"), seed=9, emitted=[list(b"Hel")])
            answered(stage, talk("journal.json"), generate(4, TEXT, attempt=1, journal=journal), [["lo"]])
            queried(talk("queries.json"))
            cancelled(stage, talk("cancel.json"))
            refused(talk("refusals.json"))
        finally:
            for manager in opened.values():
                manager.__exit__(None, None, None)
    return {name: as_json(said) for name, said in found.items()}


def cancelled(stage: Stage, talk: Talk) -> None:
    """It is left by its client: the replica hears of it, the client nothing more. A second Cancel finds nothing."""
    talk.say(generate(5, TEXT, credit=8))
    row = stage.replica.hear(Submit)
    talk.hear()
    stage.replica.tell(Accepted(boot=stage.replica.boot, stream=row.stream, attempt=row.attempt))
    talk.say(Credit(boot="client-boot", streams=[5], tokens=[16]))
    talk.said.append({"replica hears": without(json.loads(msgspec.json.encode(stage.replica.hear(Credit))), ("boot", "streams"))})
    talk.say(Cancel(boot="client-boot", stream=5))
    stage.replica.hear(Cancel)
    usage = Usage(prompt_tokens=2, output_tokens=0)
    stage.replica.tell(Done(boot=stage.replica.boot, stream=row.stream, attempt=row.attempt, reason="cancelled", usage=usage))
    talk.say(Cancel(boot="client-boot", stream=5))
    talk.hear()


def refused(talk: Talk) -> None:
    for message in (
        generate(6, CHAT | {"model": "ghost"}),
        generate(7, CHAT | {"temperature": -1}),
        generate(8, TEXT | {"prompt": ["a", "b"]}),
        generate(9, CHAT, credit=0),
        generate(10, CHAT, deadline_ms=0),
        Credit(boot="client-boot", streams=[1], tokens=[]),
    ):
        talk.say(message)
        talk.hear()
    talk.say_raw(b"no message")
    talk.hear()


def queried(talk: Talk) -> None:
    for index, what in enumerate(("models", "status", "metrics")):
        talk.say(Query(boot="client-boot", stream=100 + index, what=what))  # type: ignore[arg-type]
        talk.hear()


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_the_client_is_answered_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_nothing_else_is_recorded() -> None:
    check_names(AREA, NAMES)
