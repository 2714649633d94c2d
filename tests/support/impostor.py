"""Raw peers, which need not follow the protocol: a socket that sends given frames, and one that acts as a replica."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import zmq

from tests.inputs.world import MODEL
from workers.protocol import messages
from workers.protocol.messages import PROTOCOL, Capacity, Heartbeat, Hello
from workers.protocol.status import EngineStats

CAPACITY = Capacity(block_size=16, num_blocks=64, max_batch_size=8, max_num_tokens=64, max_seq_len=1024, vocab_size=320, tp=1, pp=1)


@contextlib.contextmanager
def dealer(endpoint: str, server_key: str = "", public: str = "", secret: str = "", **options: Any) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = context.socket(zmq.DEALER)
    try:
        made.linger = 0
        for name, value in options.items():
            setattr(made, name, value)
        if server_key:
            made.curve_serverkey, made.curve_publickey, made.curve_secretkey = server_key.encode(), public.encode(), secret.encode()
        made.connect(endpoint)
        yield made
    finally:
        made.close(0)
        context.term()


class Impostor:
    """A raw replica: it sends given messages and returns the received ones."""

    def __init__(self, socket: zmq.Socket[bytes], boot: str) -> None:
        self._socket, self.boot = socket, boot

    def hello(self, name: str, epoch: int = 1, model: str = MODEL) -> None:
        self.tell(
            Hello(
                boot=self.boot, protocol=PROTOCOL, replica=name, model=model, epoch=epoch, resume="bitwise", capacity=CAPACITY
            )
        )  # fmt: skip

    def tell(self, message: messages.Message) -> None:
        self._socket.send(messages.encode(message))

    def hear(self, kind: type[Any], bound_s: float = 10.0) -> Any:
        """The next message of this kind."""
        deadline = time.monotonic() + bound_s
        while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            message = messages.decode_to_replica(self._socket.recv())
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind.__name__}")

    def beat(self, **fields: Any) -> None:
        """A heartbeat; ``fields``: of the message or of its stats."""
        stats = {name: fields.pop(name) for name in EngineStats.__struct_fields__ if name in fields}
        message = {"boot": self.boot, "step": 1, "busy_ms": 0.0, "predicted_ms": 1.0, **fields}
        self.tell(Heartbeat(stats=EngineStats(**{"free_blocks": 64, **stats}), **message))
