"""The record of an event and of its actions: numbers, times and names, enough to run the event again.

Owns the format. A record holds no prompt, no token, no text, no key, no salt and no error text: a prompt and a message's tokens are kept
as their lengths, and the prefix index's answers as numbers. A user and a tenant are kept as digests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from orchestrator.router.core.actions import Action, DeliverCachedTokens, DeliverPromptLogprobs, DeliverTokens, FinishChoice, SendMessage
from orchestrator.router.core.events import (
    AbortAll,
    AddCredit,
    CancelRequest,
    PeerUnreachable,
    ReplicaMessage,
    RouterEvent,
    StopAccepting,
    StopChoice,
    SubmitRequest,
    Tick,
)
from orchestrator.router.core.replica_registry import MAX_REASON, without_lists
from orchestrator.router.core.request import RouterRequest
from workers.protocol.messages import (
    UNLIMITED,
    Accepted,
    Attach,
    Bye,
    Cancel,
    Credit,
    Done,
    Failed,
    FinishReason,
    FromReplica,
    Heartbeat,
    Hello,
    Logprobs,
    RouterHeartbeat,
    SamplingParams,
    Submit,
    Tokens,
    ToReplica,
    Usage,
)


class TokensRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokens"):
    """A Tokens message. ``counts[i]`` tokens came on ``streams[i]``; ``prompts``: streams whose prompt logprobs came; ``cached``: as in
    the message. ``invalid``, ``invalid_prompts``: indexes of the lists and of the prompts with invalid content."""

    boot: str
    streams: list[int]
    attempts: list[int]
    firsts: list[int]
    counts: list[int]
    prompts: list[int] = []
    cached: list[tuple[int, int]] = []
    invalid: list[int] = []
    invalid_prompts: list[int] = []


class MessageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="message"):
    """A ``ReplicaMessage``."""

    peer: bytes
    message: Hello | Accepted | Heartbeat | TokensRecord | Done | Failed | Bye
    user: str = ""


class SubmitRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """A ``SubmitRequest``. ``emitted``: how many tokens the client had of each choice; ``client_attempt``: the client's own.
    ``tenant``: a digest."""

    id: int
    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    n: int = 1
    session: str = ""
    credit: int = UNLIMITED
    deadline_s: float | None = None
    emitted: list[int] = []
    client_attempt: int = 0
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0


class PlacedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """A Submit message to a replica. ``name``: the choice's lasting name at leaders; ``emitted``: how many tokens it has already."""

    stream: int
    attempt: int
    name: str
    prompt_tokens: int
    emitted: int = 0
    credit: int = UNLIMITED
    deadline_ms: int | None = None


class SendRecord(msgspec.Struct, frozen=True, kw_only=True, tag="send"):
    """A ``SendMessage``."""

    peer: bytes
    message: PlacedRecord | Attach | Cancel | Credit | RouterHeartbeat | Bye


class DeliverRecord(msgspec.Struct, frozen=True, kw_only=True, tag="deliver"):
    """A ``DeliverTokens`` to so many choices; which tokens follows from the event."""

    choices: int


class PromptLogprobsRecord(msgspec.Struct, frozen=True, kw_only=True, tag="prompt_logprobs"):
    """A ``DeliverPromptLogprobs``."""

    id: int
    choice: int


class CachedTokensRecord(msgspec.Struct, frozen=True, kw_only=True, tag="cached_tokens"):
    """A ``DeliverCachedTokens``."""

    id: int
    choice: int
    cached_tokens: int


