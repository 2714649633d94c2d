"""One request inside the scheduler: its known tokens, its computed tokens, and its queue.

Owns :class:`Sequence` and every write to one: other modules call its methods, or the functions of this module, which do the same for many
sequences in one loop. Must never decide which sequence runs: that is :mod:`workers.scheduler.scheduler`, whose docstring has the states.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import EngineFault, Rejected, TooLong, Unsupported
from workers.protocol.messages import UNLIMITED, Capacity, FinishReason, Logprobs, SamplingParams, Submit, Usage
from workers.sampling.definition import check, has_penalties, has_token_rules, stop_set
from workers.sampling.guide import Guide, GuideFactory
from workers.sampling.token_rules import TokenRules
from workers.scheduler.block_pool import BlockPool, prefix_hashes
from workers.scheduler.step_plan import PLACEHOLDER, OpenSlot, column, view, view_floats

Queue = deque["Sequence"]

#: A ``publish_at`` that no sequence reaches.
NEVER = 2**62
#: Result for a sequence of which a step computed only a chunk. Other results are token ids and -1 (logits were not finite).
NO_TOKEN = -2


@dataclass(slots=True)
class PrefixCursor:
    """The progress of hashing and publishing the blocks of one sequence.

    ``hashes``: the prefix hashes of its first full blocks. ``publish_at``: end position of the next block to publish; ``NEVER`` if no
    further block may be published. ``eager_until``: blocks that end at or before this position are published as soon as they are computed.
    """

    salt: str
    hashes: list[int] = field(default_factory=list)
    publish_at: int = 0
    eager_until: int = 0

    def extend(self, tokens: list[int], count: int, block_size: int) -> None:
        """Hash the full blocks of ``tokens`` up to ``count`` blocks, unless they are hashed already."""
        done = len(self.hashes)
        if done < count:
            parent = self.hashes[-1] if done else None
            self.hashes += prefix_hashes(tokens[done * block_size : count * block_size], block_size, self.salt, parent=parent)

    def publish(self, tokens: list[int], end: int, blocks: list[int], pool: BlockPool) -> None:
        """Make the blocks of ``tokens`` [:end] findable, until one has the same content as another sequence's block."""
        size = pool.block_size
        if self.publish_at <= end:
            self.extend(tokens, end // size, size)
        while self.publish_at <= end:
            i = self.publish_at // size - 1
            parent = blocks[i - 1] if i else -1
            if not pool.publish(blocks[i], hash=self.hashes[i], parent=parent, salt=self.salt, tokens=tokens[i * size : self.publish_at]):
                self.publish_at = NEVER
                return
            self.publish_at += size


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request, ``computed`` < ``known`` <= len(``tokens``): the K/V of tokens[:computed] is computed, that of tokens[:known] is
    required.

    Constant:
        arrival: number of its arrival; sequences are admitted in this order.
        max_len: length of ``tokens`` at which it ends.
        nothing_to_emit: all of its output came with its Submit. It ends once it is computed; if no prompt is scored, computing one token is
        enough. async_eligible: the sampling of a token does not depend on the value of the token before it (except through the logits).
        special_tokens: results that need special handling: its stop tokens, -1 (logits were not finite), and NO_TOKEN.

    Lengths that decide what a step may do with it, cached because every step reads them:
        allowed_len: length of ``tokens`` at which its credit is used up.
        async_until: length of ``tokens`` below which it may be scheduled again while its token is in flight: that token neither ends nor
            pauses it.
        plain_until: while ``computed`` is below this, a token that is not special only has to be appended.

    Changing:
        queue: the queue that holds it; None when it is finished, and while it is in flight. With async scheduling it may wait in a queue
            while its last step is in flight.
        slot, blocks: its slot (-1 = none) and block table, which has room for ``block_capacity`` tokens.
        scheduled: tokens that are computed or in a step in flight; those of a repeated step only after
            :meth:`~workers.scheduler.in_flight.InFlightStep.apply_deferred`.
        cached_tokens: prompt tokens found in the prefix cache at the first admission; -1 before it.
        cached_untold: some were found, and no emission has reported it yet. paused_at: when it was paused, seconds.
    """

    id: int
    arrival: int
    params: SamplingParams
    prompt_len: int
    tokens: list[int]
    max_len: int
    nothing_to_emit: bool
    async_eligible: bool
    special_tokens: frozenset[int]
    guide: Guide | None
    prompt_logprobs: list[Logprobs] | None
    prefix: PrefixCursor
    allowed_len: int = 0
    async_until: int = 0
    plain_until: int = 0
    queue: Queue | None = None
    finished: bool = False
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    block_capacity: int = 0
    scheduled: int = 0
    computed: int = 0
    cached_tokens: int = -1
    cached_untold: bool = False
    preemptions: int = 0
    paused_at: float = 0.0

    # Facts

    @property
    def known(self) -> int:
        return 1 if self.nothing_to_emit and self.prompt_logprobs is None else len(self.tokens)

    @property
    def in_flight(self) -> int:
        """Number of its tokens in steps in flight."""
        return self.scheduled - self.computed

    @property
    def pending(self) -> int:
        """Number of known tokens that are not in a step yet."""
        return self.known - self.scheduled

    @property
    def credit(self) -> int:
        """Number of tokens that may still be emitted."""
        return self.allowed_len - len(self.tokens)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def open_slot(self) -> OpenSlot:
        """The facts that ranks need about the sequence in its slot; its history only if sampling reads it."""
        wants_history = self.prompt_logprobs is not None or has_penalties(self.params)
        history = column(self.tokens) if wants_history else b""
        return OpenSlot(slot=self.slot, params=self.params, prompt_len=self.prompt_len, history=history)

    def findable_hashes(self, block_size: int) -> list[int]:
        """Hashes of the full blocks that a prefix hit may cover: at least the last known token is always computed."""
        count = (self.known - 1) // block_size
        self.prefix.extend(self.tokens, count, block_size)
        return self.prefix.hashes[:count]

    # Queues and credit

    def add_credit(self, tokens: int) -> None:
        """Allow ``tokens`` more to be emitted."""
        self.allowed_len += min(tokens, UNLIMITED - self.credit)
        if self.async_eligible:
            self.async_until = min(self.allowed_len, self.max_len) - 1

    def enter(self, queue: Queue) -> None:
        """Move to the end of ``queue``."""
        self.queue = queue
        queue.append(self)

    def enter_first(self, queue: Queue) -> None:
        """Move to the front of ``queue``."""
        self.queue = queue
        queue.appendleft(self)

    def enter_by_arrival(self, queue: Queue) -> None:
        """Move to the place in ``queue`` according to its arrival."""
        self.queue = queue
        insort(queue, self, key=arrival_of)

    def pause(self, queue: Queue, now: float) -> None:
        """Wait for credit in ``queue``."""
        self.paused_at = now
        self.enter(queue)

    def taken(self) -> None:
        """Record that the scheduler has popped it from its queue."""
        self.queue = None

    def leave_queue(self) -> None:
        if self.queue is not None:
            self.queue.remove(self)
            self.queue = None

    # Slot and blocks

    def admit(self, slot: int, cached: list[int], fresh: list[int], pool: BlockPool) -> None:
        """Take a slot, the blocks that already hold its prefix, and new blocks for its other known tokens."""
        self.slot = slot
        self.blocks = cached + fresh
        self.block_capacity = len(self.blocks) * pool.block_size
        self.computed = self.scheduled = len(cached) * pool.block_size
        self.prefix.publish_at = self.computed + pool.block_size if pool.findable else NEVER
        self.prefix.eager_until = self.known
        if self.cached_tokens < 0:
            self.cached_tokens = min(self.computed, self.prompt_len)
            self.cached_untold = self.cached_tokens > 0
        self._update_plain_until()

    def add_block(self, block: int, block_size: int) -> None:
        self.blocks.append(block)
        self.block_capacity += block_size

    def give_up_slot(self, pool: BlockPool) -> int:
        """Return its blocks to ``pool``, full ones as findable blocks. Returns the slot that is free now."""
        self.publish(pool)
        pool.release(self.blocks)
        slot, self.slot, self.blocks, self.block_capacity = self.slot, -1, [], 0
        return slot

    def publish(self, pool: BlockPool) -> None:
        """Make its full computed blocks findable. The scheduler calls this for blocks of the prompt as soon as they are computed, and for
        blocks of the output when the sequence leaves its slot: output blocks are rarely reused earlier, and publishing all at once costs
        less."""
        # A step in flight when the sequence ended has computed tokens that are not its own.
        self.prefix.publish(self.tokens, min(self.computed, len(self.tokens)), self.blocks, pool)
        self._update_plain_until()

    def preempt(self) -> None:
        """Mark all tokens as not computed. Emitted tokens and the state of the guide stay."""
        self.computed = self.scheduled = 0
        self.prefix.publish_at = NEVER
        self.preemptions += 1
        if self.prompt_logprobs is not None:
            del self.prompt_logprobs[1:]

    def finish(self, *, faulty: bool = False) -> None:
        """Emit no further token. ``faulty``: its blocks must not become findable."""
        self.finished = True
        if faulty:
            self.prefix.publish_at = NEVER
        self._update_plain_until()
        self.leave_queue()

    # Steps

    def schedule_chunk(self, count: int) -> tuple[list[int], bool, bool]:
        """Schedule ``count`` tokens in the next step: (these tokens, whether the step yields a token, whether it scores prompt tokens)."""
        begin = self.scheduled
        yields_token = count == self.pending and not self.nothing_to_emit
        scores_prompt = self.prompt_logprobs is not None and begin < self.prompt_len - 1
        self.scheduled = begin + count
        self.queue = None
        return self.tokens[begin : begin + count], yields_token, scores_prompt

    def add_prompt_logprobs(self, own_column: bytes, ids_column: bytes, logprobs_column: bytes) -> None:
        """Store the predictions made at prompt positions ``computed``.., as in ``StepResult.prompt_logprobs``."""
        assert self.prompt_logprobs is not None
        own, ids, logprobs = view_floats(own_column).tolist(), view(ids_column).tolist(), view_floats(logprobs_column).tolist()
        start, k = self.computed, len(ids) // len(own)
        for i in range(min(len(own), self.prompt_len - 1 - start)):
            span = slice(i * k, (i + 1) * k)
            self.prompt_logprobs.append(Logprobs(self.tokens[start + i + 1], own[i], ids[span], logprobs[span]))

    def accept(self, token: int, logprobs: Logprobs | None = None) -> Emission:
        """Apply a sampled token: emit it, end the sequence, or both."""
        first = self.output_len
        end: Finish | Fault | None = None
        if token in self.special_tokens or self.guide is not None:
            end = self._check_and_advance(token, first)
            if end is not None:
                return Emission(self.id, first, [], None, self._take_prompt_logprobs(), end)
        self.tokens.append(token)
        if self.guide is not None and self.guide.done():
            end = self._make_finish("stop")
        elif len(self.tokens) >= self.max_len:
            end = self._make_finish("length")
        scores, cached = None if logprobs is None else [logprobs], self._take_cached()
        return Emission(self.id, first, [token], scores, self._take_prompt_logprobs(), end, cached)

    def accept_nothing(self) -> Emission:
        """End a sequence that had nothing to emit."""
        complete = self.guide is not None and self.guide.done()
        end = self._make_finish("stop" if complete else "length")
        return Emission(self.id, self.output_len, [], None, self._take_prompt_logprobs(), end)

    def _check_and_advance(self, token: int, first: int) -> Finish | Fault | None:
        """Advance the guide by ``token``, at output position ``first``. Return why the sequence ends, if the token is not to be emitted."""
        if token < 0:
            return Fault("nan_logits", f"logits were not finite at output position {first}")
        if self.guide is not None:
            # Also for the token that ends the output: a grammar that has become too large allows only the end.
            try:
                self.guide.advance((token,))
            except EngineFault as error:
                return Fault(error.code, str(error))
        if token in self.special_tokens and first >= self.params.min_tokens:
            return self._make_finish("stop", token)
        return None

    def _make_finish(self, reason: FinishReason, stop_id: int | None = None) -> Finish:
        usage = Usage(
            prompt_tokens=self.prompt_len,
            output_tokens=self.output_len,
            cached_tokens=max(self.cached_tokens, 0),
            preemptions=self.preemptions,
        )
        return Finish(reason, usage, stop_id)

    def _take_prompt_logprobs(self) -> list[Logprobs] | None:
        """The log-probabilities of the whole prompt, once, when they are complete."""
        if self.prompt_logprobs is None or len(self.prompt_logprobs) < self.prompt_len:
            return None
        logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        self._update_plain_until()
        return logprobs

    def _take_cached(self) -> int:
        """Prompt tokens found in the prefix cache, once; then 0."""
        if not self.cached_untold:
            return 0
        self.cached_untold = False
        self._update_plain_until()
        return self.cached_tokens

    def _update_plain_until(self) -> None:
        """Update ``plain_until``. Called by every method that changes whether a token needs more than being appended: the end, a guide,
        prompt logprobs, a prefix hit to report, blocks of the prompt to publish."""
        plain = not self.finished and self.guide is None and self.prompt_logprobs is None and not self.cached_untold
        self.plain_until = self.max_len - 1 if plain and self.prefix.publish_at > self.prefix.eager_until else 0


def arrival_of(seq: Sequence) -> int:
    return seq.arrival


# For many sequences at once: most steps do only this, and a call for each sequence would cost more than its work.


def enter_from_placeholders(queue: Queue, sequences: list[Sequence], yields: list[int]) -> list[Sequence]:
    """Each of ``sequences`` whose step ``yields`` a token (0 or 1) is moved to the end of ``queue`` before that token has arrived, if that
    is allowed.

    Returns the sequences with further prompt tokens to compute.
    """
    chunks: list[Sequence] = []
    for seq, yields_token in zip(sequences, yields, strict=True):
        if seq.finished:
            continue
        if yields_token:
            if len(seq.tokens) < seq.async_until:  # a stop token ends it one step late
                seq.queue = queue
                queue.append(seq)
        elif seq.pending:
            chunks.append(seq)
    return chunks


def schedule_decodes(sequences: list[Sequence]) -> list[int]:
    """Schedule one token of each of ``sequences`` in the next step: its last one, or a placeholder for one in flight."""
    tokens = []
    for seq in sequences:
        begin = seq.scheduled
        tokens.append(seq.tokens[begin] if begin < len(seq.tokens) else PLACEHOLDER)
        seq.scheduled = begin + 1
        seq.queue = None
    return tokens


def add_counts(sequences: list[Sequence], *, scheduled: int, computed: int) -> None:
    """Count ``scheduled`` more tokens of each sequence as scheduled, and ``computed`` more as computed."""
    for seq in sequences:
        seq.scheduled += scheduled
        seq.computed += computed


def append_plain_tokens(
    sequences: list[Sequence], counts: list[int], tokens: list[int], logprobs: list[Logprobs | None]
) -> tuple[list[Emission], list[int], list[Sequence]]:
    """Count a step's query lengths as computed, and emit the token of each sequence that only needs it appended.

    Returns the emissions; the indices of the other sequences; and the sequences that are now neither in flight nor in a queue.
    """
    emissions: list[Emission] = []
    special: list[int] = []
    idle: list[Sequence] = []
    for seq, count, token, own in zip(sequences, counts, tokens, logprobs, strict=True):
        seq.computed = computed = seq.computed + count
        if computed < seq.plain_until and token not in seq.special_tokens and own is None:
            seq.tokens.append(token)
            emissions.append(Emission(seq.id, computed - seq.prompt_len, [token]))
        else:
            special.append(len(emissions) + len(special))
        if computed == seq.scheduled and seq.queue is None:
            idle.append(seq)
    return emissions, special, idle


def append_tokens(histories: list[list[int]], tokens: list[int]) -> None:
    """Append to each sequence's ``tokens`` its entry of ``tokens``. The interpreter runs this loop in C, because it handles every token."""
    deque(map(list.append, histories, tokens), 0)


@lru_cache(256)
def _shared(special_tokens: frozenset[int]) -> frozenset[int]:
    """One object for all equal sets: a step searches the set of every sequence, and separate objects would each be read from main
    memory."""
    return special_tokens


def make_sequence(
    id: int, arrival: int, request: Submit, limits: Capacity, eos_ids: Iterable[int], guides: GuideFactory | None
) -> Sequence:
    """The sequence of a request. Raises TooLong for a request that can never fit, Rejected for invalid ids, parameters or grammar,
    Unsupported for a grammar if ``guides`` is None."""
    check_request(request, limits)
    task, params = request.task, request.task.params
    tokens = request.prompt_ids + task.emitted
    guide = _make_guide(request, guides, limits.vocab_size, eos_ids)
    wants_prompt_logprobs = params.prompt_logprobs is not None and not task.emitted  # emitted tokens came with or after them
    seq = Sequence(
        id=id,
        arrival=arrival,
        params=params,
        prompt_len=len(request.prompt_ids),
        tokens=tokens,
        max_len=len(request.prompt_ids) + params.max_tokens,
        nothing_to_emit=len(task.emitted) >= params.max_tokens or (guide is not None and guide.done()),
        async_eligible=guide is None and not wants_prompt_logprobs and not has_penalties(params),
        special_tokens=_shared(stop_set(params, eos_ids) | {-1, NO_TOKEN}),
        guide=guide,
        prompt_logprobs=[Logprobs(tokens[0], None, [], [])] if wants_prompt_logprobs else None,
        prefix=PrefixCursor(request.salt),
        allowed_len=len(tokens),
    )
    seq.add_credit(task.credit)
    return seq


def check_request(request: Submit, limits: Capacity) -> None:
    """Raises TooLong for a request that can never fit, Rejected for invalid ids and parameters; the checks that every engine needs."""
    _check_size(request, limits)
    check(request.task.params, vocab_size=limits.vocab_size, max_logprobs=limits.max_logprobs)
    tokens = request.prompt_ids + request.task.emitted
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        raise Rejected("a token is outside the vocabulary", f"ids are 0 to {limits.vocab_size - 1}", param="prompt")


def _check_size(request: Submit, limits: Capacity) -> None:
    prompt, asked = len(request.prompt_ids), request.task.params.max_tokens
    if not prompt:
        raise Rejected("the prompt is empty", "a model predicts what follows at least one token", param="prompt")
    total = prompt + max(asked, len(request.task.emitted))
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


def _make_guide(request: Submit, guides: GuideFactory | None, vocab_size: int, eos_ids: Iterable[int]) -> Guide | None:
    """The grammar of a request and its rules about single ids, advanced over its emitted tokens."""
    params = request.task.params
    guide: Guide | None = None
    if params.guide is not None:
        if guides is None:
            raise Unsupported("guided output is not offered by this engine", param="response_format")
        guide = guides(params.guide)
    if has_token_rules(params):
        guide = TokenRules(params, vocab_size, eos_ids, guide)
    if guide is None:
        return None
    try:
        guide.advance(request.task.emitted)
    except EngineFault as error:
        raise Rejected("the tokens emitted so far do not follow the grammar", str(error), param="emitted") from None
    return guide
