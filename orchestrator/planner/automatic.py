"""Chooses the automatic settings of a deployment: (request, model, hardware) in, (settings, reasons) out. Pure.

Owns the rule for ``device``, ``dtype``, the limits of a step and ``tp_size``, and refuses a deployment that can never run before anything
starts. The planner's own arithmetic decides whether weights and cache fit. Must never read a machine or a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec

from orchestrator.config.engine_settings import AUTO, GangRequest, StepLimits
from orchestrator.planner.cluster import layouts
from orchestrator.planner.devices import Gpu, HostModel
from orchestrator.planner.planner import FULL_NODE, RankMemory, Subject, ranks_memory
from workers.layout.memory import longest_sequence
from workers.layout.sharding import parameters
from workers.protocol.errors import ConfigError, EnvironmentFault
from workers.protocol.specs import (
    DTYPE_BYTES,
    GPU_HEAD_DIMS,
    GPU_MIN_CAPABILITY,
    PLAIN,
    Device,
    DType,
    EngineSpec,
    ModelSpec,
    Parallel,
    Quant,
)

#: Limits of a step on a CPU, and of the fake engine: prompts are computed in short chunks, so that decodes in the same steps wait little.
CPU_LIMITS = StepLimits(max_batch_size=64, max_num_tokens=256)
#: Limits of a step on a GPU, the largest first; the first that leaves room for the cache is taken. Small GPUs begin at the second.
GPU_LIMITS = (
    StepLimits(max_batch_size=512, max_num_tokens=8192),
    StepLimits(max_batch_size=256, max_num_tokens=2048),
    StepLimits(max_batch_size=128, max_num_tokens=1024),
    StepLimits(max_batch_size=64, max_num_tokens=512),
)
#: Memory from which a GPU is a large one, bytes.
LARGE_GPU = 60 << 30
#: A cache that is sized automatically holds at least this many tokens, or the model's context where that is shorter.
LEAST_CACHE_TOKENS = 4096


class GpuHardware(Gpu, frozen=True, kw_only=True):
    """A GPU of a node. ``memory``: bytes that are free on it; ``capability``: its compute capability."""

    capability: tuple[int, int]


class NodeHardware(msgspec.Struct, frozen=True, kw_only=True):
    """The hardware of a node. ``memory``: bytes of host memory that are free; ``bf16``: its CPU can compute in bfloat16, with ``fast_bf16``
    by instructions made for it; ``gpu_fault``: why no GPU can be used although the node has some, empty otherwise."""

    gpus: tuple[GpuHardware, ...] = ()
    memory: int = 0
    cores: int = 1
    bf16: bool = False
    fast_bf16: bool = False
    gpu_fault: str = ""


class ClusterHardware(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes on which gangs can run. ``grows``: nodes may be added (an existing Ray cluster), so a gang without room waits."""

    nodes: tuple[NodeHardware, ...]
    grows: bool = False

    @property
    def gpus(self) -> list[GpuHardware]:
        """All GPUs that the kernels run on."""
        return [gpu for node in self.nodes for gpu in node.gpus if gpu.capability >= GPU_MIN_CAPABILITY]

    @property
    def widest(self) -> int:
        """GPUs of the node that has the most."""
        return max((sum(gpu.capability >= GPU_MIN_CAPABILITY for gpu in node.gpus) for node in self.nodes), default=0)

    @property
    def smallest_gpu(self) -> GpuHardware:
        return min(self.gpus, key=lambda gpu: gpu.memory)

    @property
    def no_gpu(self) -> str:
        """The reason why no GPU can be used."""
        if fault := next((node.gpu_fault for node in self.nodes if node.gpu_fault), ""):
            return fault
        if old := next((gpu for node in self.nodes for gpu in node.gpus), None):
            return f"{old.name} has compute capability {old.capability[0]}.{old.capability[1]}, 8.0 is needed"
        return "no GPU was found"


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """The facts in a model's files. ``shape`` None: unknown (the fake engine needs none); ``dtype``: of its unquantized weights.

    ``built``: the limits of an engine that TensorRT-LLM built, ``layout``: the layout that it was built for. ``dequantized``: the form of
    which plain weights are made while loading, in words (empty where none are), and ``stored_bytes``, the size of all tensors in it.
    """

    shape: ModelSpec | None = None
    quant: Quant = PLAIN
    dtype: DType = "fp32"
    built: StepLimits | None = None
    layout: Parallel | None = None
    dequantized: str = ""
    stored_bytes: int = 0


class GangDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One replica with all settings decided. ``chosen``: a phrase with the reason for each automatic setting; ``cache``: predicted tokens
    of its KV cache, 0 = no prediction."""

    request: GangRequest
    parallel: Parallel
    engine: EngineSpec
    chosen: tuple[str, ...] = ()
    cache: int = 0


def decide(asked: Sequence[tuple[GangRequest, ModelDescription]], hardware: ClusterHardware) -> list[GangDecision]:
    """Decide all automatic settings of a deployment's replicas, in their order.

    Raises :class:`ConfigError` for a setting or a size that is not possible, :class:`EnvironmentFault` for GPUs that are not there.
    """
    devices = [device_for(request, model, hardware) for request, model in asked]
    host_ranks = sum(
        (request.layout or request.with_tp(1)).world
        for (request, _), (device, _) in zip(asked, devices, strict=True)
        if device == "cpu" and request.engine != "fake"
    )
    on_gpus = sum(device == "cuda" for device, _ in devices)
    found = [
        _decide(request, model, hardware, device, why, on_gpus=on_gpus, host_ranks=host_ranks)
        for (request, model), (device, why) in zip(asked, devices, strict=True)
    ]
    _check_count(found, hardware)
    return found


def device_for(request: GangRequest, model: ModelDescription, hardware: ClusterHardware) -> tuple[Device, str]:
    """(device, reason of the choice; empty if it was given). Raises :class:`EnvironmentFault` if a GPU is requested and none can be
    used."""
    asked, gpus = request.settings.device, hardware.gpus
    if asked == "cuda" and request.engine == "portable" and not gpus and not hardware.grows:
        raise EnvironmentFault(f"{request.name}: device cuda, and there is no GPU to use", hardware.no_gpu, "use --device cpu, or auto")
    if asked != AUTO:
        return asked, ""
    if request.engine == "fake":
        return "cpu", "the fake engine computes nothing"
    if request.engine == "trtllm":
        return ("cuda", "TensorRT-LLM computes on GPUs") if any(node.gpus for node in hardware.nodes) else ("cpu", hardware.no_gpu)
    if not gpus:
        return "cpu", hardware.no_gpu
    if request.settings.fixed_shape:
        return "cpu", "fixed_shape is for CPUs"
    if model.shape is not None and model.shape.head_dim not in GPU_HEAD_DIMS:
        return "cpu", f"no GPU kernel has heads of {model.shape.head_dim}"
    return "cuda", _gpu_names(gpus)


def dtype_for(request: GangRequest, model: ModelDescription, device: Device, hardware: ClusterHardware) -> tuple[DType, str]:
    """(number format, why). Raises :class:`ConfigError` for a format in which the device cannot compute."""
    asked = request.settings.dtype
    if device == "cpu" and request.engine == "portable":
        if asked == "fp16":
            raise ConfigError(
                f"{request.name}: fp16 is not computed on a CPU",
                "its products are slow and its range too small",
                "use --dtype fp32 or bf16",
            )
        if asked == "bf16" and not all(node.bf16 for node in hardware.nodes):
            raise ConfigError(
                f"{request.name}: this CPU has no bfloat16 arithmetic", "its processor has no instructions for it", "use --dtype fp32"
            )
    if asked != AUTO:
        return asked, ""
    if request.engine == "fake":
        return "fp32", "the fake engine computes nothing"
    if device == "cuda":
        if model.dtype == "fp16" and model.quant.weights != "fp8":
            return "fp16", "as the weights are"
        return "bf16", "as the weights are" if model.dtype == "bf16" else f"half the size of {model.dtype}, and as wide in range"
    if model.dtype == "bf16" and all(node.fast_bf16 for node in hardware.nodes):
        return "bf16", "as the weights are"
    return "fp32", "as the weights are" if model.dtype == "fp32" else f"{model.dtype} weights, and this CPU computes fp32 better"


def engine_for(request: GangRequest, model: ModelDescription, hardware: ClusterHardware) -> EngineSpec:
    """The engine's settings without a check whether they fit: for a plan."""
    device, _ = device_for(request, model, hardware)
    dtype, _ = dtype_for(request, model, device, hardware)
    return request.settings.spec(request.engine, device=device, dtype=dtype, limits=_limits(request, model, device, hardware)[0])