class FinishRecord(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """A ``FinishChoice``."""

    id: int
    choice: int
    reason: FinishReason
    usage: Usage


class FailRecord(msgspec.Struct, frozen=True, kw_only=True, tag="fail"):
    """A ``FailChoice``."""

    id: int
    choice: int
    code: str


#: Stands for logprobs that were refused.
_INVALID = Logprobs(-1, None, [], [])
#: Events that are kept as they are.
PlainEvent: TypeAlias = CancelRequest | StopChoice | AddCredit | PeerUnreachable | Tick | StopAccepting | AbortAll
KeptEvent: TypeAlias = SubmitRecord | MessageRecord | PlainEvent
KeptAction: TypeAlias = SendRecord | DeliverRecord | PromptLogprobsRecord | CachedTokensRecord | FinishRecord | FailRecord


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event and what it led to. ``at``: the core's time, seconds. ``cached``: what the prefix lookup answered, one list a placement.
    ``refused``: the code of the error with which a request was refused."""

    at: float
    event: KeptEvent
    cached: list[list[int]] = []
    actions: list[KeptAction] = []
    refused: str = ""


def record_message(peer: bytes, user: str, message: FromReplica, invalid: list[int], invalid_prompts: list[int]) -> MessageRecord:
    """What is kept of a ``ReplicaMessage``; ``user``: a digest; ``invalid`` and ``invalid_prompts``: as in :class:`TokensRecord`."""
    kept = _without_content(message)
    if isinstance(kept, TokensRecord) and (invalid or invalid_prompts):
        kept = msgspec.structs.replace(kept, invalid=invalid, invalid_prompts=invalid_prompts)
    return MessageRecord(peer=peer, user=user, message=kept)


def record_event(event: SubmitRequest | PlainEvent, digest: Callable[[str], str]) -> KeptEvent:
    """What is kept of any other event; ``digest`` gives what stands for a tenant."""
    if isinstance(event, SubmitRequest):
        request = event.request
        return SubmitRecord(
            id=event.id, request_id=request.request_id, model=request.model, prompt_tokens=len(request.prompt_ids),
            max_tokens=request.params.max_tokens, n=request.n, session=event.session, credit=request.credit, deadline_s=request.deadline_s,
            emitted=[len(tokens) for tokens in request.emitted], client_attempt=request.client_attempt, tenant=digest(request.tenant),
            weight=request.weight, priority=request.priority,
        )  # fmt: skip
    return event


def _without_content(message: FromReplica) -> Hello | Accepted | Heartbeat | TokensRecord | Done | Failed | Bye:
    if isinstance(message, Tokens):
        return TokensRecord(
            boot=message.boot, streams=message.streams, attempts=message.attempts, firsts=message.firsts,
            counts=list(map(len, message.tokens)), prompts=[stream for stream, _ in message.prompt_logprobs or ()],
            cached=message.cached or [],
        )  # fmt: skip
    if isinstance(message, Heartbeat):
        return without_lists(message)
    if isinstance(message, Accepted):
        return Accepted(boot=message.boot, stream=message.stream, attempt=message.attempt)
    if isinstance(message, Done):
        return msgspec.structs.replace(message, stop_id=None, text="")
    if isinstance(message, Failed):
        return msgspec.structs.replace(message, message="")
    if isinstance(message, Bye):
        return msgspec.structs.replace(message, reason=message.reason[:MAX_REASON])
    return message


def event_of(record: KeptEvent) -> RouterEvent:
    """An event that has the same effect on the core as the one that ``record`` was made of."""
    if isinstance(record, MessageRecord):
        return ReplicaMessage(peer=record.peer, user=record.user, message=_message_of(record.message))
    if isinstance(record, SubmitRecord):
        request = RouterRequest(
            client="", request_id=record.request_id, model=record.model, prompt_ids=[0] * record.prompt_tokens,
            params=SamplingParams(max_tokens=record.max_tokens), n=record.n, credit=record.credit, deadline_s=record.deadline_s,
            emitted=[[0] * count for count in record.emitted], client_attempt=record.client_attempt, tenant=record.tenant,
            weight=record.weight, priority=record.priority,
        )  # fmt: skip
        return SubmitRequest(id=record.id, request=request, session=record.session)
    return record


def _message_of(record: Hello | Accepted | Heartbeat | TokensRecord | Done | Failed | Bye) -> FromReplica:
    if isinstance(record, TokensRecord):
        bad = record.invalid_prompts
        prompts = [(stream, [_INVALID] if i in bad else []) for i, stream in enumerate(record.prompts)]
        return Tokens(
            boot=record.boot, streams=record.streams, attempts=record.attempts, firsts=record.firsts,
            tokens=[[UNLIMITED if i in record.invalid else 0] * count for i, count in enumerate(record.counts)],
            prompt_logprobs=prompts or None,
            cached=record.cached or None,
        )  # fmt: skip
    return record


def record_action(action: Action, id_of: Callable[[Any], int]) -> KeptAction:
    """What is kept of ``action``; ``id_of`` gives the id of the request that an owner stands for."""
    if isinstance(action, DeliverTokens):
        return DeliverRecord(choices=len(action.deliveries))
    if isinstance(action, SendMessage):
        return SendRecord(peer=action.peer, message=_record_sent(action.message))
    if isinstance(action, FinishChoice):
        return FinishRecord(id=id_of(action.owner), choice=action.choice, reason=action.reason, usage=action.usage)
    if isinstance(action, DeliverPromptLogprobs):
        return PromptLogprobsRecord(id=id_of(action.owner), choice=action.choice)
    if isinstance(action, DeliverCachedTokens):
        return CachedTokensRecord(id=id_of(action.owner), choice=action.choice, cached_tokens=action.cached_tokens)
    return FailRecord(id=id_of(action.owner), choice=action.choice, code=action.error.code)


def _record_sent(message: ToReplica) -> PlacedRecord | Attach | Cancel | Credit | RouterHeartbeat | Bye:
    if isinstance(message, Submit):
        return PlacedRecord(
            stream=message.stream, attempt=message.attempt, name=message.request_id, prompt_tokens=len(message.prompt_ids),
            emitted=len(message.task.emitted), credit=message.task.credit, deadline_ms=message.deadline_ms,
        )  # fmt: skip
    if isinstance(message, Attach):
        return msgspec.structs.replace(message, client="")
    if isinstance(message, RouterHeartbeat):
        return msgspec.structs.replace(message, routers=(), keys=None)
    assert isinstance(message, Cancel | Credit | Bye), "a router drains no replica"
    return message
