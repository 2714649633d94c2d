"""The client's protocol without sockets: journals, moves between routers, what ends a request."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.client import requests
from orchestrator.client.protocol import ROUNDS, WINDOW, ClientExchange, ClientProtocol
from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router.rpc.call import Outgoing, RpcCall
from orchestrator.router.tenant_caps import TenantCaps
from workers.protocol import messages as wire
from workers.protocol.errors import Cancelled, DeadlineExceeded, Overloaded, Rejected, Unavailable
from workers.protocol.messages import Accepted, Cancel, Credit, Done, Failed, Generate, Journal, Query, Report, ToClient, Tokens, Usage


def exchange(deadline: float | None = None, **options: Any) -> ClientExchange:
    return requests.complete([1, 2], options, model="m", request="q", deadline=deadline, texts=True)


def sent(session: ClientProtocol) -> list[tuple[int, Any]]:
    messages = [(router, wire.decode_from_client(frame)) for router, frame in session.outbox]
    session.outbox.clear()
    return messages


def say(session: ClientProtocol, router: int, message: ToClient, now: float = 0.0) -> None:
    session.received(router, wire.encode(message), now)


def tokens(stream: int, first: int, ids: list[int], *, attempt: int = 0, choice: int = 0) -> Tokens:
    texts = ["".join(map(chr, ids))]
    return Tokens(
        boot="R", streams=[stream], attempts=[attempt], firsts=[first], tokens=[ids], texts=texts, choices=[choice] if choice else None
    )  # fmt: skip


def begin(routers: int = 2) -> tuple[ClientProtocol, ClientExchange]:
    session, asked = ClientProtocol("c", routers, silence_s=2.0), exchange()
    session.ask(asked, 0.0)
    say(session, 0, Accepted(boot="R", stream=1, attempt=0, seed=42, prompt_ids=[1, 2], prompt_tokens=2))
    say(session, 0, tokens(1, 0, [97, 98]))
    return session, asked


def run(session: ClientProtocol, begin: float, end: float) -> None:
    """The client runs, and hears nothing."""
    for tick in range(1, round((end - begin) * 10) + 1):
        session.tick(begin + tick / 10)


def test_a_client_that_was_frozen_does_not_leave_its_router() -> None:
    session, asked = begin()
    sent(session)
    run(session, 0.0, 1.0)
    session.tick(61.0)
    run(session, 61.0, 61.7)
    assert sent(session) == [] and asked.attempt == 0
    run(session, 61.7, 63.0)
    assert asked.attempt == 1, "it ran for more than two seconds and heard nothing"


def test_a_silent_router_is_left_with_the_journal() -> None:
    session, asked = begin()
    assert isinstance(sent(session)[0][1], Generate)
    run(session, 0.0, 2.0)
    assert sent(session) == [] and session.resets == {}
    session.tick(2.1)
    ((router, generate),) = sent(session)
    assert router == 1 and session.resets == {0: None}, "what is queued for the silent one is dropped"
    assert generate.request_id == "q" and generate.attempt == 1
    assert generate.journal == Journal(prompt_ids=[1, 2], seed=42, emitted=[[97, 98]])
    say(session, 0, tokens(1, 2, [120]), 2.2)
    say(session, 1, tokens(generate.stream, 0, [97], attempt=1), 2.2)
    say(session, 1, tokens(generate.stream, 2, [99], attempt=1), 2.2)
    usage = Usage(prompt_tokens=2, output_tokens=3)
    say(session, 1, Done(boot="S", stream=generate.stream, attempt=1, reason="stop", usage=usage, text="!"), 2.3)
    reply = asked.reply()
    assert (reply.tokens, reply.text, reply.seed, reply.attempts) == ([97, 98, 99], "abc!", 42, 1)
    assert [(piece.first, piece.tokens) for piece in asked.pieces] == [(0, [97, 98]), (2, [99]), (3, [])]
    assert session.live == 0


def test_before_accepted_the_request_is_asked_anew() -> None:
    session, asked = ClientProtocol("c", 2), exchange()
    session.ask(asked, 0.0)
    session.unreachable(0, 0.1)
    (_, first), (router, second) = sent(session)
    assert router == 1 and second.journal is None and second.request_id == first.request_id


def test_keepalives_hold_a_quiet_router_for_what_they_name() -> None:
    """A router that dropped a request while the client was away must not be waited for because it answers others."""
    session, asked = begin()
    other = exchange()
    session.ask(other, 0.0)
    for second in range(20):
        say(session, 0, tokens(1, 0, []), float(second))
        run(session, float(second), second + 1.0)
    assert asked.attempt == 0 and not asked.ended and len(asked.pieces) == 1
    assert other.attempt > 0, "nobody named it: it was asked for again"


def test_a_choice_that_has_ended_takes_no_more() -> None:
    """The router after a dead one runs all choices again; those that the client has whole stay as they are."""
    session, asked = ClientProtocol("c", 2), exchange(n=2)
    session.ask(asked, 0.0)
    say(session, 0, Accepted(boot="R", stream=1, attempt=0, seed=1, prompt_ids=[1, 2], prompt_tokens=2))
    say(session, 0, tokens(1, 0, [97]))
    say(session, 0, Done(boot="R", stream=1, attempt=0, reason="stop", usage=Usage(prompt_tokens=2, output_tokens=1)))
    session.unreachable(0, 0.1)
    say(session, 1, tokens(2, 1, [98], attempt=1), 0.2)
    say(session, 1, tokens(2, 0, [99], attempt=1, choice=1), 0.2)
    usage = Usage(prompt_tokens=2, output_tokens=1)
    say(session, 1, Done(boot="S", stream=2, attempt=1, reason="stop", usage=usage, choice=1), 0.2)
    assert [choice.tokens for choice in asked.reply().choices] == [[97], [99]]


def test_an_end_before_its_tokens_is_no_end() -> None:
    session, asked = begin()
    sent(session)
    say(session, 0, Done(boot="R", stream=1, attempt=0, reason="stop", usage=Usage(prompt_tokens=2, output_tokens=3)), 0.5)
    ((router, generate),) = sent(session)
    assert not asked.ended and router == 1 and generate.journal.emitted == [[97, 98]]


def test_no_router_at_all_ends_in_unavailable() -> None:
    session, asked = ClientProtocol("c", 2, silence_s=1.0), exchange()
    session.ask(asked, 0.0)
    run(session, 0.0, 2.0 * 2 * ROUNDS)
    with pytest.raises(Unavailable) as caught:
        asked.reply()
    assert caught.value.request == "q" and len(sent(session)) == 2 * ROUNDS


def test_an_overloaded_router_is_tried_once_each() -> None:
    session, asked = ClientProtocol("c", 2), exchange()
    session.ask(asked, 0.0)
    say(session, 0, Failed(boot="R", stream=1, attempt=0, code="overloaded", message="full", retry_after=3.0))
    assert not asked.ended and session.resets == {}
    say(session, 1, Failed(boot="S", stream=2, attempt=1, code="overloaded", message="full", retry_after=3.0))
    with pytest.raises(Overloaded) as caught:
        asked.reply()
    assert caught.value.retry_after == 3.0


def test_a_refusal_is_final_and_names_the_field() -> None:
    session, asked = ClientProtocol("c", 2), exchange()
    session.ask(asked, 0.0)
    say(session, 0, Failed(boot="R", stream=1, attempt=0, code="invalid_request", message="no", param="max_tokens"))
    with pytest.raises(Rejected) as caught:
        asked.reply()
    assert caught.value.param == "max_tokens" and caught.value.request == "q"


def test_deadline_and_cancel_tell_the_router() -> None:
    session, late, left = ClientProtocol("c", 1), exchange(deadline=5.0), exchange()
    session.ask(late, 0.0)
    session.ask(left, 0.0)
    assert [message.deadline_ms for _, message in sent(session)] == [5000, None]
    session.cancel(left)
    say(session, 0, tokens(1, 0, []), 5.0)
    session.tick(5.0)
    assert [message.stream for _, message in sent(session) if isinstance(message, Cancel)] == [2, 1]
    assert isinstance(late.error, DeadlineExceeded) and isinstance(left.error, Cancelled)


def test_choices_are_kept_apart() -> None:
    session, asked = ClientProtocol("c", 1), exchange(n=2)
    session.ask(asked, 0.0)
    say(session, 0, tokens(1, 0, [97]))
    say(session, 0, tokens(1, 0, [98], choice=1))
    for choice in (1, 0):
        assert not asked.ended
        say(session, 0, Done(boot="R", stream=1, attempt=0, reason="length", usage=Usage(prompt_tokens=2, output_tokens=1), choice=choice))
    assert [choice.text for choice in asked.reply().choices] == ["a", "b"]


def test_credit_is_renewed_by_what_was_taken_in() -> None:
    session, asked = ClientProtocol("c", 2), exchange(n=2)
    session.ask(asked, 0.0)
    assert sent(session)[0][1].credit == WINDOW
    half = [97] * (WINDOW // 2)
    say(session, 0, tokens(1, 0, half[1:]))
    assert sent(session) == []
    say(session, 0, tokens(1, WINDOW // 2 - 1, [98]))
    assert sent(session) == [(0, Credit(boot="c", streams=[1], tokens=[WINDOW // 2]))]
    say(session, 0, tokens(1, 0, half, choice=1))
    assert sent(session) == [], "credit is for all choices alike: the furthest counts"
    session.unreachable(0, 0.1)
    ((router, again),) = sent(session)
    assert router == 1 and again.credit == WINDOW, "beyond what the journal holds"
    say(session, 1, tokens(2, WINDOW // 2, half, attempt=1))
    assert sent(session) == [(1, Credit(boot="c", streams=[2], tokens=[WINDOW // 2]))]


def test_queries_are_answered_by_report() -> None:
    session = ClientProtocol("c", 1)
    query = session.query("models", 0.0, 10.0)
    ((_, message),) = sent(session)
    assert isinstance(message, Query) and message.what == "models"
    say(session, 0, Report(boot="R", stream=message.stream, body=b"[]"))
    assert query.answer() == b"[]"


def test_a_router_goes_on_from_its_own_record_only_where_that_joins_the_journal() -> None:
    """A client may return with more than this router sent, or with deliveries cut elsewhere: then its journal is what counts."""
    outgoing = Outgoing(b"p", lambda out: None)
    call = RpcCall(("c", "q"), "R", True, outgoing, lambda call: None, tenant="c", place=TenantCaps(AdmissionSpec()).enter("c"))
    assert call.continues([]) and not call.continues([3]), "nothing was prepared yet"
    call.open([[95, 96]])
    call.attach(outgoing, "boot", 1, 0)
    call.on_text(0, 2, [97, 98], "ab", None)
    call.on_text(0, 4, [99], "c", None)
    assert [have for have in range(8) if call.continues([have])] == [2, 4, 5]
    outgoing.take("R")
    call.replay([4])
    (again,) = outgoing.take("R")
    assert isinstance(again, Tokens) and (again.firsts, again.tokens, again.texts) == ([4], [[99]], ["c"])


def test_a_client_that_comes_back_gets_its_window_whatever_grant_was_lost() -> None:
    outgoing = Outgoing(b"p", lambda out: None)
    call = RpcCall(("c", "q"), "R", False, outgoing, lambda call: None, tenant="c", place=TenantCaps(AdmissionSpec()).enter("c"))
    call.granted = 10
    call.open([[1, 2], []])
    assert call.lacking([2, 0], 10) == 0
    assert call.lacking([7, 1], 10) == 5, "it holds five more of one choice, and may get ten beyond them"