def smallest_layout(request: GangRequest, model: ModelDescription, hardware: ClusterHardware) -> Parallel:
    """The layout of a replica that leaves ``tp_size`` open: the smallest that fits, one rank per stage if none does; for a plan."""
    device, _ = device_for(request, model, hardware)
    if device == "cuda" and hardware.gpus and model.shape is not None:
        engine = engine_for(request, model, hardware)
        for parallel in _layouts(request, model.shape, hardware, 1):
            with suppress(ConfigError):
                _gpu_memory(request, model.shape, model.quant, engine, parallel, hardware)
                return parallel
    return model.layout or request.with_tp(1)


def _limits(request: GangRequest, model: ModelDescription, device: Device, hardware: ClusterHardware) -> list[StepLimits]:
    """Limits of a step to try, the largest first; one alone where none is automatic."""
    usual: tuple[StepLimits, ...] = (CPU_LIMITS,)
    if device == "cuda" and hardware.gpus:
        usual = GPU_LIMITS if hardware.smallest_gpu.memory >= LARGE_GPU else GPU_LIMITS[1:]
    if (built := model.built) is not None:
        usual = tuple(
            StepLimits(
                max_batch_size=min(each.max_batch_size, built.max_batch_size), max_num_tokens=min(each.max_num_tokens, built.max_num_tokens)
            )
            for each in usual
        )
    return list(dict.fromkeys(request.settings.limits(each) for each in usual))


def _decide(
    request: GangRequest, model: ModelDescription, hardware: ClusterHardware, device: Device, why: str, *, on_gpus: int, host_ranks: int
) -> GangDecision:
    dtype, why_dtype = dtype_for(request, model, device, hardware)
    specs = [
        request.settings.spec(request.engine, device=device, dtype=dtype, limits=limits)
        for limits in _limits(request, model, device, hardware)
    ]
    if request.engine == "fake":
        return GangDecision(request=request, parallel=request.layout or request.with_tp(1), engine=specs[0])
    chosen = [f"device {device} ({why})"] if why else []
    chosen += [f"dtype {dtype} ({why_dtype})"] if why_dtype else []
    if request.engine != "portable" or model.shape is None:
        parallel = request.layout or model.layout or request.with_tp(1)
        return GangDecision(request=request, parallel=parallel, engine=specs[0], chosen=(*chosen, *_steps(request, specs[0])))
    longest_sequence(model.shape, specs[0])  # raises for a length beyond the model's context
    if device == "cpu":
        parallel = request.layout or request.with_tp(1)
        memory = _fits_host(request, model, specs[0], parallel, hardware, host_ranks)
        engine, refusal = specs[0], ""
    elif not hardware.gpus:  # nodes that may be added: their hardware is unknown
        parallel, engine, memory, refusal = request.layout or request.with_tp(1), specs[0], (), ""
    else:
        parallel, engine, memory, refusal = _fit_gpus(request, model, specs, hardware, on_gpus)
    chosen += _steps(request, engine)
    if model.dequantized and request.settings.portable.quant is None:
        times = parameters(model.shape) * DTYPE_BYTES[dtype] / max(1, model.stored_bytes)
        chosen.append(f"weights dequantized from {model.dequantized} to {dtype} ({times:.1f} times their size in the file)")
    if request.layout is None and parallel.tp > 1:
        chosen.append(f"tp_size {parallel.tp} ({refusal})")
    return GangDecision(
        request=request,
        parallel=parallel,
        engine=engine,
        chosen=tuple(chosen),
        cache=min((rank.kv_tokens for rank in memory), default=0),
    )


def _steps(request: GangRequest, engine: EngineSpec) -> list[str]:
    if AUTO not in (request.settings.max_batch_size, request.settings.max_num_tokens):
        return []
    return [f"steps of {engine.max_batch_size} sequences and {engine.max_num_tokens} tokens"]


