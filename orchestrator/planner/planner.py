"""Answers before anything is started: does a model fit, on which layouts, how many sequences does each hold, and how fast are they? Pure.

Memory is the engine's own arithmetic (:mod:`workers.layout.memory`); speed is :mod:`orchestrator.planner.cost_model`. A tensor-parallel
group stays within a node, where the fast links are; stages may cross. Must never read a machine or a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from orchestrator.planner.cluster import PlannedCluster, layouts, rooms, take_place
from orchestrator.planner.cost_model import WORKLOADS, Pipeline, PredictedRun, Rates, StageWork, StepLoad, Workload, replay, stage_work
from orchestrator.planner.devices import GPU_FIT, HOST_FIT, HOST_RANK, Gpu, GpuModel, HostModel, gpu_rates, host_rates, leading_s, taken
from orchestrator.planner.placement import RankAssignment, place_gang
from workers.layout.memory import (
    GPU_RESERVE,
    block_bytes,
    blocks_that_fit,
    cache_budget,
    cache_room,
    frozen_bytes,
    kv_format,
    longest_sequence,
    step_bytes,
)
from workers.layout.quant_parts import unit_of
from workers.layout.sharding import deal, parameters, shard_of, trtllm_refusal
from workers.protocol.errors import ConfigError
from workers.protocol.specs import EngineSpec, ModelSpec, Parallel, PortableSpec, Quant, TrtllmSpec

#: GPUs of the largest usual node: the hint recommends larger nodes up to this size, then more nodes.
FULL_NODE = 8
#: Maximum ratio of a workload's requests to a replica's sequences: with more, the workload does not describe the replica.
TURNS = 8
#: What recorded runs on GPUs were like, with some room: ranks at most, tokens of a step's budget at least, parameters of the model.
RECORDED_RANKS, RECORDED_TOKENS, RECORDED_PARAMETERS = 4, 4096, (5e9, 100e9)


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The subject of a plan: one model with its gangs. ``gangs``: (replica name, layout) as the file says; ``spread``: a node for each
    stage."""

    name: str
    model: ModelSpec
    quant: Quant
    engine: EngineSpec
    gangs: tuple[tuple[str, Parallel], ...]
    cpus_per_rank: float = 1.0
    spread: bool = False

    @property
    def expert_parallel(self) -> bool:
        """Whether other layouts are thought of with whole experts on their ranks, as the file's own are."""
        return any(layout.expert_parallel for _, layout in self.gangs)


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one rank, of ``total`` that its device (a host: its share) has: ``weights`` as they run, ``step`` tensors, ``other``: what
    is in use before the weights or kept in reserve, ``cache``: keys and values. ``kv_tokens``: what this rank alone could hold."""

    total: int
    weights: int
    step: int
    other: int
    cache: int
    kv_tokens: int


class LayoutPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One layout: ``replicas`` of it, each with ``ranks`` and the cache that all of them agree on, ``kv_tokens``. ``sequences``: how
    many of the load run at a time at most; ``longest``: how many of the longest kind.

    ``one``: a sequence alone; ``full``: ``sequences`` at once; None where nothing can be said of its speed. ``error``: relative error of
    both, None where no run like it was recorded. ``node_ranks``: ranks of all gangs on the fullest node.
    """

    parallel: Parallel
    replicas: int
    placement: RankAssignment
    ranks: tuple[RankMemory, ...]
    kv_tokens: int
    sequences: int
    longest: float
    one: PredictedRun | None
    full: PredictedRun | None
    error: float | None
    node_ranks: int
    notes: tuple[str, ...] = ()

    @property
    def total_tok_s(self) -> float:
        """Output tokens a second of all replicas at full load, as if each were alone."""
        return self.replicas * self.full.output_tok_s if self.full else 0.0


class SubjectPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``own``: the file's layouts, one each; ``options``: what fits on the same devices, most tokens a second first."""

    subject: Subject
    own: tuple[LayoutPlan, ...]
    options: tuple[LayoutPlan, ...]
    refusal: ConfigError | None = None

    @property
    def best(self) -> LayoutPlan | None:
        return self.options[0] if self.options else None

    @property
    def quickest(self) -> LayoutPlan | None:
        """The option whose single sequence gets its tokens soonest."""
        timed = [(option.one.token_ms, -option.total_tok_s, index) for index, option in enumerate(self.options) if option.one]
        return self.options[min(timed)[2]] if timed else None


def rank_memory(
    subject: Subject, parallel: Parallel, rank: int, device: Gpu | HostModel, *, gang_ranks: int = 1, node_ranks: int = 1
) -> RankMemory:
    """``gang_ranks``: ranks of this gang on the node; ``node_ranks``: ranks of all gangs there.

    Raises :class:`ConfigError` where the weights or the cache do not fit.
    """
    model, engine, quant = subject.model, subject.engine, subject.quant
    shard = shard_of(model, parallel, rank, unit=unit_of(quant))
    weights = frozen_bytes(model, parallel, rank, engine, quant)
    if isinstance(device, Gpu):
        total, step = device.memory, step_bytes(model, shard, engine)
        other = taken(parallel) + GPU_RESERVE
        free = total - taken(parallel) - weights
    else:
        total, step, other = device.memory // node_ranks, 0, HOST_RANK
        free = device.memory - node_ranks * (other + weights)
    cache = cache_budget(engine, cache_room(model, shard, engine, free=free, total=total, host_ranks=gang_ranks), gang_ranks)
    form = kv_format(engine, quant)
    if weights + step + other > total:
        raise ConfigError(
            f"{subject.name}: rank {rank} of {parallel.words} does not fit on {_a(device)}",
            f"its weights take {_gb(weights)}; of {_gb(total)}, {_gb(total - step - other)} are left for weights and cache",
        )
    blocks = blocks_that_fit(model, shard, engine, form, cache)
    wanted = blocks * block_bytes(model, shard, engine, form)
    room = max(0, total - weights - step - other)
    if wanted > room:
        raise ConfigError(
            f"{subject.name}: rank {rank} of {parallel.words} has no room for its cache on {_a(device)}",
            f"{blocks * engine.block_size} tokens take {_gb(wanted)}; {_gb(room)} are left beside the weights' {_gb(weights)}",
            "lower kv_tokens (or kv_bytes), or use more ranks",
        )
    return RankMemory(total=total, weights=weights, step=step, other=other, cache=wanted, kv_tokens=blocks * engine.block_size)


def layout_plan(
    subject: Subject, parallel: Parallel, cluster: PlannedCluster, placed: RankAssignment, replicas: int, load: Workload, *,
    node_ranks: int = 0,
) -> LayoutPlan:  # fmt: skip
    """The capacity and the speed of one layout. ``node_ranks``: ranks of all gangs on the fullest node; those of this gang if not given.

    Raises :class:`ConfigError` if it does not fit, or is not possible for this model.
    """
    parallel.check(subject.model)
    _possible(subject, parallel, cluster.device)
    node_ranks = node_ranks or max(placed.ranks)
    ranks = ranks_memory(subject, parallel, cluster.device, gang_ranks=max(placed.ranks), node_ranks=node_ranks)
    kv_tokens = min(rank.kv_tokens for rank in ranks)
    longest, sequences = longest_sequence(subject.model, subject.engine), _concurrent(subject, kv_tokens, load)
    notes = []
    if kv_tokens < longest:
        notes.append(f"sequences of more than {kv_tokens} tokens are refused: the cache holds no more")
    if sequences == 0:
        notes.append(f"no sequence of {load.isl} + {load.osl} tokens: the longest has {min(kv_tokens, longest)}")
    if placed.splits_group:
        notes.append("a tensor-parallel group crosses nodes: its sums would use the network in every layer; no speed is predicted")
    one = full = None
    error = _error(subject, parallel, cluster.device, placed, node_ranks)
    if sequences and not placed.splits_group:
        pipeline = pipeline_of(subject, parallel, rates_of(subject, cluster.device, node_ranks), crossings=placed.crossings)
        one, full = (
            replay(
                pipeline, msgspec.structs.replace(load, requests=count), sequences=sequences, max_num_tokens=subject.engine.max_num_tokens
            )
            for count in (1, sequences)
        )
        if isinstance(cluster.device, GpuModel) and _led_late(pipeline, sequences, load):
            error = None
            notes.append(
                f"steps of {sequences} sequences are nearly as short as the host's own share of them: expect fewer tokens a second"
            )
    return LayoutPlan(
        parallel=parallel,
        replicas=replicas,
        placement=placed,
        ranks=ranks,
        kv_tokens=kv_tokens,
        sequences=sequences,
        longest=kv_tokens / longest,
        one=one,
        full=full,
        error=error,
        node_ranks=node_ranks,
        notes=tuple(notes),
    )


