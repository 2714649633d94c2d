"""The cost of a step as a roofline: bytes over bandwidth, products over peak, sums over links, and fixed costs per layer and step.

Pure functions of shapes and rates. :mod:`orchestrator.planner.devices` holds the rates; a workload is replayed step by step as the
scheduler would run it. Must never know a device by its name.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import msgspec

from workers.layout.declaration import EXPERTS, VOCAB_EMBEDDING
from workers.layout.memory import kv_format
from workers.layout.quant_parts import FORMAT_BYTES, quantized, stored_tensors, unit_of
from workers.layout.sharding import Shard, heads_of, shard_of, shares_embedding
from workers.protocol.specs import DTYPE_BYTES, EngineSpec, MlpSpec, ModelSpec, MoeSpec, Parallel, Quant

#: Smoothness of the transition from reading weights to products: time = (reading^P + products^P)^(1/P). Products of 256 rows, recorded one
#: by one, lie between the sum (1) and the larger of the two (infinite).
BLEND = 4.0
#: Sums over tensor-parallel ranks in each layer: after attention and after the MLP.
SUMS_A_LAYER = 2


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """The rates of one rank's device. Bytes and products (FLOP) per second; seconds for the rest.

    ``read``: weights; ``cached``: keys and values; ``traffic``: what passes between products. ``product``: linear layers; ``narrow``: FP8
    ones; ``attention``: prefill. ``layer_s``, ``step_s``: launches and gaps; ``alone_s``: the same for one token and unquantized weights,
    whose products start to load before the previous kernel ends. ``choice_s``: choosing a token, for each of its logits. ``sum_s``,
    ``member_s``: latency of a sum over tp ranks of one host, and more of it for each rank; ``link``: bytes a second a rank. ``hop_s``:
    latency of a stage's output on its way to the next stage; it travels at ``link`` within a node, at ``wire`` beyond it.
    """

    read: float
    cached: float
    traffic: float
    product: float
    narrow: float
    attention: float
    layer_s: float
    alone_s: float
    step_s: float
    choice_s: float
    sum_s: float
    member_s: float
    link: float
    hop_s: float
    wire: float


class StageWork(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of a stage does: bytes and FLOP for each step, token, sampled sequence, cached token read, and (query, key) pair.

    ``weights``: bytes that every step reads; ``routed``: those of the experts among which routers choose, of which a token takes the share
    ``taken``.
    """

    layers: int
    weights: int
    token_flop: int
    sequence_flop: int
    sequence_logits: int
    token_bytes: int
    cached_bytes: int
    pair_flop: int
    hidden_bytes: int
    tp: int
    narrow: bool
    plain: bool
    first: bool
    routed: int = 0
    taken: float = 1.0


class StepLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One step: new ``tokens``, of which ``sequences`` yield one; ``context`` cached tokens read by decodes; ``pairs`` of prefills."""

    tokens: int
    sequences: int
    context: float
    pairs: float = 0.0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """``requests`` at once, each of ``isl`` prompt and ``osl`` output tokens."""

    name: str
    requests: int
    isl: int
    osl: int


class PredictedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A workload on one replica: seconds from the first step to the last, and ms between two tokens of a sequence, on average."""

    seconds: float
    output_tok_s: float
    token_ms: float


#: What `bench.gpu` measures.
WORKLOADS = (
    Workload(name="latency-b1", requests=1, isl=128, osl=256),
    Workload(name="balanced", requests=256, isl=512, osl=256),
    Workload(name="prefill-heavy", requests=256, isl=2048, osl=32),
    Workload(name="decode-heavy", requests=512, isl=128, osl=512),
)


