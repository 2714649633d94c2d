"""The line inside a router process between its doors (HTTP, RPC) and the dispatcher that owns requests and replicas.

A door turns bytes into an :class:`RouterRequest`, gives it to the :class:`Dispatcher` with a :class:`Watcher`, and gets a :class:`Ticket`.
Everything runs on the router's one event loop; no call here blocks or awaits, and the dispatcher calls a watcher from its own socket
callback.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from orchestrator.router.core.stats import Attempt
from orchestrator.router.metrics import RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import UNLIMITED, FinishReason, Logprobs, SamplingParams, Usage
from workers.protocol.status import ModelStatus, RouterStatus


class RouterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One validated request: ``n`` choices over one prompt. ``params.seed`` is resolved; choice i uses ``seed + i`` (mod 2**63).

    ``client`` names who asks (door's own id), ``request`` is the id that the client sees. ``affinity`` is a session hint. ``emitted``:
    what the client already holds of each choice (a journal), or empty. Where a choice has a list there, the dispatcher takes it over as its
    record, which grows just before each delivery: a door that needs the record too keeps the list, to read only. ``trails``: the same for
    its placements. ``deadline_s``: seconds from now, None = none. ``marks``: the caller's request id and trace id, for log lines elsewhere.
    """

    client: str
    request: str
    model: str
    prompt_ids: list[int]
    params: SamplingParams
    n: int = 1
    salt: str = ""
    affinity: str = ""
    credit: int = UNLIMITED
    deadline_s: float | None = None
    emitted: list[list[int]] = []
    attempt: int = 0
    trails: list[list[Attempt]] = []
    marks: tuple[str, str] = ("", "")


class Watcher(Protocol):
    """Receives what happens to a request, per choice: on_tokens*, then exactly one of on_done and on_failed."""

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None: ...

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        """Prompt logprobs, once, before the choice's first token."""

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None: ...

    def on_failed(self, choice: int, error: TriremeError) -> None: ...


class Ticket(Protocol):
    """A live request, held by its door."""

    def cancel(self) -> None:
        """The caller is gone: nothing more is delivered for any choice; rows are freed on the replica."""

    def finish(self, choice: int) -> None:
        """The door has ended this choice itself (a stop string): cancels its row; nothing more is delivered for the choice."""

    def credit(self, tokens: int) -> None:
        """Grant ``tokens`` more to every live choice."""


class Dispatcher(Protocol):
    """The routing core with its shell: owns every accepted request until its last token."""

    def submit(self, ask: RouterRequest, watcher: Watcher, meter: RequestMeter) -> Ticket:
        """Accept a request; ``meter`` counts its tokens as they are delivered.

        Raises NotFound (model), Overloaded (queue full, with retry_after), Unavailable (no replica and no hope).
        """

    def model(self, name: str) -> ModelStatus | None: ...

    def ready(self) -> bool:
        """Whether every served model has a replica."""

    def status(self) -> RouterStatus: ...