def _fits_host(
    request: GangRequest, model: ModelDescription, engine: EngineSpec, parallel: Parallel, hardware: ClusterHardware, host_ranks: int
) -> tuple[RankMemory, ...]:
    """The memory of the ranks on CPUs. Raises :class:`ConfigError` where the layout is not possible or the fullest node has too little."""
    assert model.shape is not None
    parallel.check(model.shape)
    subject = Subject(name=request.name, model=model.shape, quant=model.quant, engine=engine, gangs=())
    largest = max(hardware.nodes, key=lambda node: node.memory)
    device = HostModel(memory=largest.memory, cores=largest.cores)
    here = min(parallel.world, -(-host_ranks // len(hardware.nodes)))
    try:
        return ranks_memory(subject, parallel, device, gang_ranks=here, node_ranks=max(here, -(-host_ranks // len(hardware.nodes))))
    except ConfigError as error:
        raise ConfigError(error.what, error.why, error.hint or "use fewer ranks, quant: int8, or a host with more memory") from None


def _fit_gpus(
    request: GangRequest, model: ModelDescription, specs: Sequence[EngineSpec], hardware: ClusterHardware, on_gpus: int
) -> tuple[Parallel, EngineSpec, tuple[RankMemory, ...], str]:
    """(layout, settings, memory of its ranks, why fewer ranks do not do). The smallest layout that fits, with the largest steps that leave
    room for a cache. Raises :class:`ConfigError` with the refusal of the largest layout."""
    shape = model.shape
    assert shape is not None
    refused: list[ConfigError] = []
    for parallel in _layouts(request, shape, hardware, on_gpus):
        parallel.check(shape)
        for engine in specs:
            try:
                memory = _gpu_memory(request, shape, model.quant, engine, parallel, hardware)
            except ConfigError as error:
                refused.append(error)
                continue
            return parallel, engine, memory, f"on one GPU: {refused[0].why}" if refused else ""
    raise ConfigError(refused[-1].what, refused[-1].why, refused[-1].hint or _advice(request, model, specs[-1], hardware))


def _layouts(request: GangRequest, shape: ModelSpec, hardware: ClusterHardware, on_gpus: int) -> Iterator[Parallel]:
    """The layouts to try, the smallest first: the one that is asked for, or those whose tensor-parallel groups are within a node and leave
    a GPU to each of the ``on_gpus`` replicas."""
    if request.layout is not None:
        yield request.layout
        return
    most = max(hardware.widest, 1) if hardware.grows else max(min(hardware.widest, len(hardware.gpus) // on_gpus // request.pp_size), 1)
    widths = [layout.tp for layout in layouts(most, hardware.widest, shape, expert_parallel=request.expert_parallel) if layout.pp == 1]
    yield from (request.with_tp(tp) for tp in widths)


def _gpu_memory(
    request: GangRequest, shape: ModelSpec, quant: Quant, engine: EngineSpec, parallel: Parallel, hardware: ClusterHardware
) -> tuple[RankMemory, ...]:
    """The memory of all ranks on the smallest GPU. Raises :class:`ConfigError` if it is too little for the weights or for the cache."""
    subject = Subject(name=request.name, model=shape, quant=quant, engine=engine, gangs=())
    memory = ranks_memory(subject, parallel, hardware.smallest_gpu, gang_ranks=parallel.world, node_ranks=1)
    tokens = min(rank.kv_tokens for rank in memory)
    needed = engine.max_seq_len or min(shape.max_position, LEAST_CACHE_TOKENS)
    if tokens < needed:
        raise ConfigError(
            f"{request.name}: the KV cache would hold {tokens} tokens",
            f"a request may have {longest_sequence(shape, engine)}; weights of {memory[0].weights / 1e9:.1f} GB leave no more",
        )
    return memory


def _advice(request: GangRequest, model: ModelDescription, engine: EngineSpec, hardware: ClusterHardware) -> str:
    """The hint: more of the same GPUs, if they are enough."""
    shape = model.shape
    assert shape is not None
    smaller = "quant: int8 or a smaller max_seq_len"
    for layout in layouts(FULL_NODE, FULL_NODE, shape, expert_parallel=request.expert_parallel):
        if layout.pp > 1:
            continue
        try:
            _gpu_memory(request, shape, model.quant, engine, layout, hardware)
        except ConfigError:
            continue
        return f"use {layout.tp} such GPUs (-tp {layout.tp}), or {smaller}"
    return f"use larger GPUs, a pp_size above 1, or {smaller}"


def _check_count(found: Sequence[GangDecision], hardware: ClusterHardware) -> None:
    """Raises :class:`EnvironmentFault` if the replicas need more GPUs than there are. TensorRT-LLM's nodes check themselves."""
    if hardware.grows:
        return
    ours = [each for each in found if each.engine.device == "cuda" and each.request.engine == "portable"]
    needed, there = sum(each.parallel.world for each in ours), len(hardware.gpus)
    if needed > there:
        asks = ", ".join(f"{each.request.name} {each.parallel.world}" for each in ours)
        raise EnvironmentFault(
            f"{needed} GPUs are needed, {there} {'is' if there == 1 else 'are'} here",
            f"each rank takes one: {asks}",
            "use fewer replicas or a smaller tp_size, or --device cpu",
        )


def _gpu_names(gpus: Sequence[GpuHardware]) -> str:
    """``2 x NVIDIA H100, 1 x NVIDIA A100``."""
    names = [gpu.name for gpu in gpus]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