def stage_work(model: ModelSpec, parallel: Parallel, stage: int, engine: EngineSpec, quant: Quant) -> StageWork:
    """The work of the rank of ``stage`` with the most heads, for which the others wait. Raises ConfigError as ``shard_of`` does."""
    rank = stage * parallel.tp + max(range(parallel.tp), key=lambda tp_rank: heads_of(model, parallel.tp, tp_rank)[0].size)
    shard = shard_of(model, parallel, rank, unit=unit_of(quant))
    item, hidden = DTYPE_BYTES[engine.dtype], model.hidden_size
    weights, routed, linear = 0, 0, 0.0
    # All layers with experts have the same number of them.
    taken = next((moe.experts_per_token / moe.experts for moe in model.moes), 1.0)
    for each in stored_tensors(model, parallel, rank, dtype=engine.dtype, quant=quant):
        name = each.tensor.name
        # Rows of the embedding are looked up; its table is read whole only where it is the head too.
        if name != VOCAB_EMBEDDING or shares_embedding(model, parallel):
            weights += each.nbytes
        expert = EXPERTS in name
        routed += each.nbytes if expert else 0
        if quantized(name, each.tensor.shape) and name.endswith(".weight"):
            linear += each.tensor.elements * (2 if each.format == "uint8" else 1) * (taken if expert else 1.0)
    query, kv = shard.heads.size * model.head_dim, shard.kv_heads.size * model.head_dim
    # Written and read between the products of a layer: two sums with their norms, queries with keys and values, what the MLP multiplies.
    between = 8 * hidden + 2 * (query + 2 * kv) + 3 * query
    mlps = sum(_multiplied(shard, model.layer(layer).mlp) for layer in range(shard.layers.start, shard.layers.stop))
    return StageWork(
        layers=shard.layers.size,
        weights=weights - routed,
        routed=routed,
        taken=taken,
        token_flop=int(2 * linear),
        sequence_flop=2 * shard.vocab_rows * hidden if shard.last else 0,
        sequence_logits=shard.vocab_rows if shard.last else 0,
        token_bytes=int(item * (between * shard.layers.size + mlps)),
        cached_bytes=shard.layers.size * 2 * kv * FORMAT_BYTES[kv_format(engine, quant)],
        pair_flop=4 * query * shard.layers.size,
        hidden_bytes=item * hidden,
        tp=parallel.tp,
        narrow=quant.weights == "fp8" and engine.device == "cuda",
        plain=quant.weights is None,
        first=shard.first,
    )


def _multiplied(shard: Shard, spec: MlpSpec | MoeSpec) -> float:
    """Values between the products of a layer's MLP that one token has on this rank, on average."""
    if isinstance(spec, MlpSpec):
        return 3.0 * shard.columns(spec.size).size
    columns = spec.experts_per_token * shard.expert_columns(spec.size).size * shard.experts(spec.experts).size / spec.experts
    return 3.0 * (columns + (shard.columns(spec.shared.size).size if spec.shared is not None else 0))


def stage_seconds(work: StageWork, rates: Rates, load: StepLoad) -> float:
    """Time that one stage takes for ``load``."""
    # Tokens choose alike seldom: an expert is read where any of them chose it.
    reading = (work.weights + work.routed * (1.0 - (1.0 - work.taken) ** load.tokens)) / rates.read
    products = (
        load.tokens * work.token_flop / (rates.narrow if work.narrow else rates.product)
        + load.sequences * work.sequence_flop / rates.product
    )
    spent = float((reading**BLEND + products**BLEND) ** (1 / BLEND))
    spent += load.context * work.cached_bytes / rates.cached + load.pairs * work.pair_flop / rates.attention
    spent += load.tokens * work.token_bytes / rates.traffic + load.sequences * work.sequence_logits * rates.choice_s
    layer_s = rates.alone_s if work.plain and load.tokens == 1 else rates.layer_s
    return spent + work.layers * layer_s + rates.step_s + _sums(work, rates, load)


def _sums(work: StageWork, rates: Rates, load: StepLoad) -> float:
    """Time of the tensor-parallel sums of a step: each rank sends and takes 2 (n - 1) / n of what is summed."""
    if work.tp == 1:
        return 0.0
    each = rates.sum_s + work.tp * rates.member_s + load.tokens * work.hidden_bytes * 2 * (work.tp - 1) / work.tp / rates.link
    return (SUMS_A_LAYER * work.layers + work.first) * each


