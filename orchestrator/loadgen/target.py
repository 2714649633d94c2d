"""The target of the load. It sends one request and records in a :class:`RequestSample` when each piece of the answer comes."""

from __future__ import annotations

from typing import Protocol

import msgspec

from orchestrator.loadgen.stats import RequestSample


class TargetRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, ready to send. ``prompt``: text or token ids. ``ignore_eos``: generate all ``output`` tokens."""

    prompt: str | list[int]
    output: int
    seed: int
    ignore_eos: bool = True
    temperature: float = 0.0


class LoadTarget(Protocol):
    async def send(self, request: TargetRequest, sample: RequestSample) -> None:
        """Send the request and read the answer to its end. Raises TriremeError, whose code names the kind of failure."""

    async def close(self) -> None: ...
