"""The RPC server: Generate, Cancel, Credit and Query from clients, and one Tokens message a step to each of them.

Owns the live calls by name and by stream, a bounded record of ended calls, and the messages that this turn of the event loop will send to
each client. Bodies pass the same checks as HTTP's. A request with token ids in and out uses no tokenizer. The dispatcher decides where a
request runs.

A call lives until its last terminal message. A client that cannot be reached has :data:`GONE_S` to come back and repeat its Generate,
which attaches it to the live call; then its calls are cancelled. Bounds: of live calls and their bodies those of
:mod:`orchestrator.router.tenant_caps`; :data:`MAX_ENDED` ended calls with :data:`MAX_ENDED_TOKENS` tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from orchestrator.auth.api_keys import EVERYONE, Tenant
from orchestrator.auth.curve_acl import CurveAcl
from orchestrator.router import request_context
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.diagnostics import Diagnostics
from orchestrator.router.frontend import schema
from orchestrator.router.frontend.detokenizer import Detokenizer
from orchestrator.router.frontend.preprocess import CallerContext, PreparedRequest, Preprocessor
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.metrics import Metrics
from orchestrator.router.rpc.call import Outgoing, RpcCall, Submission
from orchestrator.router.tenant_caps import TenantCaps
from workers.protocol import messages
from workers.protocol.errors import DeadlineExceeded, EngineFault, NotFound, Overloaded, Rejected, TriremeError, printable
from workers.protocol.messages import UNLIMITED, Accepted, Cancel, Credit, Failed, Generate, Malformed, Query, Report, ToClient, Tokens
from workers.protocol.status import RpcStatus

#: Seconds that a lost client has to come back to its calls; with the time between two heartbeats, they are dropped within 2 s.
GONE_S = 1.5
#: Ended calls that can still be repeated, and the tokens of all of these.
MAX_ENDED, MAX_ENDED_TOKENS = 512, 500_000
#: Longest request id and nonce of a client, characters; the largest attempt (the attempts at replicas are counted from a multiple of it).
MAX_REQUEST_ID, MAX_ATTEMPT = 128, 2**31 - 1
#: The name of every client on an ``ipc://`` socket: its folder is open to this user only.
LOCAL = "local"

log = logging.getLogger("trireme.rpc")


class RpcServer:
    """``acl`` knows the tenants of the clients, ``caps`` counts what they have under way. ``send(peer, frame)`` gives a frame to a client's
    connection; False = it is gone. ``clock``: monotonic seconds."""

    def __init__(
        self, *, boot: str, dispatcher: Dispatcher, preprocessor: Preprocessor, metrics: Metrics, acl: CurveAcl, caps: TenantCaps,
        send: Callable[[bytes, bytes], bool], clock: Callable[[], float], diagnostics: Diagnostics,
    ) -> None:  # fmt: skip
        self._boot, self._dispatcher, self._preprocessor, self._metrics = boot, dispatcher, preprocessor, metrics
        self._acl, self._caps, self._send, self._clock, self._diagnostics = acl, caps, send, clock, diagnostics
        self._live: dict[tuple[str, str], RpcCall] = {}
        self._streams: dict[tuple[str, str, int], RpcCall] = {}
        self._ended: OrderedDict[tuple[str, str], RpcCall] = OrderedDict()
        self._ended_tokens = 0
        self._outgoing: dict[bytes, Outgoing] = {}
        #: Those of them that have something to send.
        self._waiting: list[Outgoing] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.malformed = 0

    @property
    def live(self) -> int:
        return len(self._live)

    # --- from clients

    def on_frame(self, peer: bytes, user: str, frame: bytes | memoryview) -> None:
        try:
            message = messages.decode_from_client(frame)
        except Malformed as error:
            self.on_malformed(peer, str(error))
            return
        client = user or LOCAL
        try:
            if isinstance(message, Generate):
                self._generate(peer, client, message, len(frame))
            elif isinstance(message, Cancel):
                self._cancel(client, message)
            elif isinstance(message, Credit):
                self._credit(client, message)
            else:
                self._query(peer, client, message)
        except TriremeError as error:
            if isinstance(message, Generate):
                self._metrics.refused(error.code)
            stream = message.streams[0] if isinstance(message, Credit) and message.streams else getattr(message, "stream", 0)
            self._refuse(peer, stream, getattr(message, "attempt", 0), error)

    def on_malformed(self, peer: bytes, why: str = "not one frame") -> None:
        self.malformed += 1
        self._refuse(peer, 0, 0, Malformed("malformed message", why))

    def _generate(self, peer: bytes, client: str, message: Generate, size: int) -> None:
        _check_generate(message)
        name = (client, message.request_id)
        have = [len(ids) for ids in message.journal.emitted] if message.journal is not None else []
        known = self._live.get(name) or self._ended.get(name)
        if known is not None and known.continues(have):
            self._attach(known, peer, client, message, have)
            return
        if known is not None:
            # The client continued at another router meanwhile: the journal that it sends now is the truth.
            self._discard(known)
        tenant = self._tenant(client).name or (client if client != LOCAL else f"{LOCAL}/{peer.hex()}")
        place = self._caps.enter(tenant)
        try:
            place.add(size)
        except Overloaded:
            place.leave()
            raise
        out = self._outgoing_of(peer)
        call = RpcCall(name, self._boot, message.texts, out, self._on_ended, tenant=tenant, place=place, granted=message.credit)
        self._live[name] = call
        call.attach(out, message.boot, message.stream, message.attempt)
        self._streams[client, message.boot, message.stream] = call
        self._start(self._begin(call, message))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _attach(self, call: RpcCall, peer: bytes, client: str, message: Generate, have: list[int]) -> None:
        """A repeated Generate: continue the same call after the tokens that the client says it has (none, without a journal)."""
        self._streams.pop((client, call.client_boot, call.stream), None)
        call.attach(self._outgoing_of(peer), message.boot, message.stream, message.attempt)
        if call.name in self._live:
            self._streams[client, message.boot, message.stream] = call
        if call.submission is not None:
            self._flush()
            self._give(peer, msgspec.structs.replace(call.submission.accepted, stream=message.stream, attempt=message.attempt))
        call.replay(have)
        call.add_credit(call.lacking(have, message.credit))

    async def _begin(self, call: RpcCall, message: Generate) -> None:
        """The edge of one request: an error in it ends this request only."""
        request_context.enter(call.name[1], "", call.tenant)
        try:
            await self._prepare_and_submit(call, message)
        except TriremeError as error:
            self._metrics.refused(error.code)
            self._reject(call, error)
        except Exception:
            log.exception("request %s failed at the RPC server", ascii(call.name[1]))
            self._reject(call, EngineFault("the router failed on this request", code="internal_error"))

    async def _prepare_and_submit(self, call: RpcCall, message: Generate) -> None:
        fields = await self._preprocessor.decode(message.body)
        body = schema.read(message.endpoint, fields, on_unknown=lambda names: self._metrics.ignored_fields(len(names)))
        deadline = None if message.deadline_ms is None else min(message.deadline_ms, UNLIMITED) / 1000.0
        caller = CallerContext(
            client=call.name[0], request_id=call.name[1], tenant=self._tenant(call.name[0]), credit=message.credit, deadline_s=deadline,
            journal=message.journal,
        )  # fmt: skip
        prepared = await self._preprocessor.prepare(body, caller)
        if len(prepared.requests) != 1:
            raise Rejected("one prompt a request here", "a list of prompts is HTTP's", "send one request per prompt", param="prompt")
        if call.cancelled:
            return
        request = prepared.requests[0]
        if len(request.emitted) not in (0, request.n):
            raise Rejected(f"the journal holds {len(request.emitted)} choices of {request.n}", param="journal")
        emitted = request.emitted or [[] for _ in range(request.n)]
        self._submit(call, msgspec.structs.replace(request, client_attempt=message.attempt, emitted=emitted), prepared)

    def _submit(self, call: RpcCall, request: RouterRequest, prepared: PreparedRequest) -> None:
        rule, prompt_tokens = prepared.rule, len(request.prompt_ids)
        meter = self._metrics.request(request.model, choices=request.n, prompt_tokens=prompt_tokens)
        detokenizer: Detokenizer | None = None
        if not call.texts and not rule.stops and not rule.json:
            call.open(request.emitted, meter)
        else:
            call.open([list(ids) for ids in request.emitted])
            detokenizer = Detokenizer(
                prepared.model.table, rule, call, stop_choice=call.stop_choice, choices=request.n, prompt_tokens=prompt_tokens, meter=meter,
                emitted=request.emitted,
            )  # fmt: skip
        ticket = self._dispatcher.submit(request, detokenizer or call, meter)
        meter.admitted()
        accepted = Accepted(
            boot=self._boot, stream=call.stream, attempt=call.attempt, seed=request.params.seed, prompt_ids=request.prompt_ids,
            prompt_tokens=prompt_tokens,
        )  # fmt: skip
        call.submission = Submission(ticket=ticket, meter=meter, accepted=accepted)
        if detokenizer is not None:
            detokenizer.end_stopped()
        self._give(call.out.peer, accepted)

    def _cancel(self, client: str, message: Cancel) -> None:
        call = self._streams.get((client, message.boot, message.stream))
        if call is None:
            raise NotFound("no such live request")
        self._drop(call)

    def _credit(self, client: str, message: Credit) -> None:
        if len(message.streams) != len(message.tokens) or not all(0 < tokens <= UNLIMITED for tokens in message.tokens):
            raise Rejected("credit is a positive count for each stream", param="tokens")
        for stream, tokens in zip(message.streams, message.tokens, strict=True):
            call = self._streams.get((client, message.boot, stream))
            if call is not None:
                call.add_credit(tokens)

    def _query(self, peer: bytes, client: str, message: Query) -> None:
        tenant = self._tenant(client)
        if message.what != "models" and not tenant.sees_all:
            raise NotFound(f"no {message.what} for a key that is bound to models")
        if message.what == "dump":
            self._start(self._dump(peer, message))
            return
        if message.what == "metrics":
            body = self._metrics.render()
        elif message.what == "story":
            body = msgspec.json.encode(self._diagnostics.story(message.about))
        elif message.what == "usage":
            body = msgspec.json.encode(self._diagnostics.usage())
        elif message.what == "models":
            cards = [model.card for model in self._preprocessor.models(tenant)]
            body = msgspec.json.encode(
                [{"id": card.name, "aliases": card.aliases, "status": self._dispatcher.model(card.name)} for card in cards]
            )
        else:
            rpc = RpcStatus(live=len(self._live), malformed=self.malformed)
            defaults = self._preprocessor.defaults()
            status = msgspec.structs.replace(self._dispatcher.status(), default_sampling_params=defaults, rpc=rpc)
            body = msgspec.json.encode(status)
        self._give(peer, Report(boot=self._boot, stream=message.stream, body=body))

    async def _dump(self, peer: bytes, message: Query) -> None:
        try:
            report = await self._diagnostics.dump()
        except TriremeError as error:
            self._refuse(peer, message.stream, 0, error)
        else:
            self._give(peer, Report(boot=self._boot, stream=message.stream, body=msgspec.json.encode(report)))

    def _tenant(self, client: str) -> Tenant:
        return EVERYONE if client == LOCAL else self._acl.tenant(client)

    # --- to clients

    def _outgoing_of(self, peer: bytes) -> Outgoing:
        """What is sent to this client next."""
        out = self._outgoing.get(peer)
        if out is None:
            out = self._outgoing[peer] = Outgoing(peer, self._on_waiting)
        return out

    def _on_waiting(self, out: Outgoing) -> None:
        """Send it at the end of this turn of the event loop, when all messages of the step have been read."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(out)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for out in waiting:
            for message in out.take(self._boot):
                if not self._give(out.peer, message):
                    break

    def _give(self, peer: bytes, message: ToClient) -> bool:
        if self._send(peer, messages.encode(message)):
            return True
        now = self._clock()
        for call in self._live.values():
            if call.out.peer == peer and call.lost_at is None:
                call.lost_at = now
        return False

    def _refuse(self, peer: bytes, stream: int, attempt: int, error: TriremeError) -> None:
        self._give(
            peer,
            Failed(
                boot=self._boot, stream=stream, attempt=attempt, code=error.code, message=printable(messages.error_text(error)),
                retry_after=error.retry_after, param=error.param,
            ),
        )  # fmt: skip

    # --- time and ends

    def pulse(self) -> None:
        """The heartbeat: tell every client which of its calls live here, and drop the calls of clients that stay away. A client that comes
        back and does not find its stream in the heartbeat sends its Generate again."""
        now = self._clock()
        self._flush()
        calls_of: dict[bytes, list[RpcCall]] = {}
        for call in self._live.values():
            calls_of.setdefault(call.out.peer, []).append(call)
        self._outgoing = {peer: out for peer, out in self._outgoing.items() if peer in calls_of}
        for peer, calls in calls_of.items():
            streams, attempts = [call.stream for call in calls], [call.attempt for call in calls]
            nothing: list[list[int]] = [[]] * len(calls)
            self._give(peer, Tokens(boot=self._boot, streams=streams, attempts=attempts, firsts=[0] * len(calls), tokens=nothing))
        for call in [call for call in self._live.values() if call.lost_at is not None and now - call.lost_at > GONE_S]:
            self._metrics.disconnected()
            self._drop(call)

    def close(self) -> None:
        """Send what waits, and end the preparation of requests."""
        for task in self._tasks:
            task.cancel()
        self._flush()

    def _reject(self, call: RpcCall, error: TriremeError) -> None:
        self._refuse(call.out.peer, call.stream, call.attempt, error)
        self._forget(call)

    def _drop(self, call: RpcCall) -> None:
        call.cancelled = True
        if call.submission is not None:
            call.submission.ticket.cancel()
            call.submission.meter.left()
        self._forget(call)

    def _discard(self, call: RpcCall) -> None:
        """Drop the call, live or ended, so that its name is free."""
        self._drop(call)
        if self._ended.pop(call.name, None) is not None:
            self._ended_tokens -= call.size

    def _forget(self, call: RpcCall) -> None:
        call.place.leave()
        self._live.pop(call.name, None)
        self._streams.pop((call.name[0], call.client_boot, call.stream), None)

    def _on_ended(self, call: RpcCall) -> None:
        self._forget(call)
        if not call.repeatable:
            return
        self._ended[call.name] = call
        self._ended_tokens += call.size
        while len(self._ended) > MAX_ENDED or self._ended_tokens > MAX_ENDED_TOKENS:
            _, oldest = self._ended.popitem(last=False)
            self._ended_tokens -= oldest.size


def _check_generate(message: Generate) -> None:
    """Bounds of the fields that are kept or counted with. Raises Rejected and DeadlineExceeded."""
    if not 0 < len(message.request_id) <= MAX_REQUEST_ID or not message.request_id.isprintable():
        raise Rejected(f"a request id is 1 to {MAX_REQUEST_ID} printable characters", param="request")
    if len(message.boot) > MAX_REQUEST_ID:
        raise Rejected(f"a nonce has at most {MAX_REQUEST_ID} characters", param="boot")
    if not 1 <= message.credit <= UNLIMITED:
        raise Rejected(f"credit is between 1 and {UNLIMITED}", param="credit")
    if message.journal is not None and len(message.journal.prompt_ids) + sum(map(len, message.journal.emitted)) > messages.MAX_IDS:
        raise Rejected(f"a journal holds at most {messages.MAX_IDS} token ids", param="journal")
    if not 0 <= message.attempt <= MAX_ATTEMPT:
        raise Rejected(f"an attempt is between 0 and {MAX_ATTEMPT}", param="attempt")
    if message.deadline_ms is not None and message.deadline_ms <= 0:
        raise DeadlineExceeded("the request's deadline has passed", "it arrived with no time left")
