"""Applies step plans on one rank with a GPU: starts each step without waiting for the previous one.

Owns the device's state of the slots (block tables, the last token and the seed of every slot) and the KV cache. A step is one submission,
and then one captured program that takes the submission and completes the step; a step that no graph holds runs as the same operations one
by one, in the same stream. The submission of a decode step that repeats the previous one contains only the appended blocks. Must never
decide anything, and never read from the device to issue a plan, except for sequences that need the torch sampler
(:meth:`GpuRunner._sample_with_torch`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.distributed.group import Waiter
from workers.distributed.rank_groups import RankGroups
from workers.kernels.step_layout import HEADER_WORDS, Heads, LayoutShape, Paging, Rings, SlotState, mixed_shape, step_shape
from workers.models.stage import Stage
from workers.runner.device import DECODE_GRAPH_SIZES, MIXED_GRAPH_SIZES, Device, DeviceEvent, GraphProgram, Graphs, Staging, graph_sizes
from workers.runner.host_device_rings import Completions, Submissions
from workers.runner.kv_cache import KvCache
from workers.runner.sampler import Sampler
from workers.runner.slot_sampling import SlotSampling
from workers.runner.slot_updates import NONE, SlotRecords, SlotUpdates
from workers.runner.step_inputs import DecodeInputFormat, MixedInputFormat, StepInputs
from workers.runner.step_results import DeviceResult, PendingResult, ReadyResult, SamplingExtras
from workers.scheduler.step_plan import I32, Ints, StepPlan, StepResult, view

#: Slot updates per slot for which a submission has room in addition to its inputs. A step with more updates sends some in advance.
_UPDATES_PER_SLOT = 8
#: Repeated steps after which the attention layout is computed again: in each repeated step, the last part of every sequence grows by one
#: token.
_MAX_REPEATS = 16


class StepEnds(Protocol):
    """The operations at both ends of a step on the device: :mod:`workers.kernels.step_ends`."""

    def take_submission(self, rings: Rings, memory: Tensor, state: SlotState, returned: Tensor) -> None: ...

    def resolve_placeholders(self, tokens: Tensor, slots: Tensor, state: SlotState) -> Tensor: ...

    def best_candidates(self, logits: Tensor, slots: Tensor, positions: Tensor, state: SlotState, start: int) -> Tensor: ...

    def merge_candidates(self, best: Tensor) -> Tensor: ...

    def choose_tokens(self, best: Tensor, slots: Tensor, positions: Tensor, state: SlotState, rings: Rings) -> None: ...


class _Step(NamedTuple):
    """Facts that a plan shares with the plans that repeat it. ``sampled_indices`` [N]: the sequences that yield a token; ``graph_size``:
    the size of the decode graph for the step, None if it has other sequences than decodes or if no graph is large enough."""

    slots: Ints
    lengths: Ints
    sampled_indices: npt.NDArray[np.int64]
    graph_size: int | None


class GpuRunner:
    """Implements :class:`~workers.runner.step_results.PlanRunner`. Until :meth:`capture` every step runs operation by operation.

    Args:
        stage: this rank's shard on ``device``, frozen.
        step_ends: the module :mod:`workers.kernels.step_ends`, or a replacement in tests. slots, max_seq_len: bounds of slot numbers and of
        a sequence's tokens. depth: how many plans may be in flight. reports_results: whether the leader reads the results of this rank (one
        rank of the last stage). waiter: how to wait for the device.
    """

    def __init__(
        self,
        stage: Stage,
        cache: KvCache,
        device: Device,
        step_ends: StepEnds,
        groups: RankGroups,
        *,
        slots: int,
        max_seq_len: int,
        max_num_tokens: int,
        depth: int,
        reports_results: bool = True,
        eos_ids: tuple[int, ...] = (),
        waiter: Waiter | None = None,
    ) -> None:
        #: This rank's part of the model; read-only for others.
        self.stage = stage
        self._cache, self._device, self._step_ends, self._groups = cache, device, step_ends, groups
        self._depth, self._reports_results, self._waiter = depth, reports_results, waiter or Waiter()
        shard, on = stage.shard, device.torch_device
        self._heads = Heads(shard.heads.size, shard.kv_heads.size)
        width = -(-max_seq_len // cache.block_size)
        # One more slot than sequences can use: padding reads and writes it.
        self._padding_slot = slots
        self._state = SlotState.empty(slots, width, on)
        self._paging = Paging.over(self._state.tables, self._heads)
        self._sampling: SlotSampling | None = None
        if shard.last:
            sampler = Sampler(groups.tensor, start=shard.vocab.start, rows=shard.vocab_rows, device=on)
            self._sampling = SlotSampling(stage, sampler, eos_ids)
        self._records = SlotRecords(slots, width, self._sampling)
        decode_sizes, mixed_sizes = graph_sizes(DECODE_GRAPH_SIZES, slots), graph_sizes(MIXED_GRAPH_SIZES, max_num_tokens)
        largest = max(decode_sizes[-1], mixed_sizes[-1])
        self._hidden = torch.zeros(largest, stage.model.hidden_size, dtype=stage.dtype, device=on)
        self._decode_formats = {size: DecodeInputFormat(size, self._heads, self._padding_slot) for size in decode_sizes}
        self._mixed_formats = {size: MixedInputFormat(mixed_shape(size, self._heads), size, self._padding_slot) for size in mixed_sizes}
        widest = LayoutShape(tokens=max_num_tokens, parts=slots + self._heads.spare_parts, tiles=max_num_tokens)
        formats = (
            self._decode_formats[decode_sizes[-1]],
            self._mixed_formats[mixed_sizes[-1]],
            MixedInputFormat(widest, slots, self._padding_slot),
        )
        longest = max(form.words for form in formats)
        # The inputs of every step begin here: they are written after the last read of the previous step's inputs.
        self._memory = torch.zeros(longest, dtype=torch.int32, device=on)
        self._returned = torch.zeros(slots, dtype=torch.int32, device=on)
        entries = 1 << (depth + 1).bit_length()
        words = HEADER_WORDS + longest + 3 * (_UPDATES_PER_SLOT * slots + 8)
        self._rings = Rings.empty(device.pinned, on, words=words, sequences=max(largest, slots), depth=entries)
        self._submissions, self._completions = Submissions(self._rings, device, self._waiter), Completions(self._rings, device)
        # The step that left the inputs of the next decode step in memory (0 = none), and how often it was repeated.
        self._repeatable = self._repeats = 0
        self._staging = Staging(device, words=slots, depth=entries)
        #: Events at the end of the device's work of each recent step, by step number; only with several stages.
        self._events: dict[int, DeviceEvent] = {}
        # The number of the last plan, and the facts that it shares with the plans that repeat it.
        self._last = 0, _Step(NONE, NONE, np.zeros(0, np.int64), None)
        self._mixed_graphs = self._decode_graphs = Graphs(device, (), self._decode_program)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the programs of all sizes. This compiles kernels that were not used before."""
        self._mixed_graphs = Graphs(self._device, tuple(self._mixed_formats), self._mixed_program)
        self._decode_graphs = Graphs(self._device, tuple(self._decode_formats), self._decode_program)

    def _decode_program(self, size: int) -> GraphProgram:
        """One step of ``size`` sequences that decode."""
        form = self._decode_formats[size]
        return self._program(form, lambda packed: form.fill(packed, NONE, NONE, NONE))

    def _mixed_program(self, size: int) -> GraphProgram:
        """Any step of ``size`` tokens."""
        form = self._mixed_formats[size]
        return self._program(form, lambda packed: form.fill(packed, NONE, NONE, NONE, NONE, np.zeros(0, np.int64), self._heads))

    def _program(self, form: DecodeInputFormat | MixedInputFormat, fill_padding: Callable[[Ints], None]) -> GraphProgram:
        """The program of a step from inputs of ``form`` to its completion, over ``_hidden``. The warm-up is a step that contains only
        padding, written by ``fill_padding``, through the first layer only, because all layers use the same kernels."""
        inputs = form.views(self._memory, self._paging)

        def warm_up() -> None:
            fill_padding(self._submissions.open(form.words))
            self._submissions.send(0, form.words, SlotUpdates())
            self._compute(inputs, self._hidden, self._cache.layers[:1])

        return GraphProgram(partial(self._compute, inputs, self._hidden, self._cache.layers), warm_up)

    # One plan

    def issue(self, plan: StepPlan) -> PendingResult | None:
        """See :class:`~workers.runner.step_results.PlanRunner`."""
        # Most plans are replayed without a call of torch: inference mode is entered only if torch makes tensors.
        updates = self._records.apply(plan)
        if self._groups.pipeline.size > 1:
            updates = updates._replace(returned=self._records.token_indices(self._return_placeholders(plan)))
        if not plan.slots:
            return ReadyResult(StepResult(step=plan.step)) if self._sampling is not None and self._reports_results else None
        step = self._step_of(plan)
        if step.graph_size is None:
            hidden = self._run_mixed(plan, step, updates)
        else:
            hidden = self._run_decodes(plan, step, step.graph_size, updates)
        if not self.stage.shard.last:
            self._send_hidden(hidden, len(plan.tokens) // I32.itemsize)
            return None
        extras = self._sample_with_torch(plan, step, hidden) if self._records.torch_count or plan.score else None
        if self._groups.pipeline.size > 1:
            self._record_event(plan.step)
        if not self._reports_results:
            return None
        return DeviceResult(plan.step, self._completions.of(plan.step, len(step.sampled_indices)), self._waiter, extras)

    def _record_event(self, step: int) -> None:
        """Record an event at the end of the device's work for ``step``."""
        reused = self._events.pop(step - self._depth - 1, None)
        event = self._events[step] = self._device.event() if reused is None else reused
        event.record()

    @torch.inference_mode()
    def _send_hidden(self, hidden: Tensor, count: int) -> None:
        """Send the first ``count`` tokens of ``hidden`` to the next stage."""
        # The next graph overwrites this memory, so the tensor that is sent is copied.
        self._groups.pipeline.send(hidden[:count].clone() if hidden is self._hidden else hidden, self._groups.pipeline.rank + 1)

    def _return_placeholders(self, plan: StepPlan) -> Ints:
        """With several stages, the last one sends the first one the tokens for the placeholders in ``plan``. Returns the slots whose tokens
        this rank receives: [m] int32 on the first stage, none elsewhere."""
        if not plan.slots:
            return NONE
        lengths = view(plan.lengths)
        first = np.cumsum(lengths) - lengths
        slots = view(plan.slots)[view(plan.tokens)[first] < 0]
        if len(slots) and self.stage.shard.last:
            self._return_tokens(plan.step, slots)
        return slots if self.stage.shard.first else NONE

    @torch.inference_mode()
    def _return_tokens(self, step: int, slots: Ints) -> None:
        """Send the last tokens of ``slots`` to the first stage as soon as the step that sampled them is done, before later steps."""
        event = self._events[max(number for number in self._events if number <= step - self._groups.pipeline.size)]
        with self._device.side_stream(event):
            self._groups.token_return.send(self._state.tokens.index_select(0, self._staging.send(slots)), 0)
            self._staging.sent()

    def _step_of(self, plan: StepPlan) -> _Step:
        """The plan's :class:`_Step`: that of the previous plan if this one repeats it."""
        last, step = self._last
        if not plan.repeats or plan.repeats != last:
            step = self._read(plan)
        self._last = plan.step, step
        return step

    def _read(self, plan: StepPlan) -> _Step:
        slots, lengths, sampled_indices = view(plan.slots), view(plan.lengths), np.flatnonzero(view(plan.sample))
        all_decode = len(view(plan.tokens)) == len(slots) == len(sampled_indices) and not plan.score
        return _Step(slots, lengths, sampled_indices, self._decode_graphs.size_for(len(slots)) if all_decode else None)

    # Ways to run it

    def _run_decodes(self, plan: StepPlan, step: _Step, size: int, updates: SlotUpdates) -> Tensor:
        """Run a step of decodes by the graph of ``size`` sequences; returns its hidden states."""
        form = self._decode_formats[size]
        if plan.repeats and plan.repeats == self._repeatable and self._repeats < _MAX_REPEATS:
            self._repeats += 1
            _, updates = self._open(plan.step, 0, updates)
            self._submissions.send(plan.step, 0, updates)
        else:
            self._repeats = 0
            packed, updates = self._open(plan.step, form.words, updates)
            form.fill(packed, step.slots, view(plan.starts), view(plan.tokens))
            self._submissions.send(plan.step, form.words, updates)
        self._receive(self._hidden, len(step.slots), updates)
        self._decode_graphs.replay(size)
        if self._groups.pipeline.size == 1:  # only the last stage samples tokens, so only it leaves inputs for a repeated step
            self._repeatable = plan.step
        return self._hidden

    @torch.inference_mode()
    def _run_mixed(self, plan: StepPlan, step: _Step, updates: SlotUpdates) -> Tensor:
        """Run any step, by a graph that holds it or operation by operation; returns its hidden states."""
        tokens, sampled_count = view(plan.tokens), len(step.sampled_indices)
        # A step that yields no token is completed by one padding sequence.
        exact = MixedInputFormat(step_shape(step.lengths, self._heads), max(1, sampled_count), self._padding_slot)
        size = self._mixed_graphs.size_for(len(tokens))
        form = exact if size is None else self._mixed_formats[size]
        if not form.holds(exact):
            size, form = None, exact
        packed, updates = self._open(plan.step, form.words, updates)
        form.fill(packed, step.slots, view(plan.starts), step.lengths, tokens, step.sampled_indices, self._heads)
        self._submissions.send(plan.step, form.words, updates)
        self._repeatable = 0
        if size is not None:
            self._receive(self._hidden, len(tokens), updates)
            self._mixed_graphs.replay(size)
            return self._hidden
        hidden = torch.empty(len(tokens), self.stage.model.hidden_size, dtype=self.stage.dtype, device=self._device.torch_device)
        self._receive(hidden, len(tokens), updates)
        self._compute(form.views(self._memory, self._paging), hidden, self._cache.layers)
        return hidden

    def _open(self, step: int, words: int, updates: SlotUpdates) -> tuple[Ints, SlotUpdates]:
        """Open a submission with ``words`` of inputs. Returns these words, and the ``updates`` to send with them; updates for which there
        is no room are sent before, in separate submissions."""
        while len(updates.indices) > self._submissions.room(words):
            ahead, updates = updates.split(self._submissions.room(0))
            self._submissions.open(0)
            self._submissions.send(step, 0, ahead)
            self._step_ends.take_submission(self._rings, self._memory, self._state, self._returned)
        return self._submissions.open(words), updates

    def _receive(self, hidden: Tensor, count: int, updates: SlotUpdates) -> None:
        """Receive this step's data from other stages: ``count`` tokens of ``hidden`` from the previous stage, and on the first stage the
        tokens that the last one returns."""
        if not self.stage.shard.first:
            self._groups.pipeline.recv(hidden[:count], self._groups.pipeline.rank - 1)
        if len(updates.returned):
            self._groups.token_return.recv(self._returned[: len(updates.returned)], self._groups.token_return.size - 1)

    # What is computed

    def _compute(self, inputs: StepInputs, hidden: Tensor, layers: list[Tensor]) -> None:
        """Read one submission and run the step in place in ``hidden`` [at least T, hidden_size], through as many of the stage's layers as
        ``layers`` has caches. The first stage embeds the tokens, the last one completes the step."""
        stage, slots, ends, hidden = self.stage, inputs.slots, self._step_ends, hidden[: len(inputs.tokens)]
        ends.take_submission(self._rings, self._memory, self._state, self._returned)
        if stage.shard.first:
            stage.embed(ends.resolve_placeholders(inputs.tokens, inputs.layout.slots, self._state), hidden)
        if not stage.shard.last:
            stage.forward(hidden, inputs.layout, layers)
            return
        positions = inputs.layout.positions
        if inputs.picks is None:
            logits = stage.decode(hidden, inputs.layout, layers)
        else:
            stage.forward(hidden, inputs.layout, layers)
            logits, positions = stage.head(hidden.index_select(0, inputs.picks)), positions.index_select(0, inputs.picks)
        best = ends.best_candidates(logits, slots, positions, self._state, stage.shard.vocab.start)
        if self._groups.tensor.size > 1:
            best = self._groups.tensor.all_gather(ends.merge_candidates(best))
        ends.choose_tokens(best, slots, positions, self._state, self._rings)

    @torch.inference_mode()
    def _sample_with_torch(self, plan: StepPlan, step: _Step, hidden: Tensor) -> SamplingExtras | None:
        """Sample the sequences that need the torch sampler, and score prompts; None if the step has neither. It reads from the device, so
        it waits for this step."""
        assert self._sampling is not None
        indices = np.flatnonzero(self._records.needs_torch[step.slots[step.sampled_indices]])
        if not len(indices) and not plan.score:
            return None
        prompt_logprobs = self._sampling.prompt_logprobs(plan, hidden)
        if not len(indices):
            return SamplingExtras(indices, NONE, None, [], prompt_logprobs)
        sequences = step.sampled_indices[indices]
        last_tokens = torch.from_numpy(np.cumsum(step.lengths)[sequences] - 1).to(hidden.device)
        sampled = self._sampling.sample(plan, sequences, hidden.index_select(0, last_tokens))
        slots = torch.from_numpy(step.slots[sequences].astype(np.int64)).to(hidden.device)
        self._state.tokens.index_copy_(0, slots, torch.from_numpy(np.maximum(sampled.tokens, 0).astype(I32)).to(hidden.device))
        return SamplingExtras(indices, sampled.tokens, sampled.logprobs, sampled.top, prompt_logprobs)

    def close(self) -> None:
        """See :class:`~workers.runner.step_results.PlanRunner`."""
        self._device.release()
        self._decode_graphs.close()
        self._mixed_graphs.close()
