"""The interface inside a router process between its frontends (HTTP, RPC) and the dispatcher that owns requests and replicas.

A frontend turns bytes into a :class:`RouterRequest`, passes it to the :class:`Dispatcher` with a :class:`Watcher`, and gets a
:class:`Ticket`. Everything runs on the router's one event loop; no call here blocks or awaits, and the dispatcher calls a watcher from its
own socket callback.
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.router.core.request import RouterRequest
from orchestrator.router.metrics import RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage
from workers.protocol.status import ModelStatus, RouterStatus


class Watcher(Protocol):
    """Receives what happens to a request, per choice: on_tokens*, then exactly one of on_done and on_failed."""

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None: ...

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        """Prompt logprobs, once, before the choice's first token."""

    def on_cached(self, choice: int, tokens: int) -> None:
        """So many tokens of the prompt were found in the prefix cache: before the first token of a placement, and only where there are
        some. A frontend that ends the choice itself gets no usage that says so."""

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None: ...

    def on_failed(self, choice: int, error: TriremeError) -> None: ...


class Ticket(Protocol):
    """The frontend's handle of a live request."""

    def cancel(self) -> None:
        """The caller is gone: nothing more is delivered for any choice, and its replicas drop it."""

    def stop_choice(self, choice: int) -> None:
        """The frontend has ended this choice itself (a stop string): nothing more is delivered for it, and its replica drops it."""

    def credit(self, tokens: int) -> None:
        """Grant ``tokens`` more to every live choice."""


class Dispatcher(Protocol):
    """The routing core with its shell: it owns every accepted request until its last token."""

    def submit(self, request: RouterRequest, watcher: Watcher, meter: RequestMeter) -> Ticket:
        """Accept a request; ``meter`` counts its tokens as they are delivered.

        Raises NotFound (model), Overloaded (queue full, with retry_after), Unavailable (no replica, and none is expected).
        """

    def model(self, name: str) -> ModelStatus | None: ...

    def ready(self) -> bool:
        """Whether every served model has a replica."""

    def status(self) -> RouterStatus: ...