class Pipeline:
    """The stages of one replica, and what a step costs in them. ``crossings``: hops between stages that leave a node."""

    def __init__(self, stages: Sequence[StageWork], rates: Rates, *, crossings: int = 0) -> None:
        self.depth = len(stages)
        self._kinds, self._rates, self._crossings = Counter(stages), rates, crossings
        self._hidden_bytes = stages[0].hidden_bytes

    def seconds(self, load: StepLoad, lanes: int) -> float:
        """Time until each of ``lanes`` micro-batches of ``load`` has had one step: the slowest stage bounds a full pipeline, the way
        through all of them a nearly empty one."""
        times = {work: stage_seconds(work, self._rates, load) for work in self._kinds}
        inside = self.depth - 1 - self._crossings
        carried = load.tokens * self._hidden_bytes
        through = sum(count * times[work] for work, count in self._kinds.items()) + inside * (
            self._rates.hop_s + carried / self._rates.link
        )
        through += self._crossings * (self._rates.hop_s + carried / self._rates.wire)
        # Sampled ids go back to the first stage.
        through += self._rates.hop_s if self.depth > 1 else 0.0
        return max(lanes * max(times.values()), through)


def replay(pipeline: Pipeline, workload: Workload, *, sequences: int, max_num_tokens: int) -> PredictedRun:
    """Run ``workload`` as the batch does: decodes first, then prefill in chunks under the token budget, ``sequences`` at most at a time.

    A pipeline's sequences are distributed to as many micro-batches as it has stages; all are equal, so one is simulated.
    """
    lanes = min(pipeline.depth, workload.requests, sequences)
    lane = _Lane(-(-workload.requests // lanes), max(1, sequences // lanes), max_num_tokens, workload)
    seconds = decoding = 0.0
    tokens = 0
    while not lane.over:
        load, steps = lane.next()
        spent = steps * pipeline.seconds(load, lanes)
        seconds += spent
        decoding += spent * load.sequences
        tokens += steps * load.sequences
    return PredictedRun(
        seconds=seconds,
        output_tok_s=workload.requests * workload.osl / seconds,
        token_ms=1e3 * decoding / tokens,
    )


class _Lane:
    """The sequences of one micro-batch during the replay. ``_ends``: (step at which they end, sequences) of those that decode."""

    def __init__(self, requests: int, places: int, budget: int, workload: Workload) -> None:
        self._waiting, self._places, self._budget, self._workload = requests, places, budget, workload
        self._ends: deque[tuple[int, int]] = deque()
        self._step = self._decoding = 0
        self._context = 0.0
        #: Prompt tokens already computed of the sequence that a chunk has cut.
        self._begun = 0

    @property
    def over(self) -> bool:
        return not self._waiting and not self._ends

    def next(self) -> tuple[StepLoad, int]:
        """The next step, and the number of equal steps that follow: decodes until a sequence ends."""
        room = min(self._places - self._decoding, self._waiting)
        chunk = min(self._budget - self._decoding, room * self._workload.isl - self._begun) if room > 0 else 0
        if chunk > 0:
            return self._prefill(chunk), 1
        steps = self._ends[0][0] - self._step
        # Each step reads one token more a sequence; the mean of an even climb is its middle.
        load = StepLoad(tokens=self._decoding, sequences=self._decoding, context=self._context + self._decoding * (steps - 1) / 2)
        self._advance(steps)
        return load, steps

    def _prefill(self, chunk: int) -> StepLoad:
        isl, decoding, context = self._workload.isl, self._decoding, self._context
        finished, begun = divmod(self._begun + chunk, isl)
        # Pairs of whole prompts, less what was computed of the first before, plus what is computed of the last one now.
        pairs = (finished * isl**2 - self._begun**2 + begun**2) / 2
        self._advance(1)
        self._waiting -= finished
        self._begun = begun
        if finished and self._workload.osl > 1:
            self._ends.append((self._step + self._workload.osl - 1, finished))
            self._decoding += finished
            self._context += finished * (isl + 1)
        return StepLoad(tokens=decoding + chunk, sequences=decoding + finished, context=context, pairs=pairs)

    def _advance(self, steps: int) -> None:
        self._step += steps
        self._context += steps * self._decoding
        while self._ends and self._ends[0][0] <= self._step:
            _, ended = self._ends.popleft()
            self._decoding -= ended
            self._context -= ended * (self._workload.isl + self._workload.osl)
