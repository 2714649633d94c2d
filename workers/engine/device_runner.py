"""Applies step plans on one rank with a GPU: starts each without waiting for the one before, and answers when the device gets there.

Owns the device's copy of what a rank remembers: block tables, the last token and the seed of every slot, the cache. A step is one packed
copy, then a captured program (decodes) or the same operations one by one (all else), in one stream. Must never decide anything, nor read
from the device where a plan can be issued without; rows with more than a temperature are the exception (:meth:`DeviceRunner._extras`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
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
from workers.engine.sampler import Sampler
from workers.engine.sampling import Sampling, is_plain
from workers.engine.staging import Staging
from workers.model.kernels.layout import DeviceLayout, Heads, Paging, decode_shape, fill, step_shape
from workers.model.kernels.layout import view as view_layout
from workers.model.llama import LlamaStage

_NONE: Ints = np.zeros(0, I32)


class Choose(Protocol):
    """Greedy and plain temperature on the device: :mod:`workers.model.kernels.choose`."""

    def candidates(self, logits: Tensor, seeds: Tensor, temperatures: Tensor, positions: Tensor, start: int) -> Tensor: ...

    def merged(self, best: Tensor) -> Tensor: ...

    def winners(self, best: Tensor) -> tuple[Tensor, Tensor]: ...


class Links(NamedTuple):
    """The groups of a rank: the tp ranks of its stage, the stages of its tp rank, and the same stages once more for sampled ids, which
    must not wait behind hidden states."""

    tensor: Group
    pipeline: Group
    returns: Group


class _Inputs(NamedTuple):
    """What one program reads. ``tokens`` [T] int32, the first ``len(lead)`` of them perhaps guesses, of slots ``lead``; ``picks`` [S]
    places of the tokens that yield one (None = all), of slots ``slots`` [S]."""

    layout: DeviceLayout
    tokens: Tensor
    lead: Tensor
    picks: Tensor | None
    slots: Tensor


class _Step(NamedTuple):
    """A plan's columns."""

    slots: Ints
    starts: Ints
    lengths: Ints
    tokens: Ints
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
        self._filled = np.zeros(slots, np.int64)
        # One slot more than there are: what padding reads and writes.
        self._nobody = slots
        self._pool = torch.zeros(slots + 1, dtype=torch.int32, device=on)
        self._seeds = torch.zeros(slots + 1, 2, dtype=torch.int32, device=on)
        self._temperatures = torch.zeros(slots + 1, dtype=torch.float32, device=on)
        self._special = np.zeros(slots, np.bool_)
        self._sampling: Sampling | None = None
        if shard.last:
            sampler = Sampler(links.tensor, start=shard.vocab.start, rows=shard.vocab_rows, device=on)
            self._sampling = Sampling(stage, sampler, eos_ids)
        sizes = graph_sizes(slots)
        self._hidden = torch.zeros(sizes[-1], stage.model.hidden_size, dtype=stage.dtype, device=on)
        self._tokens = torch.zeros(sizes[-1], dtype=torch.int32, device=on)
        shapes = [decode_shape(size, self._heads).size + 2 * size for size in sizes]
        self._inbox = torch.zeros(max(shapes) + 8 * slots, dtype=torch.int32, device=on)
        self._staging = Staging(device, words=6 * max_num_tokens + 32 * slots + max(shapes), depth=depth + 2)
        self._notes = Staging(device, words=slots, depth=depth + 2)
        self._outbox = [device.pinned(slots) for _ in range(depth + 2)]
        self._marks: dict[int, Mark] = {}
        self._graphs = self._captured(sizes)

    @torch.inference_mode()
    def _captured(self, sizes: tuple[int, ...]) -> Graphs:
        return Graphs(self._device, sizes, self._decode_program)

    def _decode_program(self, size: int) -> Callable[[], None]:
        """One decode step of ``size`` rows, from the inbox to ``_hidden`` and ``_tokens``."""
        shape = decode_shape(size, self._heads)
        packed = np.zeros(shape.size + 2 * size, I32)
        fill(shape, packed[: shape.size], _NONE, _NONE, _NONE, self._heads)
        packed[shape.size + size :] = self._nobody
        inbox = self._inbox[: len(packed)]
        inbox.copy_(torch.from_numpy(packed))
        slots = inbox[shape.size + size :]
        layout = view_layout(shape, inbox[: shape.size], self._paging)
        inputs = _Inputs(layout, inbox[shape.size : shape.size + size], slots, None, slots)

        def program() -> None:
            hidden = self._hidden[:size]
            if self.stage.shard.first:
                hidden.copy_(self._embed(inputs))
            self._forward(inputs, hidden, self._tokens[:size])

        return program

    # One plan

    @torch.inference_mode()
    def issue(self, plan: StepPlan) -> Answer | None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        news = self._note(plan)
        if not plan.slots:
            return Done(StepResult(step=plan.step)) if self._sampling is not None and self._answers else None
        step = self._columns(plan)
        hidden, tokens = self._run(step, news) if step.graph is None else self._replay(step, step.graph, news)
        shard, count = self.stage.shard, len(step.tokens)
        if not shard.last:
            # What a graph computes is overwritten by the next one; what is sent must stay as it is.
            self._links.pipeline.send(hidden[:count] if step.graph is None else hidden[:count].clone(), self._links.pipeline.rank + 1)
            return None
        extras = self._extras(plan, step, hidden)
        mark = self._device.mark()
        self._marks[plan.step] = mark
        self._marks.pop(plan.step - self._depth - 1, None)
        return self._answer(plan.step, tokens[: len(step.rows)], extras) if self._answers else None

    def _note(self, plan: StepPlan) -> _News:
        """Take closed and opened slots and appended blocks into the host's records; returns what the device must learn."""
        if not (plan.closed or plan.opened or plan.block_slots or self._special.any()):  # most decode steps
            return _News(_NONE, _NONE, _NONE, self._guessed(plan))
        closed = view(plan.closed)
        self._filled[closed] = 0
        seeds: list[int] = []
        if self._sampling is not None:
            for slot in closed[self._special[closed]].tolist():
                self._sampling.close(slot)
            self._special[closed] = False
            for opened in plan.opened:
                seeds += (opened.slot, *seed_keys(opened.params.seed))
                self._special[opened.slot] = special = not is_plain(opened.params)
                if special:
                    self._sampling.open(opened)
            if self._special.any():
                self._sampling.follow(plan)
        words = np.asarray(seeds, np.int64).astype(np.uint32).view(I32).reshape(-1, 3)
        heat = np.asarray([opened.params.temperature for opened in plan.opened[: len(words)]], F32).view(I32)
        slots, blocks = view(plan.block_slots), view(plan.block_ids)
        # Blocks of one slot stand together: each comes after those that the slot has and those before it here.
        change = np.flatnonzero(np.diff(slots, prepend=-1))
        counts = np.diff(change, append=len(slots))
        places = self._filled[slots] + np.arange(len(slots)) - np.repeat(change, counts)
        self._filled[slots[change]] += counts
        return _News(
            (slots * self._width + places).astype(I32),
            blocks,
            np.concatenate((words, heat[:, None]), 1).T.reshape(-1),
            self._guessed(plan),
        )

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
        slots, starts, lengths, tokens = view(plan.slots), view(plan.starts), view(plan.lengths), view(plan.tokens)
        sample = view(plan.sample)
        rows = np.flatnonzero(sample)
        pure = len(tokens) == len(slots) == len(rows) and not plan.score
        return _Step(slots, starts, lengths, tokens, rows, self._graphs.size_for(len(slots)) if pure else None)

    # Ways to compute it

    def _replay(self, step: _Step, size: int, news: _News) -> tuple[Tensor, Tensor]:
        """A decode step by the graph of ``size`` rows."""
        shape, count = decode_shape(size, self._heads), len(step.slots)
        layout = shape.size
        tokens, head = layout + size, layout + 2 * size
        if head + news.words > len(self._inbox):
            return self._run(step, news)
        packed = self._staging.open(head + news.words)
        fill(shape, packed[:layout], step.slots, step.starts, step.lengths, self._heads)
        packed[layout : layout + count] = step.tokens
        packed[layout + count : tokens] = 0
        packed[tokens : tokens + count] = step.slots
        packed[tokens + count : head] = self._nobody
        self._learn(self._send(packed, head, news, self._inbox[: len(packed)]), news)
        if not self.stage.shard.first:
            self._links.pipeline.recv(self._hidden[:count], self._links.pipeline.rank - 1)
        self._graphs.replay(size)
        return self._hidden, self._tokens

    def _run(self, step: _Step, news: _News) -> tuple[Tensor, Tensor]:
        """Any step, operation by operation."""
        shape, total, sampled = step_shape(step.lengths, self._heads), len(step.tokens), len(step.rows)
        longer = step.lengths != 1
        lead = int(longer.argmax()) if longer.any() else len(step.slots)
        bounds = np.cumsum([shape.size, total, lead, sampled, sampled]).tolist()
        packed = self._staging.open(bounds[-1] + news.words)
        fill(shape, packed[: bounds[0]], step.slots, step.starts, step.lengths, self._heads)
        packed[bounds[0] : bounds[1]] = step.tokens
        packed[bounds[1] : bounds[2]] = step.slots[:lead]
        packed[bounds[2] : bounds[3]] = np.cumsum(step.lengths)[step.rows] - 1
        packed[bounds[3] : bounds[4]] = step.slots[step.rows]
        device = self._device.place
        inbox = torch.empty(len(packed), dtype=torch.int32, device=device)
        self._learn(self._send(packed, bounds[-1], news, inbox), news)
        cuts = [inbox[begin:end] for begin, end in pairwise([0, *bounds])]
        inputs = _Inputs(view_layout(shape, cuts[0], self._paging), *cuts[1:])
        if self.stage.shard.first:
            hidden = self._embed(inputs)
        else:
            hidden = torch.empty(total, self.stage.model.hidden_size, dtype=self.stage.dtype, device=device)
            self._links.pipeline.recv(hidden, self._links.pipeline.rank - 1)
        tokens = torch.empty(sampled, dtype=torch.int32, device=device)
        self._forward(inputs, hidden, tokens)
        return hidden, tokens

    def _send(self, packed: Ints, head: int, news: _News, into: Tensor) -> list[Tensor]:
        """Pack ``news`` behind the first ``head`` words and copy all of it; returns the news' parts on the device."""
        lengths = [len(part) for part in news]
        bounds = np.cumsum([head, *lengths]).tolist()
        for part, (begin, end) in zip(news, pairwise(bounds), strict=True):
            packed[begin:end] = part
        self._staging.send(into)
        return [into[begin:end] for begin, end in pairwise(bounds)]

    def _learn(self, parts: list[Tensor], news: _News) -> None:
        """Bring the device's tables up to date, in stream order."""
        cells, blocks, opened, returns = parts
        if len(news.cells):
            self._paging.tables.view(-1).index_copy_(0, cells.long(), blocks)
        if len(news.opened):
            slots, low, high, heat = opened.view(4, -1)
            self._seeds.index_copy_(0, slots.long(), torch.stack((low, high), 1))
            self._temperatures.index_copy_(0, slots.long(), heat.view(torch.float32))
        if len(news.returns):
            taken = torch.empty(len(news.returns), dtype=torch.int32, device=self._device.place)
            self._links.returns.recv(taken, self._links.returns.size - 1)
            self._pool.index_copy_(0, returns.long(), taken)

    def _give(self, step: int, slots: Ints) -> None:
        """Send the tokens of ``slots`` to the first stage as soon as their step has chosen them, before what follows that one here."""
        mark = self._marks[max(number for number in self._marks if number <= step - self._links.pipeline.size)]
        with self._device.beside(mark):
            self._notes.open(len(slots))[:] = slots
            places = self._notes.send(torch.empty(len(slots), dtype=torch.int32, device=self._device.place))
            self._links.returns.send(self._pool.index_select(0, places), 0)

    # What is computed

    def _embed(self, inputs: _Inputs) -> Tensor:
        ids, lead = inputs.tokens, len(inputs.lead)
        if lead:
            known = torch.where(ids[:lead] < 0, self._pool.index_select(0, inputs.lead), ids[:lead])
            ids = known if lead == len(ids) else torch.cat((known, ids[lead:]))
        return self.stage.embed(ids)

    def _forward(self, inputs: _Inputs, hidden: Tensor, tokens: Tensor) -> None:
        """Run ``hidden`` [T, hidden] through the stage, in place; on the last one write ``tokens`` [S], -1 where nothing is finite."""
        self.stage.forward(hidden, inputs.layout, self._cache.layers)
        if not self.stage.shard.last or not len(tokens):
            return
        picked, positions = hidden, inputs.layout.positions
        if inputs.picks is not None:
            picked, positions = hidden.index_select(0, inputs.picks), positions.index_select(0, inputs.picks)
        slots, choose = inputs.slots.long(), self._choose
        seeds, temperatures = self._seeds.index_select(0, slots), self._temperatures.index_select(0, slots)
        best = choose.candidates(self.stage.head(picked), seeds, temperatures, positions, self.stage.shard.vocab.start)
        if self._links.tensor.size > 1:
            best = self._links.tensor.all_gather(choose.merged(best))
        tokens.copy_(choose.winners(best)[0])
        # A row without a finite logit goes on, until its fault is seen, from a token that exists.
        self._pool.index_copy_(0, slots, tokens.clamp_min(0))

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
        self._pool.index_copy_(0, slots, torch.from_numpy(np.maximum(choice.tokens, 0).astype(I32)).to(hidden.device))
        return Extras(places, choice.tokens, choice.logprobs, choice.top, prompt)

    def _answer(self, number: int, tokens: Tensor, extras: Extras | None) -> Answer:
        out = self._outbox[number % len(self._outbox)][: len(tokens)]
        out.copy_(tokens, non_blocking=True)
        return Pending(number, out, self._device.mark(), self._waiter, extras)

    def close(self) -> None:
        """See :class:`~workers.engine.answers.PlanRunner`."""
        self._device.release()
        self._graphs.close()
