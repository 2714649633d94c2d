"""The routers' RPC servers as a target. Owns one client, whose streams share its connection as any program's would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.client import AsyncClient, ClientKeys
from orchestrator.loadgen.stats import RequestSample
from orchestrator.loadgen.target import TargetRequest
from workers.protocol.specs import RouterAddress


class RpcTarget:
    """Make it inside the loop that uses it. ``keys``: for ``tcp://`` endpoints."""

    def __init__(self, routers: Sequence[RouterAddress], *, model: str, keys: ClientKeys | None, clock: Callable[[], float]) -> None:
        self._client = AsyncClient(routers, model=model, keys=keys)
        self._clock = clock

    async def send(self, request: TargetRequest, sample: RequestSample) -> None:
        options: dict[str, Any] = {"max_tokens": request.output, "temperature": request.temperature, "seed": request.seed}
        if request.ignore_eos:
            options["ignore_eos"] = True
        sample.sent(self._clock())
        call = self._client.complete(request.prompt, texts=False, **options)
        try:
            async for piece in call.stream():
                if piece.tokens:
                    sample.piece(self._clock())
        finally:
            call.cancel()
        reply = await call.result()
        usage = reply.choices[0].usage
        sample.counted(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
        if not sample.pieces:
            sample.piece(self._clock())

    async def close(self) -> None:
        self._client.close()
