"""The scheduler over a model that checks every plan, driven by hand: shared by the property tests and the unit tests of the scheduler.

Owns nothing of the product. Its checks use only :func:`workers.engines.fake.expected_tokens` and the plans, never the scheduler's own
fields.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from workers.engines.fake import FakeModel, advance, expected_tokens
from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.messages import UNLIMITED, Capacity, GenerateTask, Logprobs, SamplingParams, Submit
from workers.sampling.definition import has_token_rules
from workers.sampling.guide import Guide, GuideFactory
from workers.sampling.token_rules import TokenRules
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import PLACEHOLDER, StepPlan, decode_plan, decode_result, encode, view

EOS = (258, 256)


def capacity(
    *, block_size: int = 8, num_blocks: int = 64, slots: int = 8, tokens: int = 32, context: int = 512, stages: int = 1
) -> Capacity:
    return Capacity(
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_size=slots,
        max_num_tokens=tokens,
        max_seq_len=context,
        vocab_size=320,
        tp=1,
        pp=stages,
    )


def submit(
    prompt: list[int], params: SamplingParams, *, emitted: list[int] | None = None, salt: str = "", credit: int = UNLIMITED
) -> Submit:
    return Submit(
        boot="b", stream=0, attempt=0, client="c", request_id="r", model="m",
        prompt_ids=prompt, task=GenerateTask(params=params, emitted=emitted or [], credit=credit), salt=salt,
    )  # fmt: skip


class AuditModel(FakeModel):
    """FakeModel that reads a sequence's whole context at each step, and that fails when a block is written which another slot reads."""

    def __init__(self, limits: Capacity) -> None:
        super().__init__(limits, EOS)
        self._written: dict[int, int] = {}

    def _forward(self, table: list[int], start: int, tokens: list[int]) -> list[int]:
        size, memory = self._capacity.block_size, self._memory
        assert len(table) * size >= start + len(tokens), "a plan runs past its block table"
        places = [table[position // size] * size + position % size for position in range(start)]
        for before, place in pairwise(places):
            assert advance(memory[before], self._written[place]) == memory[place], "a sequence's context was overwritten"
        users = Counter(block for other in self._tables.values() for block in other)
        for position, token in enumerate(tokens, start):
            assert users[table[position // size]] == 1, "a shared block is written"
            self._written[table[position // size] * size + position % size] = token
        return super()._forward(table, start, tokens)


@dataclass
class Stream:
    """What a client sees of one sequence."""

    request: Submit
    tokens: list[int]
    end: Finish | Fault | None = None
    cancelled: bool = False
    prompt_logprobs: list[Logprobs] | None = None
    logprobs: list[Logprobs] = field(default_factory=list)


class Rig:
    """A scheduler, its model, the plans in flight, and every stream so far."""

    def __init__(
        self, limits: Capacity, *, guides: GuideFactory | None = None, prefix_cache: bool = True, async_scheduling: bool = False
    ) -> None:
        self.limits = msgspec.structs.replace(limits, prefix_cache=prefix_cache)
        self.guides, self.async_scheduling = guides, async_scheduling
        self.streams: dict[int, Stream] = {}
        self.now = 0.0
        self.restart()

    def restart(self) -> None:
        """Lose the replica: a fresh scheduler and model; live streams are submitted again with what they have."""
        self.scheduler = Scheduler(
            self.limits, guides=self.guides, micro_batches=self.limits.pp, async_scheduling=self.async_scheduling, eos_ids=EOS
        )
        self.model = AuditModel(self.limits)
        self.in_flight: deque[StepPlan] = deque()
        for id, stream in self.streams.items():
            if stream.end is None and not stream.cancelled:
                stream.logprobs = stream.logprobs[: len(stream.tokens)]
                self.scheduler.submit(id, submit(stream.request.prompt_ids, stream.request.task.params, emitted=list(stream.tokens)))

    def submit(self, request: Submit) -> int:
        id = len(self.streams)
        self.scheduler.submit(id, request)
        self.streams[id] = Stream(request, list(request.task.emitted))
        return id

    def cancel(self, id: int) -> None:
        self.scheduler.cancel(id)
        self.streams[id].cancelled = self.streams[id].end is None

    def schedule(self) -> StepPlan | None:
        """Ask for a plan, check it against the limits and the plans in flight, and put it in flight."""
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            return None
        plan = decode_plan(encode(plan))
        slots = view(plan.slots).tolist()
        assert 0 < len(slots) == len(set(slots)) <= self.limits.max_batch_size
        assert len(view(plan.tokens)) == view(plan.lengths).sum() <= self.limits.max_num_tokens
        assert view(plan.lengths).min() > 0
        assert len(self.in_flight) < self.limits.pp + self.async_scheduling
        beside = list(self.in_flight)[len(self.in_flight) - self.limits.pp + 1 :] if self.async_scheduling else self.in_flight
        for other in beside:
            assert set(slots).isdisjoint(view(other.slots).tolist()), "a sequence is in two plans at once"
        if plan.repeats:
            before = next(other for other in self.in_flight if other.step == plan.repeats)
            assert (before.slots, before.lengths, before.sample) == (plan.slots, plan.lengths, plan.sample) and not plan.opened
            assert (view(before.starts) + 1 == view(plan.starts)).all() and set(view(plan.tokens).tolist()) == {PLACEHOLDER}
        self.in_flight.append(plan)
        return plan

    def update(self) -> list[Emission]:
        """Run the oldest plan in flight and hand its result in."""
        emissions = self.scheduler.update_from_output(decode_result(encode(self.model.run(self.in_flight.popleft()))))
        for emission in emissions:
            stream = self.streams[emission.id]
            assert stream.end is None and not stream.cancelled, "something came after the end"
            assert emission.first == len(stream.tokens), "a token is lost or doubled"
            stream.tokens += emission.tokens
            stream.end = emission.end
            stream.logprobs += emission.logprobs or []
            if emission.prompt_logprobs is not None:
                assert stream.prompt_logprobs is None and emission.first == 0, "prompt logprobs came twice or late"
                stream.prompt_logprobs = emission.prompt_logprobs
        return emissions

    def step(self) -> None:
        """What an engine's step does: fill the pipeline, commit the oldest plan."""
        while self.schedule() is not None:
            pass
        if self.in_flight:
            self.update()

    def finish(self, id: int, limit: int = 1000) -> None:
        """Run until stream ``id`` has ended; more than ``limit`` steps is a livelock."""
        while self.streams[id].end is None:
            self.step()
            limit -= 1
            assert limit > 0, "livelock"

    def drain(self, limit: int = 20_000) -> None:
        """Grant credit to all and run until nothing is busy; more than ``limit`` steps is a livelock."""
        for id in self.streams:
            self.scheduler.credit(id, UNLIMITED)
        while self.scheduler.busy(self.now):
            self.step()
            limit -= 1
            assert limit > 0, "livelock"
        self.scheduler.check()

    def verify(self) -> None:
        """Every stream is a prefix of what it should be; the ended ones are whole."""
        for stream in self.streams.values():
            request = stream.request
            guide = self._guide(request.task.params)
            expected = expected_tokens(request.prompt_ids, request.task.params, eos_ids=EOS, guide=guide)
            if stream.end is None:
                assert stream.tokens == expected[: len(stream.tokens)]
            else:
                assert isinstance(stream.end, Finish), stream.end
                assert stream.tokens == expected
                whole = guide is not None and guide.done()
                assert stream.end.reason == ("length" if len(expected) == request.task.params.max_tokens and not whole else "stop")
                assert stream.end.usage.output_tokens == len(expected)

    def _guide(self, params: SamplingParams) -> Guide | None:
        guide = self.guides(params.guide) if self.guides and params.guide else None
        return TokenRules(params, self.limits.vocab_size, EOS, guide) if has_token_rules(params) else guide

    def idle(self) -> bool:
        """Whether all blocks are back."""
        return self.scheduler.stats().free_blocks == self.limits.num_blocks and self.scheduler.stats().running == 0
