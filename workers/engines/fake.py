"""FakeEngine: the real scheduler over a model made of integers; each of its tokens can be recomputed from the prompt.

Owns a K/V memory of one number per token: position p holds a hash of tokens 0..p. The hash is computed from the number at p - 1, which is
read through the sequence's block table, as attention does. So a block that is wrongly shared, freed, overwritten or skipped leads to a
wrong token. Must use only what the plans contain. Its resume class is bitwise: a token is a function of the known prefix, and of the seed
when temperature > 0.

:func:`expected_tokens` is the oracle: it recomputes a stream without blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from workers.engines.scheduled import ScheduledEngine
from workers.protocol.engine import Emission
from workers.protocol.messages import Capacity, Logprobs, SamplingParams
from workers.protocol.specs import FakeSpec, Parallel
from workers.protocol.status import EngineStats
from workers.sampling.definition import allowed_ids, stop_set
from workers.sampling.guide import Guide, GuideFactory
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_plan import F32, PLACEHOLDER, OpenSlot, StepPlan, StepResult, column, view

#: Ids that can be sampled without a guide: printable ASCII in a byte-level vocabulary.
PRINTABLE = range(32, 127)
#: Size and end-of-sequence ids of the vocabulary if no artifact defines them: bytes and a few special tokens.
BYTES, BYTES_EOS = 320, (258, 256)
#: Default size of the pool and of the context, tokens.
KV_TOKENS = 65536

SINGLE = Parallel()

_MASK64 = 2**64 - 1
_ROOT = 0x243F6A8885A308D3


def advance(state: int, token: int) -> int:
    """The hash of a prefix extended by one token."""
    state = ((state ^ (token + 1)) * 0x9E3779B97F4A7C15) & _MASK64
    return state ^ (state >> 29)


def state_of(tokens: Iterable[int]) -> int:
    """The hash of a whole prefix."""
    state = _ROOT
    for token in tokens:
        state = advance(state, token)
    return state


def pick(state: int, params: SamplingParams, first: int, eos_ids: Iterable[int], mask: bytes | None, vocab_size: int) -> int:
    """The token at output position ``first`` after the prefix ``state``; -1 if the guide's ``mask`` allows none."""
    if params.temperature > 0:
        state = advance(state, params.seed)
    if mask is None and first >= params.min_tokens:
        return PRINTABLE[state % len(PRINTABLE)]
    candidates: Sequence[int] = PRINTABLE if mask is None else np.flatnonzero(allowed_ids(mask, vocab_size)).tolist()
    if first < params.min_tokens:
        banned = stop_set(params, eos_ids)
        candidates = [token for token in candidates if token not in banned]
    return candidates[state % len(candidates)] if candidates else -1


def score(state: int, token: int, count: int) -> Logprobs:
    """Invented log-probabilities of the token after the prefix ``state``: a ranking that starts at the greedy token and falls by 1/8 per
    place."""
    best = state % len(PRINTABLE)
    rank = (PRINTABLE.index(token) - best) % len(PRINTABLE) if token in PRINTABLE else len(PRINTABLE)
    ids = [PRINTABLE[(best + i) % len(PRINTABLE)] for i in range(count)]
    return Logprobs(token, -(rank + 1) / 8, ids, [-(i + 1) / 8 for i in range(count)])


def expected_tokens(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    count: int | None = None,
    *,
    eos_ids: Iterable[int] = (),
    guide: Guide | None = None,
    vocab_size: int = BYTES,
) -> list[int]:
    """The tokens that FakeEngine emits for a prompt: the first ``count`` (None = all, up to a stop token or ``max_tokens``).

    ``guide``: a new guide of the request's grammar; this function advances it.
    """
    stops = stop_set(params, eos_ids)
    state = state_of(prompt_ids)
    tokens: list[int] = []
    while len(tokens) < (params.max_tokens if count is None else min(count, params.max_tokens)):
        token = pick(state, params, len(tokens), eos_ids, guide.mask() if guide is not None else None, vocab_size)
        if token < 0 or (token in stops and len(tokens) >= params.min_tokens):
            break
        tokens.append(token)
        state = advance(state, token)
        if guide is not None:
            guide.advance((token,))
            if guide.done():
                break
    return tokens


