"""What load is sent to. A target turns one planned request into one asked and tells its clock of every piece that comes back."""

from __future__ import annotations

from typing import Protocol

import msgspec

from orchestrator.loadgen.stats import RequestSample


class TargetRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, ready to send. ``prompt``: text or token ids. ``full``: all ``output`` tokens, whatever the model says."""

    prompt: str | list[int]
    output: int
    seed: int
    full: bool = True
    temperature: float = 0.0


class LoadTarget(Protocol):
    async def ask(self, wanted: TargetRequest, flight: RequestSample) -> None:
        """Send it and read the answer to its end. Raises TriremeError, whose code names the kind of failure."""

    async def close(self) -> None: ...
