"""Applies step plans on one rank with a GPU: starts each without waiting for the one before, and answers when the device gets there.

Owns the device's copy of what a rank remembers: block tables, the last token and the seed of every slot, the cache. A step is one
submission, and a captured program that takes it and completes it or, where it is long, the same operations one by one, in one stream;
decodes that repeat the step before are submitted empty but for the blocks that they append. Must never decide anything, nor read from the
device where a plan can be issued without; rows with more than a temperature are the exception (:meth:`GpuRunner._extras`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.distributed.group import Group, Waiter
from workers.kernels.step_layout import HEAD_WORDS, Heads, LayoutShape, Paging, Rings, SlotState, mixed_shape, step_shape
from workers.models.decoder import DecoderStage
from workers.runner.device import DECODES, MIXED, Device, Graphs, Mark, Programs, Staging, graph_sizes
from workers.runner.host_device_rings import Completions, Submissions
from workers.runner.kv_cache import KvCache
from workers.runner.sampler import Sampler
from workers.runner.slot_sampling import SlotSampling
from workers.runner.slot_updates import NONE, SlotRecords, SlotUpdates
from workers.runner.step_inputs import DecodeInbox, Inputs, StepInbox
from workers.runner.step_results import DeviceResult, PendingResult, ReadyResult, SamplingExtras
from workers.scheduler.step_plan import I32, Ints, StepPlan, StepResult, view

#: News that a submission has room for beside its inbox, for each slot: where there are more, some go ahead.
_NEWS = 8
#: Repetitions after which a layout is cut anew: its last parts grow by a token each.
_REPEATS = 16


class StepEnds(Protocol):
    """Both ends of a step on the device: :mod:`workers.kernels.step_ends`."""

    def take(self, rings: Rings, memory: Tensor, state: SlotState, returned: Tensor) -> None: ...

    def known(self, tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor: ...

    def candidates(self, logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor: ...

    def merged(self, best: Tensor) -> Tensor: ...

    def winners(self, best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, rings: Rings) -> None: ...


class RankGroups(NamedTuple):
    """The groups of a rank: the tp ranks of its stage, the stages of its tp rank, and the same stages once more for sampled ids, which
    must not wait behind hidden states."""

    tensor: Group
    pipeline: Group
    returns: Group


class _Step(NamedTuple):
    """What a plan has in common with those that repeat it; ``rows``: those that yield a token; ``decodes``: the size of the graph that
    takes it, where it is all decodes."""

    slots: Ints
    lengths: Ints
    rows: npt.NDArray[np.int64]
    decodes: int | None


class GpuRunner:
    """Implements :class:`~workers.runner.step_results.PlanRunner`. Until :meth:`capture` every step runs operation by operation.

    Args:
        stage: this rank's shard on ``device``, frozen.
        slots, max_seq_len: bounds of slot numbers and of a row's tokens.
        depth: plans that may be under way.
        answers: whether this rank of the last stage is the one whose results are read.
        waiter: how to wait for the device.
    """

    def __init__(
        self,
        stage: DecoderStage,
        cache: KvCache,
        device: Device,
        choose: StepEnds,
        links: RankGroups,
        *,
        slots: int,
        max_seq_len: int,
        max_num_tokens: int,
        depth: int,
        answers: bool = True,
        eos_ids: tuple[int, ...] = (),
        waiter: Waiter | None = None,
    ) -> None:
        #: This rank's part of the model; read-only for others.
        self.stage = stage
        self._cache, self._device, self._choose, self._links = cache, device, choose, links
        self._depth, self._answers, self._waiter = depth, answers, waiter or Waiter()
        shard, on = stage.shard, device.place
        self._heads = Heads(shard.heads.size, shard.kv_heads.size)
        width = -(-max_seq_len // cache.block_size)
        # One slot more than there are: what padding reads and writes.
        self._nobody = slots
        self._state = SlotState.empty(slots, width, on)
        self._paging = Paging.over(self._state.tables, self._heads)
        self._sampling: SlotSampling | None = None
        if shard.last:
            sampler = Sampler(links.tensor, start=shard.vocab.start, rows=shard.vocab_rows, device=on)
            self._sampling = SlotSampling(stage, sampler, eos_ids)
        self._records = SlotRecords(slots, width, self._sampling)
        decodes, mixed = graph_sizes(DECODES, slots), graph_sizes(MIXED, max_num_tokens)
        most = max(decodes[-1], mixed[-1])
        self._hidden = torch.zeros(most, stage.model.hidden_size, dtype=stage.dtype, device=on)
        self._decode_inboxes = {size: DecodeInbox(size, self._heads, self._nobody) for size in decodes}
        self._mixed_inboxes = {size: StepInbox(mixed_shape(size, self._heads), size, self._nobody) for size in mixed}
        widest = LayoutShape(tokens=max_num_tokens, parts=slots + self._heads.spare_parts, tiles=max_num_tokens)
        inboxes = (self._decode_inboxes[decodes[-1]], self._mixed_inboxes[mixed[-1]], StepInbox(widest, slots, self._nobody))
        longest = max(inbox.words for inbox in inboxes)
        # All inboxes begin here: the next step's is written when nobody reads the last one's any more.
        self._memory = torch.zeros(longest, dtype=torch.int32, device=on)
        self._returned = torch.zeros(slots, dtype=torch.int32, device=on)
        turns = 1 << (depth + 1).bit_length()
        words = HEAD_WORDS + longest + 3 * (_NEWS * slots + 8)
        self._rings = Rings.empty(device.pinned, on, words=words, rows=max(most, slots), depth=turns)
        self._submissions, self._completions = Submissions(self._rings, device, self._waiter), Completions(self._rings, device)
        # The step that left its inbox behind, and how often it was repeated.
        self._held = self._repeated = 0
        self._notes = Staging(device, words=slots, depth=turns)
        self._marks: dict[int, Mark] = {}
        # The last plan's step, and what it has in common with most that follow.
        self._before = 0, _Step(NONE, NONE, np.zeros(0, np.int64), None)
        self._mixed = self._decodes = Graphs(device, (), self._decode_program)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the programs of all sizes; kernels that were not used before are compiled."""
        self._mixed = Graphs(self._device, tuple(self._mixed_inboxes), self._mixed_program)
        self._decodes = Graphs(self._device, tuple(self._decode_inboxes), self._decode_program)

    def _decode_program(self, size: int) -> Programs:
        """One step of ``size`` rows that decode, as for :class:`~workers.runner.device.Graphs`."""
        inbox = self._decode_inboxes[size]
        return self._program(inbox, lambda packed: inbox.fill(packed, NONE, NONE, NONE))

    def _mixed_program(self, size: int) -> Programs:
        """Any step of ``size`` tokens, as for :class:`~workers.runner.device.Graphs`."""
        inbox = self._mixed_inboxes[size]
        return self._program(inbox, lambda packed: inbox.fill(packed, NONE, NONE, NONE, NONE, np.zeros(0, np.int64), self._heads))

    def _program(self, inbox: DecodeInbox | StepInbox, fill: Callable[[Ints], None]) -> Programs:
        """A step from ``inbox`` to ``_hidden`` and its completion; and one of padding alone, which ``fill`` writes, through the first layer
        only, which uses the same kernels as all of them."""
        inputs = inbox.inputs(self._memory, self._paging)

        def once() -> None:
            fill(self._submissions.open(inbox.words))
            self._submissions.send(0, inbox.words, SlotUpdates())
            self._compute(inputs, self._hidden, self._cache.layers[:1])

        return partial(self._compute, inputs, self._hidden, self._cache.layers), once

    # One plan

    def issue(self, plan: StepPlan) -> PendingResult | None:
        """See :class:`~workers.runner.step_results.PlanRunner`."""
        # Most plans are replayed without a call of torch's: only what makes some is in its inference mode.
        news = self._records.take(plan)
        if self._links.pipeline.size > 1:
            news = news._replace(returns=self._records.returned(self._guessed(plan)))
        if not plan.slots:
            return ReadyResult(StepResult(step=plan.step)) if self._sampling is not None and self._answers else None
        step = self._columns(plan)
        hidden = self._run(plan, step, news) if step.decodes is None else self._replay(plan, step, step.decodes, news)
        if not self.stage.shard.last:
            self._pass_on(hidden, len(plan.tokens) // I32.itemsize)
            return None
        extras = self._extras(plan, step, hidden) if self._records.specials or plan.score else None
        if self._links.pipeline.size > 1:
            self._mark(plan.step)
        if not self._answers:
            return None
        return DeviceResult(plan.step, self._completions.of(plan.step, len(step.rows)), self._waiter, extras)

    def _mark(self, step: int) -> None:
        """Remember where the device's work for ``step`` ends."""
        spent = self._marks.pop(step - self._depth - 1, None)
        mark = self._marks[step] = self._device.mark() if spent is None else spent
        mark.record()

    @torch.inference_mode()
    def _pass_on(self, hidden: Tensor, count: int) -> None:
        # What a graph computes is overwritten by the next one; what is sent must stay as it is.
        self._links.pipeline.send(hidden[:count].clone() if hidden is self._hidden else hidden, self._links.pipeline.rank + 1)

    def _guessed(self, plan: StepPlan) -> Ints:
        """Slots of the rows that go on from a token which the last stage has and the first one has not."""
        if self._links.pipeline.size == 1 or not plan.slots:
            return NONE
        lengths = view(plan.lengths)
        first = np.cumsum(lengths) - lengths
        slots = view(plan.slots)[view(plan.tokens)[first] < 0]
        if len(slots) and self.stage.shard.last:
            self._give(plan.step, slots)
        return slots if self.stage.shard.first else NONE

    def _columns(self, plan: StepPlan) -> _Step:
        before, step = self._before
        if not plan.repeats or plan.repeats != before:
            step = self._read(plan)
        self._before = plan.step, step
        return step

    def _read(self, plan: StepPlan) -> _Step:
        slots, lengths, rows = view(plan.slots), view(plan.lengths), np.flatnonzero(view(plan.sample))
        pure = len(view(plan.tokens)) == len(slots) == len(rows) and not plan.score
        return _Step(slots, lengths, rows, self._decodes.size_for(len(slots)) if pure else None)

    # Ways to compute it

    def _replay(self, plan: StepPlan, step: _Step, size: int, news: SlotUpdates) -> Tensor:
        """A step of decodes by the graph of ``size`` rows."""
        inbox = self._decode_inboxes[size]
        if plan.repeats and plan.repeats == self._held and self._repeated < _REPEATS:
            self._repeated += 1
            _, news = self._open(plan.step, 0, news)
            self._submissions.send(plan.step, 0, news)
        else:
            self._repeated = 0
            packed, news = self._open(plan.step, inbox.words, news)
            inbox.fill(packed, step.slots, view(plan.starts), view(plan.tokens))
            self._submissions.send(plan.step, inbox.words, news)
        self._receive(self._hidden, len(step.slots), news)
        self._decodes.replay(size)
        if self._links.pipeline.size == 1:  # the last stage alone chooses tokens, and so alone leaves a whole inbox behind
            self._held = plan.step
        return self._hidden

    @torch.inference_mode()
    def _run(self, plan: StepPlan, step: _Step, news: SlotUpdates) -> Tensor:
        """Any step: by a graph that holds it, or operation by operation."""
        tokens, sampled = view(plan.tokens), len(step.rows)
        # A step that yields nothing is completed by padding.
        exact = StepInbox(step_shape(step.lengths, self._heads), max(1, sampled), self._nobody)
        size = self._mixed.size_for(len(tokens))
        inbox = exact if size is None else self._mixed_inboxes[size]
        if not inbox.holds(exact):
            size, inbox = None, exact
        packed, news = self._open(plan.step, inbox.words, news)
        inbox.fill(packed, step.slots, view(plan.starts), step.lengths, tokens, step.rows, self._heads)
        self._submissions.send(plan.step, inbox.words, news)
        self._held = 0
        if size is not None:
            self._receive(self._hidden, len(tokens), news)
            self._mixed.replay(size)
            return self._hidden
        hidden = torch.empty(len(tokens), self.stage.model.hidden_size, dtype=self.stage.dtype, device=self._device.place)
        self._receive(hidden, len(tokens), news)
        self._compute(inbox.inputs(self._memory, self._paging), hidden, self._cache.layers)
        return hidden

    def _open(self, step: int, words: int, news: SlotUpdates) -> tuple[Ints, SlotUpdates]:
        """[words] for an inbox, and the ``news`` that go with it: what there is no room for goes ahead, in submissions of its own."""
        while len(news.places) > self._submissions.room(words):
            ahead, news = news.cut(self._submissions.room(0))
            self._submissions.open(0)
            self._submissions.send(step, 0, ahead)
            self._choose.take(self._rings, self._memory, self._state, self._returned)
        return self._submissions.open(words), news

    def _receive(self, hidden: Tensor, count: int, news: SlotUpdates) -> None:
        """What other stages send for this step, ``count`` rows of ``hidden`` among it."""
        if not self.stage.shard.first:
            self._links.pipeline.recv(hidden[:count], self._links.pipeline.rank - 1)
        if len(news.returns):
            self._links.returns.recv(self._returned[: len(news.returns)], self._links.returns.size - 1)

    @torch.inference_mode()
    def _give(self, step: int, slots: Ints) -> None:
        """Send the tokens of ``slots`` to the first stage as soon as their step has chosen them, before what follows that one here."""
        mark = self._marks[max(number for number in self._marks if number <= step - self._links.pipeline.size)]
        with self._device.beside(mark):
            self._links.returns.send(self._state.tokens.index_select(0, self._notes.send(slots)), 0)
            self._notes.sent()

    # What is computed

    def _compute(self, inputs: Inputs, hidden: Tensor, layers: list[Tensor]) -> None:
        """Take a submission, and run ``hidden`` [at least T, hidden], which stages before this one give, through as many of the stage's
        layers as ``layers`` are caches of, in place; on the last stage complete the step."""
        stage, slots, choose, hidden = self.stage, inputs.slots, self._choose, hidden[: len(inputs.tokens)]
        choose.take(self._rings, self._memory, self._state, self._returned)
        if stage.shard.first:
            stage.embed(choose.known(inputs.tokens, inputs.layout.slots, self._state), hidden)
        if not stage.shard.last:
            stage.forward(hidden, inputs.layout, layers)
            return
        positions = inputs.layout.positions
        if inputs.picks is None:
            logits = stage.decode(hidden, inputs.layout, layers)
        else:
            stage.forward(hidden, inputs.layout, layers)
            logits, positions = stage.head(hidden.index_select(0, inputs.picks)), positions.index_select(0, inputs.picks)
        best = choose.candidates(logits, slots, positions, self._state, stage.shard.vocab.start)
        if self._links.tensor.size > 1:
            best = self._links.tensor.all_gather(choose.merged(best))
        choose.winners(best, slots, positions, self._state, self._rings)

    @torch.inference_mode()
    def _extras(self, plan: StepPlan, step: _Step, hidden: Tensor) -> SamplingExtras | None:
        """What the torch sampler makes of rows with more than a temperature; reads from the device, so it waits for this step."""
        assert self._sampling is not None
        places = np.flatnonzero(self._records.special[step.slots[step.rows]])
        if not len(places) and not plan.score:
            return None
        prompt = self._sampling.scores(plan, hidden)
        if not len(places):
            return SamplingExtras(places, NONE, None, [], prompt)
        rows = step.rows[places]
        ends = torch.from_numpy(np.cumsum(step.lengths)[rows] - 1).to(hidden.device)
        choice = self._sampling.choose(plan, rows, hidden.index_select(0, ends))
        slots = torch.from_numpy(step.slots[rows].astype(np.int64)).to(hidden.device)
        self._state.tokens.index_copy_(0, slots, torch.from_numpy(np.maximum(choice.tokens, 0).astype(I32)).to(hidden.device))
        return SamplingExtras(places, choice.tokens, choice.logprobs, choice.top, prompt)

    def close(self) -> None:
        """See :class:`~workers.runner.step_results.PlanRunner`."""
        self._device.release()
        self._decodes.close()
        self._mixed.close()