class FakeModel:
    """The model of all ranks: applies plans to slots and K/V memory, and returns results."""

    def __init__(self, capacity: Capacity, eos_ids: Iterable[int]) -> None:
        self._capacity = capacity
        self._eos_ids = tuple(eos_ids)
        self._memory = [0] * (capacity.num_blocks * capacity.block_size)
        self._opened: dict[int, OpenSlot] = {}
        self._tables: dict[int, list[int]] = {}
        self._sampled: dict[int, int] = {}  # by slot: the token for a placeholder in a later plan

    def run(self, plan: StepPlan) -> StepResult:
        """Apply one plan; plans come in order."""
        for slot in view(plan.closed).tolist():
            del self._opened[slot], self._tables[slot]
        for opened in plan.opened:
            self._opened[opened.slot] = opened
            self._tables[opened.slot] = []
        for slot, block in zip(view(plan.block_slots).tolist(), view(plan.block_ids).tolist(), strict=True):
            self._tables[slot].append(block)
        slots, starts = view(plan.slots).tolist(), view(plan.starts).tolist()
        lengths, yields = view(plan.lengths).tolist(), view(plan.sample).tolist()
        tokens, to_score = view(plan.tokens).tolist(), view(plan.score).tolist()
        masks = dict(plan.masks)
        wanted = any(self._opened[slot].params.logprobs is not None for slot in slots)
        chosen: list[int] = []
        own: list[float | None] = []
        tops: list[tuple[int, bytes, bytes]] = []
        prompts: list[tuple[int, bytes, bytes, bytes]] = []
        taken = 0
        for i, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True)):
            opened = self._opened[slot]
            known = [self._sampled[slot] if token == PLACEHOLDER else token for token in tokens[taken : taken + length]]
            states = self._forward(self._tables[slot], start, known)
            taken += length
            if to_score and to_score[i]:
                prompts.append((i, *self._score_prompt(opened, start, states)))
            if yields[i]:
                first = start + length - opened.prompt_len
                token = pick(states[-1], opened.params, first, self._eos_ids, masks.get(i), self._capacity.vocab_size)
                chosen.append(token)
                self._sampled[slot] = token
                if wanted:
                    logprobs = score(states[-1], token, opened.params.logprobs or 0)
                    own.append(logprobs.logprob)
                    tops.append((i, column(logprobs.top_ids), np.asarray(logprobs.top_logprobs, F32).tobytes()))
        return StepResult(
            step=plan.step,
            tokens=column(chosen),
            logprobs=np.asarray(own, F32).tobytes(),
            top=tops,
            prompt_logprobs=prompts,
        )

    def _forward(self, table: list[int], start: int, tokens: list[int]) -> list[int]:
        """Compute ``tokens`` at positions ``start``..; returns the state after each."""
        size, memory = self._capacity.block_size, self._memory
        state = memory[table[(start - 1) // size] * size + (start - 1) % size] if start else _ROOT
        states = []
        for position, token in enumerate(tokens, start):
            state = advance(state, token)
            memory[table[position // size] * size + position % size] = state
            states.append(state)
        return states

    def _score_prompt(self, opened: OpenSlot, start: int, states: list[int]) -> tuple[bytes, bytes, bytes]:
        history = view(opened.history).tolist()
        count = opened.params.prompt_logprobs or 0
        following = history[start + 1 : start + 1 + len(states)]
        following += [0] * (len(states) - len(following))  # the token after the whole prompt is neither known yet nor needed
        logprobs = [score(state, token, count) for state, token in zip(states, following, strict=True)]
        return (
            np.asarray([entry.logprob for entry in logprobs], F32).tobytes(),
            column([token for entry in logprobs for token in entry.top_ids]),
            np.asarray([logprob for entry in logprobs for logprob in entry.top_logprobs], F32).tobytes(),
        )


class FakeEngine(ScheduledEngine):
    """Implements :class:`workers.protocol.engine.Engine` in one process.

    Args:
        spec: limits, and the cost of a step: ``fake_step_ms`` + ``fake_token_us`` a token, shared by the ``pp`` stages.
        parallel: reported as capacity; ``pp`` micro-batches are kept in flight.
        eos_ids: the vocabulary's end-of-sequence ids; they are sampled only under a guide that allows them. guides: compiles grammars; None
        = guided requests are refused. clock, sleep: seconds; a simulator or test passes its own. disturb: changes results before the
        update, to inject faults.
    """

    def __init__(
        self,
        spec: FakeSpec,
        *,
        parallel: Parallel = SINGLE,
        vocab_size: int = BYTES,
        eos_ids: Sequence[int] = BYTES_EOS,
        guides: GuideFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        disturb: Callable[[StepPlan, StepResult], StepResult] | None = None,
    ) -> None:
        self._cost = spec.options
        self._stages = parallel.pp
        self._clock, self._sleep, self._disturb = clock, sleep, disturb
        capacity = Capacity(
            block_size=spec.block_size,
            num_blocks=max((spec.kv_tokens or KV_TOKENS) // spec.block_size, 1),
            max_batch_size=spec.max_batch_size,
            max_num_tokens=spec.max_num_tokens,
            max_seq_len=spec.max_seq_len or KV_TOKENS,
            vocab_size=vocab_size,
            tp=parallel.tp,
            pp=parallel.pp,
            guided=guides is not None,
            engine="fake",
            dtype=spec.dtype,
            prefix_cache=spec.prefix_cache,
        )
        super().__init__(Scheduler(capacity, guides=guides, micro_batches=parallel.pp, eos_ids=eos_ids), capacity, "bitwise")
        self._model = FakeModel(capacity, eos_ids)
        self._plans: deque[StepPlan] = deque()
        self._step_ms = 0.0

    def step(self) -> list[Emission]:
        begin = self._clock()
        while (plan := self._scheduler.schedule(begin)) is not None:
            self._plans.append(plan)
        if not self._plans:
            return []
        plan = self._plans.popleft()
        result = self._model.run(plan)
        if self._disturb is not None:
            result = self._disturb(plan, result)
        # The time of the model is part of the step's cost, like the kernels of a real engine.
        rest_s = begin + self._cost_ms(len(plan.tokens) // 4) / 1000 - self._clock()
        if rest_s > 0:  # even a sleep of 0 would yield the processor
            self._sleep(rest_s)
        emissions = self._scheduler.update_from_output(result)
        self._step_ms = (self._clock() - begin) * 1000
        return emissions

    def busy(self) -> bool:
        return self._scheduler.busy(self._clock())

    def predicted_ms(self) -> float:
        return self._cost_ms(len(self._plans[0].tokens) // 4 if self._plans else self._scheduler.predicted_tokens())

    def stats(self) -> EngineStats:
        return self._scheduler.stats(self._step_ms)

    def close(self) -> None:
        """Nothing outside this object needs to be ended."""

    def _cost_ms(self, tokens: int) -> float:
        # In a full pipeline, a plan finishes after each 1 / stages of the time that one plan needs for all stages.
        return (self._cost.fake_step_ms + self._cost.fake_token_us * tokens / 1000) / self._stages
