"""Applies step plans on one rank with a GPU: starts each without waiting for the one before, and answers when the device gets there.

Owns the device's copy of what a rank remembers: block tables, the last token and the seed of every slot, the cache. A step is one packed
copy, then a captured program or, where it is long, the same operations one by one, in one stream; decodes that repeat the step before need
a copy of what they append only. Must never decide anything, nor read from the device where a plan can be issued without; rows with
more than a temperature are the exception (:meth:`DeviceRunner._extras`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.core.plan import I32, Ints, StepPlan, StepResult, view
from workers.engine.answers import Answer, Done, Extras, Pending
from workers.engine.cache import KvCache
from workers.engine.comm import Group, Waiter
from workers.engine.device import Device, Mark
from workers.engine.graphs import DECODES, MIXED, Graphs, Programs, graph_sizes
from workers.engine.inbox import DecodeInbox, Inputs, StepInbox
from workers.engine.news import NONE, News, Records
from workers.engine.sampler import Sampler
from workers.engine.sampling import Sampling
from workers.engine.staging import Pinned, Staging, rounded
from workers.model.kernels.layout import Heads, Paging, SlotState, mixed_shape, step_shape
from workers.model.llama import LlamaStage

_NO_NEWS = News()
#: Repetitions after which a layout is cut anew: its last parts grow by a token each.
_REPEATS = 16


class Choose(Protocol):
    """Both ends of a step on the device: :mod:`workers.model.kernels.choose`."""

    def append(self, tables: Tensor, cells: Tensor, blocks: Tensor) -> None: ...

    def known(self, tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor: ...

    def candidates(self, logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor: ...

    def merged(self, best: Tensor) -> Tensor: ...

    def winners(self, best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, tokens: Tensor) -> None: ...


class Links(NamedTuple):
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


class DeviceRunner:
    """Implements :class:`~workers.engine.answers.PlanRunner`. Until :meth:`capture` every step runs operation by operation.

    Args:
        stage: this rank's shard on ``device``, frozen.
        slots, max_seq_len: bounds of slot numbers and of a row's tokens.
        depth: plans that may be under way.
        answers: whether this rank of the last stage is the one whose results are read.
        waiter: how to wait for the device.
    """

    def __init__(
        self,
        stage: LlamaStage,
        cache: KvCache,
        device: Device,
        choose: Choose,
        links: Links,
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
        self._paging = Paging.empty(slots, width, self._heads, on)
        # One slot more than there are: what padding reads and writes.
        self._nobody = slots
        self._state = SlotState.empty(slots, on)
        self._sampling: Sampling | None = None
        if shard.last:
            sampler = Sampler(links.tensor, start=shard.vocab.start, rows=shard.vocab_rows, device=on)
            self._sampling = Sampling(stage, sampler, eos_ids)
        self._records = Records(slots, width, self._sampling)
        decodes, mixed = graph_sizes(DECODES, slots), graph_sizes(MIXED, max_num_tokens)
        most = max(decodes[-1], mixed[-1])
        self._hidden = torch.zeros(most, stage.model.hidden_size, dtype=stage.dtype, device=on)
        self._tokens = torch.zeros(most, dtype=torch.int32, device=on)
        self._mixed_inboxes = {size: StepInbox(mixed_shape(size, self._heads), size, self._nobody) for size in mixed}
        longest = max(DecodeInbox.size(decodes[-1], self._heads), self._mixed_inboxes[mixed[-1]].words)
        # All inboxes begin here: the next step's is copied when nobody reads the last one's any more. News come behind.
        self._memory = torch.zeros(rounded(longest + 8 * slots + 4 * most), dtype=torch.int32, device=on)
        self._inboxes = {size: DecodeInbox(size, self._heads, self._memory, self._paging, self._nobody) for size in decodes}
        self._copied: dict[int, Tensor] = {}
        self._held = self._repeated = 0
        self._staging = Staging(device, words=6 * max_num_tokens + 32 * slots + longest, depth=depth + 2)
        self._notes = Staging(device, words=slots, depth=depth + 2)
        self._outbox = [Pinned(device, slots) for _ in range(depth + 2)]
        self._marks: dict[int, Mark] = {}
        # The last plan's step, and what it has in common with most that follow.
        self._before = 0, _Step(NONE, NONE, np.zeros(0, np.int64), None)
        self._mixed = self._decodes = Graphs(device, (), self._decode_program)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the programs of all sizes; kernels that were not used before are compiled."""
        self._mixed = Graphs(self._device, tuple(self._mixed_inboxes), self._mixed_program)
        self._decodes = Graphs(self._device, tuple(self._inboxes), self._decode_program)

    def _decode_program(self, size: int) -> Programs:
        """One step of ``size`` rows that decode, as for :class:`~workers.engine.graphs.Graphs`."""
        inbox = self._inboxes[size]
        packed = np.zeros(inbox.words, I32)
        inbox.fill(packed, NONE, NONE, NONE, NONE, NONE)
        return self._program(packed, inbox.inputs, partial(self._choose.append, self._paging.tables, inbox.cells, inbox.blocks))

    def _mixed_program(self, size: int) -> Programs:
        """Any step of ``size`` tokens, as for :class:`~workers.engine.graphs.Graphs`."""
        inbox = self._mixed_inboxes[size]
        packed = np.zeros(inbox.words, I32)
        inbox.fill(packed, NONE, NONE, NONE, NONE, np.zeros(0, np.int64), self._heads)
        return self._program(packed, inbox.inputs(self._memory, self._paging))

    def _program(self, packed: Ints, inputs: Inputs, before: Callable[[], None] | None = None) -> Programs:
        """A step from ``inputs``, which hold ``packed`` at first, to ``_hidden`` and ``_tokens``; and one through the first layer alone,
        which uses the same kernels as all of them."""
        self._memory[: len(packed)].copy_(torch.from_numpy(packed))

        def program(layers: list[Tensor]) -> None:
            hidden = self._hidden[: len(inputs.tokens)]
            if before is not None:
                before()
            if self.stage.shard.first:
                self._embed(inputs, hidden)
            self._forward(inputs, hidden, self._tokens[: len(inputs.slots)], layers)

        return partial(program, self._cache.layers), partial(program, self._cache.layers[:1])

    # One plan

    @torch.inference_mode()
    def issue(self, plan: StepPlan) -> Answer | None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        news = self._records.take(plan)._replace(returns=self._guessed(plan))
        if not plan.slots:
            return Done(StepResult(step=plan.step)) if self._sampling is not None and self._answers else None
        step = self._columns(plan)
        hidden, tokens = self._run(plan, step, news) if step.decodes is None else self._replay(plan, step, step.decodes, news)
        shard, count = self.stage.shard, len(plan.tokens) // I32.itemsize
        if not shard.last:
            # What a graph computes is overwritten by the next one; what is sent must stay as it is.
            self._links.pipeline.send(hidden[:count].clone() if hidden is self._hidden else hidden, self._links.pipeline.rank + 1)
            self._staging.sent()
            return None
        extras = self._extras(plan, step, hidden) if self._records.specials or plan.score else None
        out, sampled = self._outbox[plan.step % len(self._outbox)], len(step.rows)
        if self._answers:
            out.view(sampled).copy_(tokens[:sampled], non_blocking=True)
        mark = self._staging.sent()
        self._marks[plan.step] = mark
        self._marks.pop(plan.step - self._depth - 1, None)
        return Pending(plan.step, out.array[:sampled], mark, self._waiter, extras) if self._answers else None

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

    def _replay(self, plan: StepPlan, step: _Step, size: int, news: News) -> tuple[Tensor, Tensor]:
        """A step of decodes by the graph of ``size`` rows."""
        inbox = self._inboxes[size]
        # What an inbox has no place for comes behind it, and is applied before the graph.
        late = _NO_NEWS if not (len(news.opened) or len(news.returns)) and len(news.cells) <= size else news
        cells, blocks = (news.cells, news.blocks) if late is _NO_NEWS else (NONE, NONE)
        if plan.repeats and plan.repeats == self._held and self._repeated < _REPEATS and late is _NO_NEWS:
            self._repeated += 1
            if len(cells):
                packed = self._staging.open(len(inbox.appended))
                inbox.append(packed, cells, blocks)
                self._staging.send(inbox.appended)
        else:
            words = rounded(inbox.words + late.words)
            if words > len(self._memory):
                return self._run(plan, step, news)
            self._repeated = 0
            packed = self._staging.open(words)
            inbox.fill(packed[: inbox.words], step.slots, view(plan.starts), view(plan.tokens), cells, blocks)
            self._send(packed, inbox.words, late, self._begin(words))
        if not self.stage.shard.first:
            self._links.pipeline.recv(self._hidden[: len(step.slots)], self._links.pipeline.rank - 1)
        self._decodes.replay(size)
        if self._links.pipeline.size == 1:  # the last stage alone chooses tokens, and so alone leaves a whole inbox behind
            self._held = plan.step
        return self._hidden, self._tokens

    def _run(self, plan: StepPlan, step: _Step, news: News) -> tuple[Tensor, Tensor]:
        """Any step: by a graph that holds it, or operation by operation."""
        tokens, sampled = view(plan.tokens), len(step.rows)
        exact = StepInbox(step_shape(step.lengths, self._heads), sampled, self._nobody)
        size = self._mixed.size_for(len(tokens))
        inbox = exact if size is None else self._mixed_inboxes[size]
        if not inbox.holds(exact) or inbox.words + news.words > len(self._memory):
            size, inbox = None, exact
        words = rounded(inbox.words + news.words)
        packed = self._staging.open(words)
        inbox.fill(packed, step.slots, view(plan.starts), step.lengths, tokens, step.rows, self._heads)
        memory, hidden = (self._begin(words), self._hidden) if size is not None else self._fresh(words, len(tokens))
        self._send(packed, inbox.words, news, memory)
        if not self.stage.shard.first:
            self._links.pipeline.recv(hidden[: len(tokens)], self._links.pipeline.rank - 1)
        if size is not None:
            self._held = 0
            self._mixed.replay(size)
            return hidden, self._tokens
        inputs = inbox.inputs(memory, self._paging)
        if self.stage.shard.first:
            self._embed(inputs, hidden)
        chosen = torch.empty(sampled, dtype=torch.int32, device=self._device.place)
        self._forward(inputs, hidden, chosen, self._cache.layers)
        return hidden, chosen

    def _fresh(self, words: int, tokens: int) -> tuple[Tensor, Tensor]:
        """An inbox's memory and hidden states of a step's own."""
        place = self._device.place
        hidden = torch.empty(tokens, self.stage.model.hidden_size, dtype=self.stage.dtype, device=place)
        return torch.empty(words, dtype=torch.int32, device=place), hidden

    def _begin(self, words: int) -> Tensor:
        """The first ``words`` of the inboxes' memory."""
        found = self._copied.get(words)
        if found is None:
            found = self._copied[words] = self._memory[:words]
        return found

    def _send(self, packed: Ints, head: int, news: News, into: Tensor) -> None:
        """Pack ``news`` behind the first ``head`` words, copy all of it, and bring the device's tables up to date, in stream order."""
        if not news.words:
            self._staging.send(into)
            return
        bounds = list(accumulate((len(part) for part in news), initial=head))
        for part, (begin, end) in zip(news, pairwise(bounds), strict=True):
            packed[begin:end] = part
        self._staging.send(into)
        cells, blocks, opened, returns = (into[begin:end] for begin, end in pairwise(bounds))
        if len(news.cells):
            self._choose.append(self._paging.tables, cells, blocks)
        if len(news.opened):
            slots, low, high, heat = opened.view(4, -1)
            self._state.seeds.index_copy_(0, slots.long(), torch.stack((low, high), 1))
            self._state.temperatures.index_copy_(0, slots.long(), heat.view(torch.float32))
        if len(news.returns):
            taken = torch.empty(len(news.returns), dtype=torch.int32, device=self._device.place)
            self._links.returns.recv(taken, self._links.returns.size - 1)
            self._state.tokens.index_copy_(0, returns.long(), taken)

    def _give(self, step: int, slots: Ints) -> None:
        """Send the tokens of ``slots`` to the first stage as soon as their step has chosen them, before what follows that one here."""
        mark = self._marks[max(number for number in self._marks if number <= step - self._links.pipeline.size)]
        with self._device.beside(mark):
            words = rounded(len(slots))
            self._notes.open(words)[: len(slots)] = slots
            places = torch.empty(words, dtype=torch.int32, device=self._device.place)
            self._notes.send(places)
            self._links.returns.send(self._state.tokens.index_select(0, places[: len(slots)]), 0)
            self._notes.sent()

    # What is computed

    def _embed(self, inputs: Inputs, hidden: Tensor) -> None:
        self.stage.embed(self._choose.known(inputs.tokens, inputs.layout.slots, self._state), hidden)

    def _forward(self, inputs: Inputs, hidden: Tensor, tokens: Tensor, layers: list[Tensor]) -> None:
        """Run ``hidden`` [T, hidden] through as many of the stage's layers as ``layers`` are caches of, in place; on the last stage write
        ``tokens`` [S], -1 where nothing is finite."""
        stage, positions, slots, choose = self.stage, inputs.layout.positions, inputs.slots, self._choose
        if not stage.shard.last or not len(tokens):
            stage.forward(hidden, inputs.layout, layers)
            return
        if inputs.picks is None:
            logits = stage.decode(hidden, inputs.layout, layers)
        else:
            stage.forward(hidden, inputs.layout, layers)
            logits, positions = stage.head(hidden.index_select(0, inputs.picks)), positions.index_select(0, inputs.picks)
        best = choose.candidates(logits, slots, positions, self._state, stage.shard.vocab.start)
        if self._links.tensor.size > 1:
            best = self._links.tensor.all_gather(choose.merged(best))
        choose.winners(best, slots, positions, self._state, tokens)

    def _extras(self, plan: StepPlan, step: _Step, hidden: Tensor) -> Extras | None:
        """What the torch sampler makes of rows with more than a temperature; reads from the device, so it waits for this step."""
        assert self._sampling is not None
        places = np.flatnonzero(self._records.special[step.slots[step.rows]])
        if not len(places) and not plan.score:
            return None
        prompt = self._sampling.scores(plan, hidden)
        if not len(places):
            return Extras(places, NONE, None, [], prompt)
        rows = step.rows[places]
        ends = torch.from_numpy(np.cumsum(step.lengths)[rows] - 1).to(hidden.device)
        choice = self._sampling.choose(plan, rows, hidden.index_select(0, ends))
        slots = torch.from_numpy(step.slots[rows].astype(np.int64)).to(hidden.device)
        self._state.tokens.index_copy_(0, slots, torch.from_numpy(np.maximum(choice.tokens, 0).astype(I32)).to(hidden.device))
        return Extras(places, choice.tokens, choice.logprobs, choice.top, prompt)

    def close(self) -> None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        self._device.release()
        self._decodes.close()
        self._mixed.close()
