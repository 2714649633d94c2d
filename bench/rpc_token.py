"""CPU that a router spends on one token of an RPC stream: ``python -m bench.rpc_token [--steps 200]``.

Prints microseconds a token between the replica's socket and the client's, with text and without: decode, route, watch, encode; without the
two socket calls per message. About 2 if steps follow each other without pauses, as here; docs/performance.md says why a real stream costs
more.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from orchestrator.auth.api_keys import Salting
from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.config.router_spec import AdmissionSpec, ModelCard
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.router_core import RouterCore
from orchestrator.router.diagnostics import Diagnostics
from orchestrator.router.dispatcher import RouterDispatcher
from orchestrator.router.frontend.preprocess import Preprocessor
from orchestrator.router.frontend.text_models import load_texts
from orchestrator.router.metrics import Metrics
from orchestrator.router.rpc.server import RpcServer
from orchestrator.router.tenant_caps import TenantCaps
from tests.support.tiny_models import tiny_tokenizer
from workers.protocol import messages
from workers.protocol.messages import PROTOCOL, Capacity, Generate, Hello, RouterHeartbeat, Submit, Tokens

STREAMS, CLIENTS = 128, 8


async def _turns(done: Callable[[], bool]) -> None:
    for _ in range(1000):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come in a thousand turns of the loop")


async def measure(folder: Path, texts: bool, steps: int) -> float:
    """Microseconds a token. ``folder``: the tokenizer's; ``texts``: whether clients get text beside the token ids."""
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
    core = RouterCore(RouterHeartbeat(boot="R", router="r"), ["m"], spec, ReplicaRegistry(60.0, 60.0))
    dispatch = RouterDispatcher(core, name="r", send=to_replica, clock=time.monotonic)
    server = RpcServer(
        boot="R", dispatcher=dispatch, preprocessor=Preprocessor(loaded, dispatch, spec, Salting(b"salt")), metrics=Metrics(["m"]),
        acl=CurveAcl({}), caps=TenantCaps(spec), send=to_client, clock=time.monotonic, diagnostics=Diagnostics("r", dispatch, None),
    )  # fmt: skip
    capacity = Capacity(
        block_size=16, num_blocks=9999, max_batch_size=STREAMS, max_num_tokens=512, max_seq_len=4096, vocab_size=320, tp=1, pp=1
    )  # fmt: skip
    hello = Hello(boot="b", protocol=PROTOCOL, replica="a", model="m", epoch=1, resume="bitwise", capacity=capacity)
    dispatch.hear(b"a", "", hello, messages.encode(hello))
    body = msgspec.json.encode({"model": "m", "prompt": [1, 2, 3], "max_tokens": steps + 1})
    for stream in range(STREAMS):
        client = f"c{stream % CLIENTS}"
        generate = Generate(boot=client, stream=stream, request_id=f"q{stream}", endpoint="completions", body=body, texts=texts)
        server.on_frame(client.encode(), "", messages.encode(generate))
    await _turns(lambda: len(submits) == STREAMS)
    streams, attempts = [submit.stream for submit in submits], [submit.attempt for submit in submits]
    messages_in = [
        messages.encode(Tokens(boot="b", streams=streams, attempts=attempts, firsts=[step] * STREAMS, tokens=[[97]] * STREAMS))
        for step in range(steps)
    ]
    await asyncio.sleep(0)
    frames.clear()
    begin = time.process_time()
    for message in messages_in:
        dispatch.hear(b"a", "", messages.decode_from_replica(message), message)
        server._flush()
    spent = time.process_time() - begin
    assert len(frames) == steps * CLIENTS, "one message a client and step"
    last = messages.decode_to_client(frames[-1])
    assert isinstance(last, Tokens) and last.tokens == [[97]] * (STREAMS // CLIENTS)
    assert last.texts == (["a"] * (STREAMS // CLIENTS) if texts else None)
    loaded.close()
    return spent / (steps * STREAMS) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer(Path(folder))
        for texts in (False, True):
            cost = asyncio.run(measure(Path(folder), texts, steps))
            print(f"router: {cost:.2f} us a token ({'text' if texts else 'ids'}, {STREAMS} streams, {CLIENTS} clients)")


if __name__ == "__main__":
    main()
