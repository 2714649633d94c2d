"""One request inside the batch core: what is known of it, what is computed of it, where it waits.

Owns the record and what can be said of it alone. Must never decide who runs: that is :mod:`workers.scheduler.scheduler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import EngineFault, Rejected, TooLong, Unsupported
from workers.protocol.messages import Capacity, FinishReason, Logprobs, SamplingParams, Submit, Usage
from workers.sampling.definition import check, has_penalties, stop_set
from workers.sampling.guide import Guide, GuideFactory
from workers.scheduler.block_pool import BlockPool, prefix_hashes
from workers.scheduler.step_plan import OpenSlot, column, view, view_floats

Queue = deque["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request, ``computed`` < ``known`` <= len(``tokens``): the K/V of tokens[:computed] is there, that of tokens[:known] is due.

    A row is read and written in every step of its life, so what follows from something else is not kept. A ``spent`` row is one that
    came with nothing left to emit: it ends once computed, and where nothing is to be scored one token is enough. ``issued``:
    ``computed`` and what of it is in plans in flight, but for what these owe (:class:`~workers.scheduler.in_flight.InFlightStep`).
    ``allowed``: length of ``tokens`` at which its credit is used up; ``last``: at which the next one is the last; ``ahead``: before which
    it may go on from a token in flight, which must neither be its last nor pause it. ``predictable``: its next token, whatever it is,
    changes nothing in how the one after it is chosen. ``ends``: what is not just emitted: its stop tokens, -1, and None, which is no token
    yet; ``calm``: length of ``computed`` below which all else is (:meth:`settle`). ``opened``: what was known when it got its slot.
    ``home`` is the queue that holds the row; None while it is in flight, or over. ``order`` is its place in admission order.
    """

    id: int
    order: int
    params: SamplingParams
    salt: str
    prompt_len: int
    tokens: list[int]
    spent: bool
    ends: frozenset[int | None]
    guide: Guide | None
    prompt_scores: list[Logprobs] | None
    allowed: int = 0
    home: Queue | None = None
    over: bool = False
    issued: int = 0
    predictable: bool = False
    last: int = 0
    ahead: int = 0
    calm: int = 0
    slot: int = -1
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    room: int = 0
    opened: int = 0
    publish_at: int = 0
    cached_tokens: int = -1
    preemptions: int = 0
    paused_at: float = 0.0

    @property
    def known(self) -> int:
        return 1 if self.spent and self.prompt_scores is None else len(self.tokens)

    @property
    def airborne(self) -> int:
        """Tokens of it in plans in flight."""
        return self.issued - self.computed

    @property
    def credit(self) -> int:
        """Tokens that may still be emitted."""
        return self.allowed - len(self.tokens)

    def allow(self, tokens: int) -> None:
        """Let ``tokens`` be emitted from now on."""
        self.allowed = len(self.tokens) + tokens
        self.ahead = min(self.allowed - 1, self.last) if self.predictable else 0

    def settle(self) -> None:
        """Note until when nothing can happen to the row but that a token is emitted, after a change of what else there is."""
        quiet = not self.over and self.guide is None and self.prompt_scores is None
        self.calm = self.last if quiet and self.publish_at > self.opened else 0

    @property
    def pending(self) -> int:
        return self.known - self.issued

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def finish(self, reason: FinishReason, stop_id: int | None = None) -> Finish:
        usage = Usage(
            prompt_tokens=self.prompt_len,
            output_tokens=self.output_len,
            cached_tokens=max(self.cached_tokens, 0),
            preemptions=self.preemptions,
        )
        return Finish(reason, usage, stop_id)

    def opening(self) -> OpenSlot:
        """What ranks need to know of the row in its slot; its history only where sampling reads it."""
        wants_history = self.prompt_scores is not None or has_penalties(self.params)
        history = column(self.tokens) if wants_history else b""
        return OpenSlot(slot=self.slot, params=self.params, prompt_len=self.prompt_len, history=history)

    def findable_hashes(self, block_size: int) -> list[int]:
        """Hashes of the whole blocks that a prefix hit may cover: at least the last known token is always computed."""
        count = (self.known - 1) // block_size
        if len(self.hashes) < count:
            start = len(self.hashes)
            parent = self.hashes[-1] if start else None
            self.hashes += prefix_hashes(self.tokens[start * block_size : count * block_size], block_size, self.salt, parent=parent)
        return self.hashes[:count]

    def publish(self, pool: BlockPool) -> None:
        """Make the blocks that are whole and computed findable, until one is a duplicate of another row's. A prompt's are as it is
        computed; what follows at the latest when the row leaves its slot: hardly anybody asks for it before, and all at once costs less."""
        size, end = pool.block_size, min(self.computed, len(self.tokens))  # a token computed after the row's end is not its own
        if self.publish_at <= end:
            first = len(self.hashes)
            self.hashes += prefix_hashes(
                self.tokens[first * size : end // size * size], size, self.salt, parent=self.hashes[-1] if first else None
            )
        while self.publish_at <= end:
            i = self.publish_at // size - 1
            tokens, parent = self.tokens[i * size : self.publish_at], self.blocks[i - 1] if i else -1
            if not pool.publish(self.blocks[i], hash=self.hashes[i], parent=parent, salt=self.salt, tokens=tokens):
                self.publish_at = NEVER
                break
            self.publish_at += size
        self.settle()

    def wants_score(self) -> bool:
        """Whether the next chunk makes a prediction for a later prompt token that is to be reported."""
        return self.prompt_scores is not None and self.issued < self.prompt_len - 1

    def score(self, own_column: bytes, ids_column: bytes, logprobs_column: bytes) -> None:
        """Take the predictions made at prompt positions ``computed``.., as in ``StepResult.prompt``."""
        assert self.prompt_scores is not None
        own, ids, logprobs = view_floats(own_column).tolist(), view(ids_column).tolist(), view_floats(logprobs_column).tolist()
        start, k = self.computed, len(ids) // len(own)
        for i in range(min(len(own), self.prompt_len - 1 - start)):
            span = slice(i * k, (i + 1) * k)
            self.prompt_scores.append(Logprobs(self.tokens[start + i + 1], own[i], ids[span], logprobs[span]))

    def take_scores(self) -> list[Logprobs] | None:
        """The whole prompt's log-probabilities, once, when the last is there."""
        if self.prompt_scores is None or len(self.prompt_scores) < self.prompt_len:
            return None
        scores, self.prompt_scores = self.prompt_scores, None
        return scores

    def accept(self, token: int, scored: Logprobs | None = None) -> Emission:
        """Take a sampled token: it is emitted, or it ends the row, or both."""
        length = len(self.tokens)
        first = length - self.prompt_len
        end: Finish | Fault | None = None
        if token in self.ends or self.guide is not None:
            end = self._refuse(token, first)
            if end is not None:
                return Emission(self.id, first, [], None, self.take_scores(), end)
        self.tokens.append(token)
        if self.guide is not None and self.guide.done():
            end = self.finish("stop")
        elif length >= self.last:
            end = self.finish("length")
        return Emission(self.id, first, [token], None if scored is None else [scored], self.take_scores(), end)

    def _refuse(self, token: int, first: int) -> Finish | Fault | None:
        """Why ``token`` at output position ``first`` is not emitted; None = it is, and the guide has taken it."""
        if token < 0:
            return Fault("nan_logits", f"logits were not finite at output position {first}")
        if token in self.ends and first >= self.params.min_tokens:
            return self.finish("stop", token)
        if self.guide is not None:
            try:
                self.guide.advance((token,))
            except EngineFault as error:
                return Fault(error.code, str(error))
        return None

    def expire(self) -> Emission:
        """End a spent row."""
        whole = self.guide is not None and self.guide.done()
        return Emission(self.id, self.output_len, [], None, self.take_scores(), self.finish("stop" if whole else "length"))

    def restart(self) -> None:
        """Nothing is computed any more; what was emitted stays, and the guide with it."""
        self.computed = self.issued = self.room = 0
        self.publish_at = NEVER
        self.preemptions += 1
        if self.prompt_scores is not None:
            del self.prompt_scores[1:]


#: A ``publish_at`` that is never reached.
NEVER = 2**62


@lru_cache(256)
def _shared(ends: frozenset[int | None]) -> frozenset[int | None]:
    """One object for all that are equal: a step looks into every row's, mostly in vain, and each would have to come from memory."""
    return ends


def make_row(id: int, order: int, request: Submit, limits: Capacity, eos_ids: Iterable[int], guides: GuideFactory | None) -> Sequence:
    """The row of a request. Raises TooLong for what can never fit, Rejected for ids, parameters or a grammar that mean nothing, Unsupported
    for a grammar where ``guides`` is None."""
    check_request(request, limits)
    params = request.params
    tokens = request.prompt_ids + request.emitted
    guide = _make_guide(request, guides)
    wants_scores = params.prompt_logprobs is not None and not request.emitted  # emitted tokens came with or after the scores
    spent = len(request.emitted) >= params.max_tokens or (guide is not None and guide.done())
    row = Sequence(
        id=id,
        order=order,
        params=params,
        salt=request.salt,
        prompt_len=len(request.prompt_ids),
        tokens=tokens,
        spent=spent,
        ends=_shared(stop_set(params, eos_ids) | {-1, None}),
        guide=guide,
        last=len(request.prompt_ids) + params.max_tokens - 1,
        predictable=guide is None and not wants_scores and not has_penalties(params),
        prompt_scores=[Logprobs(tokens[0], None, [], [])] if wants_scores else None,
    )
    row.allow(request.credit)
    return row


def check_request(request: Submit, limits: Capacity) -> None:
    """Raises TooLong for what can never fit, Rejected for ids and parameters that mean nothing; all that any engine must know."""
    _check_size(request, limits)
    check(request.params, vocab_size=limits.vocab_size, max_logprobs=limits.max_logprobs)
    tokens = request.prompt_ids + request.emitted
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        raise Rejected("a token is outside the vocabulary", f"ids are 0 to {limits.vocab_size - 1}", param="prompt")


def _check_size(request: Submit, limits: Capacity) -> None:
    prompt, asked = len(request.prompt_ids), request.params.max_tokens
    if not prompt:
        raise Rejected("the prompt is empty", "a model predicts what follows at least one token", param="prompt")
    total = prompt + max(asked, len(request.emitted))
    if total > limits.max_seq_len:
        raise TooLong(
            f"{prompt} prompt tokens and {asked} output tokens do not fit the context",
            f"it is {limits.max_seq_len} tokens long",
            "shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    if max(prompt, total - 1) > limits.num_blocks * limits.block_size:  # the last output token is never computed
        raise TooLong(
            f"{prompt} prompt tokens and {asked} output tokens can never fit the KV cache",
            f"it holds {limits.num_blocks * limits.block_size} tokens",
            "shorten the prompt, lower max_tokens or give the replica more KV memory",
            param="max_tokens",
        )


def _make_guide(request: Submit, guides: GuideFactory | None) -> Guide | None:
    """The row's grammar, brought up to the emitted tokens."""
    spec = request.params.guide
    if spec is None:
        return None
    if guides is None:
        raise Unsupported("guided output is not offered by this engine", param="response_format")
    guide = guides(spec)
    try:
        guide.advance(request.emitted)
    except EngineFault as error:
        raise Rejected("the tokens emitted so far do not follow the grammar", str(error), param="emitted") from None
    return guide