def _led_late(pipeline: Pipeline, sequences: int, load: Workload) -> bool:
    """Whether the leader takes more than half the time of a decode step, so that the device may wait for it."""
    lanes = min(pipeline.depth, sequences)
    each = sequences // lanes
    step = StepLoad(tokens=each, sequences=each, context=each * (load.isl + load.osl / 2))
    return pipeline.seconds(step, lanes) / lanes < 2 * leading_s(each)


def _concurrent(subject: Subject, kv_tokens: int, load: Workload) -> int:
    """Sequences of ``load`` that run at a time; 0 where not even one has room, or may be as long."""
    tokens, block = load.isl + load.osl, subject.engine.block_size
    if tokens > longest_sequence(subject.model, subject.engine):
        return 0
    return min(subject.engine.max_batch_size, kv_tokens // block // -(-tokens // block))


def ranks_memory(
    subject: Subject, parallel: Parallel, device: Gpu | HostModel, *, gang_ranks: int, node_ranks: int
) -> tuple[RankMemory, ...]:
    """All ranks' memory; ranks of equal shards are counted once."""
    known: dict[tuple[object, ...], RankMemory] = {}
    found = []
    for rank in range(parallel.world):
        shard = shard_of(subject.model, parallel, rank, unit=unit_of(subject.quant))
        layers = subject.model.layers[shard.layers.start : shard.layers.stop]
        columns = (shard.columns(kind.mlp.size).size for kind in subject.model.kinds)
        experts = (shard.experts(moe.experts).size for moe in subject.model.moes)
        shape = (shard.first, shard.last, layers, shard.heads.size, shard.kv_heads.size, *columns, *experts)
        if shape not in known:
            known[shape] = rank_memory(subject, parallel, rank, device, gang_ranks=gang_ranks, node_ranks=node_ranks)
        found.append(known[shape])
    return tuple(found)


def rates_of(subject: Subject, device: GpuModel | HostModel, node_ranks: int) -> Rates:
    """What a rank of ``subject`` gets from ``device``; a host's cores are shared by ``node_ranks`` ranks."""
    if isinstance(device, GpuModel):
        return gpu_rates(device, subject.engine.dtype)
    return host_rates(min(subject.engine.threads, device.cores / node_ranks))


def pipeline_of(subject: Subject, parallel: Parallel, rates: Rates, *, crossings: int = 0) -> Pipeline:
    """The stages of one replica; ``crossings``: hops that leave a node."""
    known: dict[tuple[object, ...], StageWork] = {}
    stages = []
    for stage in range(parallel.pp):
        held = deal(subject.model.num_layers, parallel.pp, stage)
        shape = (subject.model.layers[held.start : held.stop], stage == 0, stage == parallel.pp - 1)
        if shape not in known:
            known[shape] = stage_work(subject.model, parallel, stage, subject.engine, subject.quant)
        stages.append(known[shape])
    return Pipeline(stages, rates, crossings=crossings)


def timed(subject: Subject, made: LayoutPlan, device: GpuModel | HostModel) -> list[tuple[Workload, PredictedRun]]:
    """The recorded workloads on one replica of ``made``: those that it takes in at most ``TURNS`` turns."""
    pipeline = pipeline_of(subject, made.parallel, rates_of(subject, device, made.node_ranks), crossings=made.placement.crossings)
    found = []
    for load in WORKLOADS if made.full else ():
        sequences = _concurrent(subject, made.kv_tokens, load)
        if load.requests <= TURNS * sequences:
            found.append((load, replay(pipeline, load, sequences=sequences, max_num_tokens=subject.engine.max_num_tokens)))
    return found


def options(subject: Subject, cluster: PlannedCluster, free: Sequence[int], load: Workload) -> list[LayoutPlan]:
    """Every layout that fits in ``free`` places a node, with as many replicas as there is room for; most tokens a second first."""
    found = []
    for parallel in layouts(sum(free), max(free, default=0), subject.model, expert_parallel=subject.expert_parallel):
        made = _most(subject, parallel, cluster, free, load)
        if made is not None and made.full is not None:
            found.append(made)
    return sorted(found, key=lambda made: (-made.total_tok_s, made.parallel.world))


def _most(subject: Subject, parallel: Parallel, cluster: PlannedCluster, free: Sequence[int], load: Workload) -> LayoutPlan | None:
    """The layout with as many replicas as places, and on a host as memory, hold; None where not even one does."""
    left, placements = list(free), list[RankAssignment]()
    while (placed := take_place(parallel, left, spread=subject.spread)) is not None and not placed.splits_group:
        placements.append(placed)
    while placements:
        node_ranks = -(-len(placements) * parallel.world // cluster.nodes)
        try:
            # The last gang is on the most nodes; all are judged by it.
            return layout_plan(subject, parallel, cluster, placements[-1], len(placements), load, node_ranks=node_ranks)
        except ConfigError:
            placements = placements[: len(placements) // 2] if isinstance(cluster.device, HostModel) else []
    return None


def plan(subjects: Sequence[Subject], cluster: PlannedCluster, load: Workload) -> list[SubjectPlan]:
    """Plan a whole file. Its gangs are placed in their order; a subject's options use the room that the others leave."""
    free = rooms(cluster, subjects[0].cpus_per_rank)
    placements = {
        (subject.name, name): take_place(parallel, free, spread=subject.spread) for subject in subjects for name, parallel in subject.gangs
    }
    return [_subject_plan(subject, subjects, placements, cluster, load) for subject in subjects]


def occupied(subjects: Sequence[Subject], cluster: PlannedCluster) -> list[int]:
    """Ranks on each node that holds any, where all that a file asks for has found room."""
    whole = rooms(cluster, subjects[0].cpus_per_rank)
    free = list(whole)
    for subject in subjects:
        for _, parallel in subject.gangs:
            take_place(parallel, free, spread=subject.spread)
    return [room - left for room, left in zip(whole, free, strict=True) if left < room]


def _subject_plan(
    subject: Subject,
    subjects: Sequence[Subject],
    placements: dict[tuple[str, str], RankAssignment | None],
    cluster: PlannedCluster,
    load: Workload,
) -> SubjectPlan:
    left = rooms(cluster, subject.cpus_per_rank)
    for other in subjects:
        if other is not subject:
            for _, parallel in other.gangs:
                take_place(parallel, left, spread=other.spread)
    found = options(subject, cluster, left, load)
    own: list[LayoutPlan] = []
    node_ranks = -(-_needs(subjects) // cluster.nodes)
    refusal: ConfigError | None = None
    for parallel in dict.fromkeys(layout for _, layout in subject.gangs):
        names = [name for name, layout in subject.gangs if layout == parallel]
        mine = [placements[subject.name, name] for name in names]
        try:
            if (last := next((placed for placed in reversed(mine) if placed), None)) is None or None in mine:
                raise ConfigError(
                    f"{subject.name}: {len(names)} x {parallel.words} does not find room on {cluster.what}",
                    f"{_needs(subjects)} ranks are asked for, {cluster.nodes * rooms(cluster, subject.cpus_per_rank)[0]} places are there",
                )
            own.append(layout_plan(subject, parallel, cluster, last, len(names), load, node_ranks=max(node_ranks, *last.ranks)))
        except ConfigError as error:
            refusal = refusal or ConfigError(error.what, error.why, error.hint or _advice(subject, cluster, found, load))
    return SubjectPlan(subject=subject, own=tuple(own), options=tuple(found), refusal=refusal)


def _needs(subjects: Sequence[Subject]) -> int:
    return sum(parallel.world for subject in subjects for _, parallel in subject.gangs)


def _advice(subject: Subject, cluster: PlannedCluster, found: Sequence[LayoutPlan], load: Workload) -> str:
    """The hint: layouts that fit on these devices, or the number of devices that is needed."""
    if found:
        return f"use {settings(found[0])}"
    for larger in _larger(cluster):
        for parallel in layouts(larger.nodes * larger.slots, larger.slots, subject.model, expert_parallel=subject.expert_parallel):
            placed = place_gang(parallel, rooms(larger, subject.cpus_per_rank))
            if placed is None or placed.splits_group:
                continue
            try:
                layout_plan(subject, parallel, larger, placed, 1, load)
            except ConfigError:
                continue
            return f"use {larger.what} with tp_size: {parallel.tp}, pp_size: {parallel.pp}; or quant: int8"
    return "use devices with more memory, or quant: int8"


def _larger(cluster: PlannedCluster) -> Iterator[PlannedCluster]:
    """More of the same devices, the fewest first: GPUs in a node, then nodes."""
    most = FULL_NODE if isinstance(cluster.device, GpuModel) else cluster.slots
    sizes = [slots for slots in (1, 2, 4, most) if cluster.slots < slots <= most]
    yield from (PlannedCluster(device=cluster.device, nodes=cluster.nodes, slots=slots) for slots in sizes)
    slots = max(cluster.slots, most)
    yield from (PlannedCluster(device=cluster.device, nodes=nodes, slots=slots) for nodes in (2, 4, 8, 16) if nodes > cluster.nodes)


def settings(made: LayoutPlan) -> str:
    """The layout as a deployment file spells it."""
    whole = ", expert_parallel: true" if made.parallel.expert_parallel else ""
    return f"tp_size: {made.parallel.tp}, pp_size: {made.parallel.pp}{whole}, replicas: {made.replicas}"


def _possible(subject: Subject, parallel: Parallel, device: GpuModel | HostModel) -> None:
    """Raises :class:`ConfigError` for settings that the engine would refuse at its start."""
    if isinstance(subject.engine, TrtllmSpec) and (refusal := trtllm_refusal(subject.model, parallel)):
        raise ConfigError(f"{subject.name}: {refusal[0]}", "", refusal[1])
    if isinstance(device, GpuModel) and subject.quant.weights == "fp8" and not device.narrow:
        raise ConfigError(
            f"{subject.name}: {_a(device)} computes no FP8 products", "its tensor cores are older than the format", "use int8"
        )


def _error(subject: Subject, parallel: Parallel, device: GpuModel | HostModel, placed: RankAssignment, node_ranks: int) -> float | None:
    if not isinstance(subject.engine, PortableSpec) or not device.recorded or placed.crossings:
        return None
    if isinstance(device, HostModel):
        return HOST_FIT.error if subject.quant.weights is None and node_ranks * subject.engine.threads <= device.cores else None
    plain_cache = kv_format(subject.engine, subject.quant) == "bf16"
    like = subject.engine.dtype == "bf16" and subject.quant.weights in (None, "fp8") and plain_cache
    least, most = RECORDED_PARAMETERS
    size = parallel.world <= RECORDED_RANKS and least <= parameters(subject.model) <= most
    return GPU_FIT.error if like and size and subject.engine.max_num_tokens >= RECORDED_TOKENS else None


def _a(device: Gpu | HostModel) -> str:
    if isinstance(device, HostModel):
        return "its share of the host"
    return f"an {device.name}" if device.name[0] in "AHLNR" else f"a {device.name}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
