"""What a token costs between the replica's socket and the client's: decode, route, watch, encode. Printed; the bound is only a fence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from orchestrator.auth.api_keys import Salting
from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.config.router_spec import AdmissionSpec, ModelCard
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.frontend.text_models import load_texts
from orchestrator.router.metrics import Metrics
from orchestrator.router.rpc.server import RpcServer
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol import messages
from workers.protocol.messages import PROTOCOL, Capacity, Generate, Hello, RouterHeartbeat, Submit, Tokens

STREAMS, CLIENTS, STEPS = 128, 8, 200
FENCE_US = 200.0


async def _turns(done: Callable[[], bool]) -> None:
    for _ in range(1000):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come in a thousand turns of the loop")


async def _measure(folder: Path, texts: bool) -> float:
    """Microseconds a token of the router's whole path but the two socket calls a message."""
    loaded = load_texts([ModelCard(name="m", tokenizer=str(folder))])
    submits: list[Submit] = []
    frames: list[bytes] = []

    def to_replica(peer: bytes, message: object) -> bool:
        if isinstance(message, Submit):
            submits.append(message)
        return True

    def to_client(peer: bytes, frame: bytes) -> bool:
        frames.append(frame)
        return True

    spec = AdmissionSpec(max_queue=1000)
    route = RouterCore(RouterHeartbeat(boot="R", router="r"), {"m": "m"}, spec, ReplicaRegistry(60.0, 60.0))
    dispatch = RouterDispatcher(route, name="r", send=to_replica, clock=time.monotonic)
    door = RpcServer(
        boot="R", dispatcher=dispatch, preprocessor=Preprocessor(loaded, dispatch, spec, Salting(b"salt")), metrics=Metrics(["m"]),
        acl=CurveAcl({}), send=to_client, clock=time.monotonic,
    )  # fmt: skip
    capacity = Capacity(
        block_size=16, num_blocks=9999, max_batch_size=STREAMS, max_num_tokens=512, max_seq_len=4096, vocab_size=320, tp=1, pp=1
    )  # fmt: skip
    hello = Hello(boot="b", protocol=PROTOCOL, replica="a", model="m", epoch=1, resume="bitwise", capacity=capacity)
    dispatch.hear(b"a", "", hello)
    body = msgspec.json.encode({"model": "m", "prompt": [1, 2, 3], "max_tokens": STEPS + 1})
    for stream in range(STREAMS):
        client = f"c{stream % CLIENTS}"
        generate = Generate(boot=client, stream=stream, request_id=f"q{stream}", endpoint="completions", body=body, texts=texts)
        door.on_frame(client.encode(), "", messages.encode(generate))
    await _turns(lambda: len(submits) == STREAMS)
    streams, attempts = [submit.stream for submit in submits], [submit.attempt for submit in submits]
    steps = [
        messages.encode(Tokens(boot="b", streams=streams, attempts=attempts, firsts=[step] * STREAMS, tokens=[[97]] * STREAMS))
        for step in range(STEPS)
    ]
    await asyncio.sleep(0)
    frames.clear()
    begin = time.process_time()
    for step in steps:
        dispatch.hear(b"a", "", messages.decode_from_replica(step))
        door._flush()
    spent = time.process_time() - begin
    assert len(frames) == STEPS * CLIENTS, "one message a client and step"
    last = messages.decode_to_client(frames[-1])
    assert isinstance(last, Tokens) and last.tokens == [[97]] * (STREAMS // CLIENTS)
    assert last.texts == (["a"] * (STREAMS // CLIENTS) if texts else None)
    loaded.close()
    return spent / (STEPS * STREAMS) * 1e6


@pytest.mark.parametrize("texts", [False, True])
def test_cost_of_a_token(tmp_path: Path, texts: bool) -> None:
    tiny_tokenizer(tmp_path)
    cost = asyncio.run(_measure(tmp_path, texts))
    print(f"router: {cost:.2f} µs a token ({'text' if texts else 'ids'}, {STREAMS} streams, {CLIENTS} clients)")
    assert cost < FENCE_US
