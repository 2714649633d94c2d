"""What the routing core asks its shell to do, as values: what :meth:`orchestrator.router.core.router_core.RouterCore.handle` returns.

Owns the vocabulary only. A choice's terminal is exactly one of :class:`FinishChoice` and :class:`FailChoice`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, ToReplica, Usage


class SendMessage(msgspec.Struct, frozen=True, gc=False):
    """Give ``message`` to the connection ``peer``. Where it cannot be taken, the shell answers with ``PeerUnreachable``."""

    peer: bytes
    message: ToReplica


#: (owner, choice, first, tokens, logprobs): tokens for a choice, in order, without gap or repeat: ``first`` continues the last delivery.
Delivery: TypeAlias = tuple[Any, int, int, list[int], list[Logprobs] | None]


class DeliverTokens(msgspec.Struct, frozen=True, gc=False):
    """All that one message of a replica brought: one action a step and a tuple a choice, since every token pays for this."""

    deliveries: list[Delivery]


class DeliverPromptLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Prompt logprobs of a choice, once."""

    owner: Any
    choice: int
    logprobs: list[Logprobs]


class DeliverCachedTokens(msgspec.Struct, frozen=True, gc=False):
    """Prompt tokens that the choice's replica found in its prefix cache, before the attempt's first token; only where it found some."""

    owner: Any
    choice: int
    cached_tokens: int


class FinishChoice(msgspec.Struct, frozen=True, gc=False):
    """A choice has ended well."""

    owner: Any
    choice: int
    reason: FinishReason
    usage: Usage
    stop_id: int | None


class FailChoice(msgspec.Struct, frozen=True, gc=False):
    """A choice has failed."""

    owner: Any
    choice: int
    error: TriremeError


Action: TypeAlias = SendMessage | DeliverTokens | DeliverPromptLogprobs | DeliverCachedTokens | FinishChoice | FailChoice
