"""Applies step plans on one rank with a GPU: starts each without waiting for the one before, and answers when the device gets there.

Owns the device's copy of what a rank remembers: block tables, the last token and the seed of every slot, the cache. A step is one packed
copy, then a captured program (decodes) or the same operations one by one (all else), in one stream; a step that repeats the one before
needs a copy of what it appends only. Must never decide anything, nor read from the device where a plan can be issued without; rows with
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

from workers.core.params import seed_keys
from workers.core.plan import F32, I32, Ints, StepPlan, StepResult, view
from workers.engine.answers import Answer, Done, Extras, Pending
from workers.engine.cache import KvCache
from workers.engine.comm import Group, Waiter
from workers.engine.device import Device, Mark
from workers.engine.graphs import Graphs, graph_sizes
from workers.engine.inbox import Inbox
from workers.engine.sampler import Sampler
from workers.engine.sampling import Sampling, is_plain
from workers.engine.staging import Pinned, Staging, rounded
from workers.model.kernels.layout import DeviceLayout, Heads, Paging, SlotState, fill, step_shape
from workers.model.kernels.layout import view as view_layout
from workers.model.llama import LlamaStage

_NONE: Ints = np.zeros(0, I32)
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


class _Inputs(NamedTuple):
    """What one program reads. ``tokens`` [T] int32, perhaps guesses; ``picks`` [S] places of the tokens that yield one (None = all), of
    slots ``slots`` [S]."""

    layout: DeviceLayout
    tokens: Tensor
    picks: Tensor | None
    slots: Tensor


class _Step(NamedTuple):
    """What a plan has in common with those that repeat it; ``rows``: those that yield a token."""

    slots: Ints
    lengths: Ints
    rows: npt.NDArray[np.int64]
    graph: int | None


class _News(NamedTuple):
    """What a plan changes in the device's tables, as one int32 row after the other: ``cells`` of the block tables and their ``blocks``;
    ``opened`` slots, two words of their seeds, bits of their temperatures; slots whose token the last stage ``returns``."""

    cells: Ints
    blocks: Ints
    opened: Ints
    returns: Ints

    @property
    def words(self) -> int:
        return 2 * len(self.cells) + len(self.opened) + len(self.returns)


_NO_NEWS = _News(_NONE, _NONE, _NONE, _NONE)


class DeviceRunner:
    """Implements :class:`~workers.engine.answers.PlanRunner`.

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
        self._width = -(-max_seq_len // cache.block_size)
        self._paging = Paging.empty(slots, self._width, self._heads, on)
        self._filled = [0] * slots
        # One slot more than there are: what padding reads and writes.
        self._nobody = slots
        self._state = SlotState.empty(slots, on)
        self._special, self._specials = np.zeros(slots, np.bool_), 0
        self._sampling: Sampling | None = None
        if shard.last:
            sampler = Sampler(links.tensor, start=shard.vocab.start, rows=shard.vocab_rows, device=on)
            self._sampling = Sampling(stage, sampler, eos_ids)
        sizes = graph_sizes(slots)
        self._hidden = torch.zeros(sizes[-1], stage.model.hidden_size, dtype=stage.dtype, device=on)
        self._tokens = torch.zeros(sizes[-1], dtype=torch.int32, device=on)
        longest = Inbox.longest(sizes[-1], self._heads)
        # All inboxes begin here: the next step's is copied when nobody reads the last one's any more.
        self._memory = torch.zeros(rounded(longest + 8 * slots), dtype=torch.int32, device=on)
        self._inboxes = {size: Inbox(size, self._heads, self._memory, self._paging, self._nobody) for size in sizes}
        self._copied: dict[int, Tensor] = {}
        self._held = self._repeated = 0
        self._staging = Staging(device, words=6 * max_num_tokens + 32 * slots + longest, depth=depth + 2)
        self._notes = Staging(device, words=slots, depth=depth + 2)
        self._outbox = [Pinned(device, slots) for _ in range(depth + 2)]
        self._marks: dict[int, Mark] = {}
        # The last plan and what it has in common with most that follow.
        self._before = StepPlan(step=-1), _Step(_NONE, _NONE, np.zeros(0, np.int64), None)
        self._graphs = self._captured(sizes)

    @torch.inference_mode()
    def _captured(self, sizes: tuple[int, ...]) -> Graphs:
        return Graphs(self._device, sizes, self._decode_program)

    def _decode_program(self, size: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """One decode step of ``size`` rows, from their inbox to ``_hidden`` and ``_tokens``; and one through the first layer alone, which
        uses the same kernels as all of them."""
        inbox = self._inboxes[size]
        packed = np.zeros(inbox.words, I32)
        inbox.fill(packed, _NONE, _NONE, _NONE, _NONE, _NONE)
        self._memory[: inbox.words].copy_(torch.from_numpy(packed))
        inputs = _Inputs(inbox.layout, inbox.tokens, None, inbox.slots)

        def program(layers: list[Tensor]) -> None:
            hidden = self._hidden[:size]
            self._choose.append(self._paging.tables, inbox.cells, inbox.blocks)
            if self.stage.shard.first:
                self._embed(inputs, hidden)
            self._forward(inputs, hidden, self._tokens[:size], layers)

        return partial(program, self._cache.layers), partial(program, self._cache.layers[:1])

    # One plan

    @torch.inference_mode()
    def issue(self, plan: StepPlan) -> Answer | None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        news = self._note(plan)
        if not plan.slots:
            return Done(StepResult(step=plan.step)) if self._sampling is not None and self._answers else None
        step = self._columns(plan)
        hidden, tokens = self._run(plan, step, news) if step.graph is None else self._replay(plan, step, step.graph, news)
        shard, count = self.stage.shard, len(plan.tokens) // I32.itemsize
        if not shard.last:
            # What a graph computes is overwritten by the next one; what is sent must stay as it is.
            self._links.pipeline.send(hidden[:count] if step.graph is None else hidden[:count].clone(), self._links.pipeline.rank + 1)
            self._staging.sent()
            return None
        extras = self._extras(plan, step, hidden) if self._specials or plan.score else None
        out, sampled = self._outbox[plan.step % len(self._outbox)], len(step.rows)
        if self._answers:
            out.view(sampled).copy_(tokens[:sampled], non_blocking=True)
        mark = self._staging.sent()
        self._marks[plan.step] = mark
        self._marks.pop(plan.step - self._depth - 1, None)
        return Pending(plan.step, out.array[:sampled], mark, self._waiter, extras) if self._answers else None

    def _note(self, plan: StepPlan) -> _News:
        """Take closed and opened slots and appended blocks into the host's records; returns what the device must learn."""
        opened = _NONE
        if plan.closed or plan.opened or self._specials:
            closed = view(plan.closed)
            for slot in closed.tolist():
                self._filled[slot] = 0
            if self._sampling is not None:
                opened = self._turned_over(plan, closed, self._sampling)
        if not plan.block_slots:
            return _News(_NONE, _NONE, opened, self._guessed(plan))
        cells, filled = [], self._filled
        for slot in view(plan.block_slots).tolist():
            cells.append(slot * self._width + filled[slot])
            filled[slot] += 1
        return _News(np.asarray(cells, I32), view(plan.block_ids), opened, self._guessed(plan))

    def _turned_over(self, plan: StepPlan, closed: Ints, sampling: Sampling) -> Ints:
        """Take slots ``closed`` and those opened into the records of sampling; returns ``_News.opened``."""
        for slot in closed[self._special[closed]].tolist():
            sampling.close(slot)
            self._specials -= 1
        self._special[closed] = False
        seeds: list[int] = []
        for opened in plan.opened:
            seeds += (opened.slot, *seed_keys(opened.params.seed))
            self._special[opened.slot] = special = not is_plain(opened.params)
            if special:
                sampling.open(opened)
                self._specials += 1
        if self._specials:
            sampling.follow(plan)
        words = np.asarray(seeds, np.int64).astype(np.uint32).view(I32).reshape(-1, 3)
        heat = np.asarray([opened.params.temperature for opened in plan.opened], F32).view(I32)
        return np.concatenate((words, heat[:, None]), 1).T.reshape(-1)

    def _guessed(self, plan: StepPlan) -> Ints:
        """Slots of the rows that go on from a token which the last stage has and the first one has not."""
        if self._links.pipeline.size == 1 or not plan.slots:
            return _NONE
        lengths = view(plan.lengths)
        first = np.cumsum(lengths) - lengths
        slots = view(plan.slots)[view(plan.tokens)[first] < 0]
        if len(slots) and self.stage.shard.last:
            self._give(plan.step, slots)
        return slots if self.stage.shard.first else _NONE

    def _columns(self, plan: StepPlan) -> _Step:
        before, step = self._before
        if not (plan.repeats and plan.repeats == before.step):
            step = self._read(plan)
        self._before = plan, step
        return step

    def _read(self, plan: StepPlan) -> _Step:
        slots, lengths, rows = view(plan.slots), view(plan.lengths), np.flatnonzero(view(plan.sample))
        pure = len(view(plan.tokens)) == len(slots) == len(rows) and not plan.score
        return _Step(slots, lengths, rows, self._graphs.size_for(len(slots)) if pure else None)

    # Ways to compute it

    def _replay(self, plan: StepPlan, step: _Step, size: int, news: _News) -> tuple[Tensor, Tensor]:
        """A decode step by the graph of ``size`` rows."""
        inbox = self._inboxes[size]
        # What an inbox has no place for comes behind it, and is applied before the graph.
        late = _NO_NEWS if not (len(news.opened) or len(news.returns)) and len(news.cells) <= size else news
        cells, blocks = (news.cells, news.blocks) if late is _NO_NEWS else (_NONE, _NONE)
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
            self._send(packed, inbox.words, late, self._copied.setdefault(words, self._memory[:words]))
        if not self.stage.shard.first:
            self._links.pipeline.recv(self._hidden[: len(step.slots)], self._links.pipeline.rank - 1)
        self._graphs.replay(size)
        if self._links.pipeline.size == 1:  # the last stage alone chooses tokens, and so alone leaves a whole inbox behind
            self._held = plan.step
        return self._hidden, self._tokens

    def _run(self, plan: StepPlan, step: _Step, news: _News) -> tuple[Tensor, Tensor]:
        """Any step, operation by operation."""
        tokens = view(plan.tokens)
        shape, total, sampled = step_shape(step.lengths, self._heads), len(tokens), len(step.rows)
        bounds = np.cumsum([shape.size, total, sampled, sampled]).tolist()
        packed = self._staging.open(rounded(bounds[-1] + news.words))
        fill(shape, packed[: bounds[0]], step.slots, view(plan.starts), step.lengths, self._heads)
        packed[bounds[0] : bounds[1]] = tokens
        packed[bounds[1] : bounds[2]] = np.cumsum(step.lengths)[step.rows] - 1
        packed[bounds[2] : bounds[3]] = step.slots[step.rows]
        device = self._device.place
        inbox = torch.empty(len(packed), dtype=torch.int32, device=device)
        self._send(packed, bounds[-1], news, inbox)
        cuts = [inbox[begin:end] for begin, end in pairwise([0, *bounds])]
        inputs = _Inputs(view_layout(shape, cuts[0], self._paging), *cuts[1:])
        hidden = torch.empty(total, self.stage.model.hidden_size, dtype=self.stage.dtype, device=device)
        if self.stage.shard.first:
            self._embed(inputs, hidden)
        else:
            self._links.pipeline.recv(hidden, self._links.pipeline.rank - 1)
        chosen = torch.empty(sampled, dtype=torch.int32, device=device)
        self._forward(inputs, hidden, chosen, self._cache.layers)
        return hidden, chosen

    def _send(self, packed: Ints, head: int, news: _News, into: Tensor) -> None:
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

    def _embed(self, inputs: _Inputs, hidden: Tensor) -> None:
        self.stage.embed(self._choose.known(inputs.tokens, inputs.layout.slots, self._state), hidden)

    def _forward(self, inputs: _Inputs, hidden: Tensor, tokens: Tensor, layers: list[Tensor]) -> None:
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
        places = np.flatnonzero(self._special[step.slots[step.rows]])
        if not len(places) and not plan.score:
            return None
        prompt = self._sampling.scores(plan, hidden)
        if not len(places):
            return Extras(places, _NONE, None, [], prompt)
        rows = step.rows[places]
        ends = torch.from_numpy(np.cumsum(step.lengths)[rows] - 1).to(hidden.device)
        choice = self._sampling.choose(plan, rows, hidden.index_select(0, ends))
        slots = torch.from_numpy(step.slots[rows].astype(np.int64)).to(hidden.device)
        self._state.tokens.index_copy_(0, slots, torch.from_numpy(np.maximum(choice.tokens, 0).astype(I32)).to(hidden.device))
        return Extras(places, choice.tokens, choice.logprobs, choice.top, prompt)

    def close(self) -> None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        self._device.release()
        self._graphs.close()
