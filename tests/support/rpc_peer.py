"""A raw RPC client, which need not follow the protocol: it sends any frames and returns the answers."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from tests.inputs.world import World, text
from workers.protocol import messages
from workers.protocol.messages import (
    Done,
    Failed,
    Generate,
    Query,
    Report,
    ToClient,
    Tokens,
)

BODY = msgspec.json.encode(text(prompt=[1, 2, 3], max_tokens=4, ignore_eos=True))


class Peer:
    """A raw DEALER with its own key: it sends any frame, and returns the answers. ``boot`` names it in its messages."""

    def __init__(self, world: World, name: str = "bob", kind: int = zmq.DEALER, high_water: int = 1000) -> None:
        self.boot = secrets.token_hex(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = high_water
        keys = world.keys(name)
        self.socket.curve_serverkey = world.server_key.encode()
        self.socket.curve_publickey, self.socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        self.events = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(world.rpc.endpoint)

    def close(self) -> None:
        self._context.destroy(0)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def tell(self, message: messages.Message) -> None:
        self.send(messages.encode(message))

    def hear(self, bound_s: float = 10.0) -> ToClient:
        assert self.socket.poll(int(bound_s * 1000)), "no answer"
        return messages.decode_to_client(self.socket.recv())

    def failure(self, *frames: bytes) -> Failed:
        self.send(*frames)
        return self.failed()

    def failed(self) -> Failed:
        """The next message that is no keepalive, which must be a failure."""
        while isinstance(answer := self.hear(), Tokens) and not any(answer.tokens):
            pass
        assert isinstance(answer, Failed), answer
        return answer

    def until_end(self, stream: int, bound_s: float = 10.0) -> tuple[list[int], Done | Failed]:
        """All tokens of one stream, and its end."""
        tokens: list[int] = []
        deadline = time.monotonic() + bound_s
        while True:
            message = self.hear(max(0.1, deadline - time.monotonic()))
            if isinstance(message, Tokens):
                tokens += [token for at, ids in zip(message.streams, message.tokens, strict=True) if at == stream for token in ids]
            elif isinstance(message, Done | Failed) and message.stream == stream:
                return tokens, message

    def event(self, wanted: int, bound_s: float = 10.0) -> None:
        """Wait for an event of the connection."""
        deadline = time.monotonic() + bound_s
        while True:
            assert self.events.poll(max(0, int((deadline - time.monotonic()) * 1000))), "the connection's event did not come"
            if recv_monitor_message(self.events)["event"] == wanted:
                return

    def generate(self, stream: int, request_id: str, **fields: Any) -> Generate:
        return Generate(
            **{"boot": self.boot, "stream": stream, "request_id": request_id, "endpoint": "completions", "body": BODY, **fields}
        )

    def answers(self) -> None:
        """The router still listens to this peer."""
        self.tell(Query(boot=self.boot, stream=9999, what="models"))
        while not isinstance(self.hear(), Report):
            pass
