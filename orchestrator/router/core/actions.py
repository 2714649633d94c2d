"""The actions that the shell must carry out, as values: :meth:`orchestrator.router.core.router_core.RouterCore.handle` returns them.

Owns the vocabulary only. A choice's terminal is exactly one of :class:`FinishChoice` and :class:`FailChoice`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, ToReplica, Usage


class SendMessage(msgspec.Struct, frozen=True, gc=False):
    """Send ``message`` to the connection ``peer``. If that is not possible, the shell reports ``PeerUnreachable``."""

    peer: bytes
    message: ToReplica


#: (owner, choice, first, tokens, logprobs): tokens for a choice, in order, without gap or repeat: ``first`` continues the last delivery.
Delivery: TypeAlias = tuple[Any, int, int, list[int], list[Logprobs] | None]


class DeliverTokens(msgspec.Struct, frozen=True, gc=False):
    """All tokens of one replica message: one action per step and one tuple per choice, because the cost applies to every token."""

    deliveries: list[Delivery]


class DeliverPromptLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Prompt logprobs of a choice, once."""

    owner: Any
    choice: int
    logprobs: list[Logprobs]


class DeliverCachedTokens(msgspec.Struct, frozen=True, gc=False):
    """Prompt tokens that the choice's replica found in its prefix cache, before the attempt's first token; only if it found some."""

    owner: Any
    choice: int
    cached_tokens: int


class FinishChoice(msgspec.Struct, frozen=True, gc=False):
    """A choice has ended successfully."""

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
