"""A client that knows the expected answer: it sends a request, reads at its pace, continues at another router when its router is lost, and
checks everything.

Owns the journal of one request and the oracle's answer (:func:`workers.engines.fake.expected_tokens`). It asserts the guarantees for users:
no gap, no repeat, the right tokens, no more than the credit, and one end per choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from orchestrator.router.core.request import RouterRequest
from orchestrator.sim.schedule import Arrive
from orchestrator.sim.sim_router import SimCall, SimRouter
from orchestrator.sim.timeline import Timeline
from workers.engines.fake import BYTES_EOS, expected_tokens
from workers.protocol.errors import DeadlineExceeded, Overloaded, TriremeError
from workers.protocol.messages import UNLIMITED, FinishReason, Logprobs, SamplingParams, Usage

#: Pause before a refused or reset request is asked again; silence after which an RPC client goes elsewhere; how long a router keeps the
#: call of a client that it cannot reach. Seconds.
RETRY_S, SILENCE_S, GONE_S = 0.2, 0.5, 2.0


class SimClient:
    """Starts with :meth:`ask`. ``over``: every choice has ended, or the client has left. ``outcome`` then says how."""

    def __init__(self, asked: Arrive, timeline: Timeline, routers: Sequence[SimRouter]) -> None:
        self.asked, self._timeline, self._routers = asked, timeline, routers
        self._params = SamplingParams(
            temperature=asked.temperature, seed=asked.id * 10, max_tokens=asked.max_tokens, stop_ids=asked.stop_ids, logprobs=asked.logprobs
        )
        self._expected = [
            expected_tokens(asked.prompt, msgspec.structs.replace(self._params, seed=asked.id * 10 + choice), eos_ids=BYTES_EOS)
            for choice in range(asked.n)
        ]
        self._due = timeline.now + asked.deadline_s if asked.deadline_s is not None else None
        self._router = asked.router
        self._call: SimCall | None = None
        self._life = self._attempt = 0
        self._journal: list[list[int]] = []
        self._base = [0] * asked.n
        self._ended: set[int] = set()
        #: Choices that the client ended itself.
        self._left: set[int] = set()
        self.outcome = ""
        #: When its first token came and when it ended, seconds.
        self.first_at: float | None = None
        self.ended_at = 0.0
        self._forget()

    @property
    def over(self) -> bool:
        return bool(self.outcome)

    @property
    def tokens(self) -> int:
        return sum(map(len, self._journal))

    def _forget(self) -> None:
        self._journal = [[] for _ in range(self.asked.n)]
        self._ended = set(self._left)

    # --- what it does

    def ask(self) -> None:
        """Send the request to its router, with its journal; retry at once, or at another router, if that one cannot accept it."""
        if self.over or self._call is not None:
            return
        if self._due is not None and self._timeline.now >= self._due:
            self.outcome = "deadline"
            return
        if not self._routers[self._router].up:
            self._try_elsewhere()
            return
        continues = self.asked.frontend == "rpc" and self.tokens > 0
        self._base = list(map(len, self._journal))
        request = RouterRequest(
            client="c", request_id=f"q{self.asked.id}.{self._life}", model="m", prompt_ids=self.asked.prompt, params=self._params,
            n=self.asked.n, credit=self.asked.credit or UNLIMITED,
            deadline_s=None if self._due is None else self._due - self._timeline.now,
            tenant=self.asked.tenant, priority=self.asked.priority,
            emitted=[list(tokens) for tokens in self._journal] if continues else [], client_attempt=self._attempt,
        )  # fmt: skip
        try:
            self._call = self._routers[self._router].submit(self, request)
        except Overloaded:
            self._try_elsewhere()
            return
        for choice in self._left:
            self._call.stop_choice(choice)

    def _try_elsewhere(self) -> None:
        """HTTP clients share a port, RPC clients have a list: in both cases another router may get the request."""
        self._router = (self._router + 1) % len(self._routers)
        self._attempt += self.asked.frontend == "rpc"
        self._timeline.after(RETRY_S, self.ask)

    def leave(self, choice: int | None) -> None:
        """Cancel, or end one choice."""
        if self.over:
            return
        leaving = set(range(self.asked.n)) if choice is None else {choice} - self._ended
        call = self._call
        if leaving | self._ended >= set(range(self.asked.n)):
            self.outcome, self._call = "left", None
            if call is not None:
                call.cancel()
        elif leaving:
            self._left |= leaving
            self._ended |= leaving
            if call is not None:
                call.stop_choice(min(leaving))

    def wander(self) -> None:
        """Continue at another router; the first one keeps the call until it notices that the client is gone."""
        if self.over or self._call is None:
            return
        call, self._call = self._call, None
        self._timeline.after(GONE_S, call.cancel)
        self._router = (self._router + 1) % len(self._routers)
        self._attempt += 1
        self.ask()

    # --- what it hears

    def on_lost(self, call: SimCall) -> None:
        if call is not self._call:
            return
        self._call = None
        if self.asked.frontend == "http":
            self._anew()
        else:
            self._router = (self._router + 1) % len(self._routers)
            self._attempt += 1
            self._timeline.after(SILENCE_S, self.ask)

    def _anew(self) -> None:
        """A reset ends an HTTP answer; its client asks for another."""
        self._life += 1
        self._forget()
        self._try_elsewhere()

    def on_tokens(self, call: SimCall, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        if call is not self._call:
            return
        name = f"choice {choice} of {call.request.request_id}"
        got = self._journal[choice]
        assert first == len(got), f"{name}: token {first} after {len(got)}"
        got += tokens
        if self.first_at is None:
            self.first_at = self._timeline.now
        assert got == self._expected[choice][: len(got)], f"{name}: wrong tokens"
        assert len(got) - self._base[choice] <= call.granted, f"{name}: more tokens than granted"
        asked = self.asked.logprobs is not None
        assert not asked or [scored.token for scored in logprobs or ()] == tokens, f"{name}: logprobs of other tokens"
        if self.asked.credit:
            self._timeline.after(self.asked.pace_s, partial(call.credit, len(tokens)))

    def on_finished(self, call: SimCall, choice: int, reason: FinishReason, usage: Usage) -> None:
        if call is not self._call:
            return
        name = f"choice {choice} of {call.request.request_id}"
        got, expected = self._journal[choice], self._expected[choice]
        assert got == expected, f"{name}: ended after {len(got)} of {len(expected)} tokens"
        assert usage.output_tokens == len(got), f"{name}: {usage.output_tokens} tokens counted, {len(got)} delivered"
        assert reason == ("length" if len(got) == self.asked.max_tokens else "stop"), f"{name}: ended by {reason}"
        self._close(choice)

    def on_errored(self, call: SimCall, choice: int, error: TriremeError) -> None:
        if call is not self._call:
            return
        if isinstance(error, DeadlineExceeded):
            assert self._due is not None and self._timeline.now >= self._due - 0.001, f"{call.request.request_id}: expired early"
            self.outcome, self._call = "deadline", None
        elif isinstance(error, Overloaded):  # the router stops
            self._call = None
            if self.asked.frontend == "http":
                self._anew()
            else:
                self._try_elsewhere()
        else:
            raise AssertionError(f"choice {choice} of {call.request.request_id} failed: {error.code}: {error}")

    def _close(self, choice: int) -> None:
        self._ended.add(choice)
        call = self._call
        assert call is not None
        if call.over >= set(range(self.asked.n)):
            self.outcome, self._call = "finished", None
            self.ended_at = self._timeline.now
