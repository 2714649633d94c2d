"""How much memory a rank takes, and how much KV cache it can hold: engine and planner use the same arithmetic.

Pure functions of shapes, layout and free bytes. The caller passes the free bytes: the engine measures them, the planner assumes them. Must
never access a device.
"""

from __future__ import annotations

from workers.layout.declaration import NORM_WEIGHTS, ROUTERS, VOCAB_EMBEDDING
from workers.layout.quant_parts import FORMAT_BYTES, Format, quantized, stored_tensors
from workers.layout.sharding import Shard, shares_embedding
from workers.protocol.errors import ConfigError
from workers.protocol.specs import DTYPE_BYTES, EngineSpec, MlpSpec, ModelSpec, MoeSpec, Parallel, PortableSpec, Quant

#: Default share of a host's free memory for the caches of all its ranks together; and its upper limit, bytes.
FREE_SHARE = 0.25
HOST_CAP = 1 << 30
#: Bytes that stay free on a GPU beside cache and step: for graphs, workspaces of libraries, NCCL, and the torch sampler's logits.
GPU_RESERVE = 2 << 30


def frozen_bytes(model: ModelSpec, parallel: Parallel, rank: int, engine: EngineSpec, quant: Quant) -> int:
    """Bytes of all weights of ``rank`` in the form that they run in, which is larger where a device keeps a second form of some.

    A CPU packs the head of a tied table beside the table itself and makes FP8 weights plain; a GPU keeps the scales of int4 twice. The
    weights of norms that lack 1, and what chooses and weighs experts, are in fp32.
    Raises :class:`ConfigError` where the model cannot be split so.
    """
    plain = DTYPE_BYTES[engine.dtype]
    cpu, total = engine.device == "cpu", 0
    for each in stored_tensors(model, parallel, rank, dtype=engine.dtype, quant=quant):
        layer = quantized(each.tensor.name, each.tensor.shape)
        if cpu and each.format == "fp8" and layer:
            total += plain * each.tensor.elements
        elif each.tensor.name.endswith(ROUTERS):
            total += FORMAT_BYTES["fp32"] * each.tensor.elements
        elif not cpu and each.tensor.name.endswith((".weights_scaling_factor", ".zero")):
            total += 2 * each.nbytes
        elif model.norm.plus_one and each.tensor.name.endswith(NORM_WEIGHTS):
            total += DTYPE_BYTES["fp32"] * each.tensor.elements
        else:
            total += each.nbytes
        if cpu and each.tensor.name == VOCAB_EMBEDDING and shares_embedding(model, parallel):
            total += each.nbytes
    return total


def longest_sequence(model: ModelSpec, engine: EngineSpec) -> int:
    """Tokens of the longest sequence that a replica takes. Raises :class:`ConfigError` where more are asked for than the model has
    positions: the model was never trained on more."""
    if engine.max_seq_len > model.max_position:
        raise ConfigError(
            f"max_seq_len: {engine.max_seq_len} is more than the model's context",
            f"the model has {model.max_position} positions",
            f"use {model.max_position} or less, or leave it out",
        )
    return engine.max_seq_len or model.max_position


def kv_format(engine: EngineSpec, quant: Quant) -> Format:
    """The format of keys and values in the cache: FP8 on a GPU where the artifact asks for it, else the dtype that the engine computes
    in."""
    return "fp8" if engine.device == "cuda" and quant.kv_cache_quant_algo == "FP8" else engine.dtype


def block_bytes(model: ModelSpec, shard: Shard, engine: EngineSpec, form: Format) -> int:
    """Bytes of one block on this rank, over all its layers."""
    return shard.layers.size * engine.block_size * 2 * shard.kv_heads.size * model.head_dim * FORMAT_BYTES[form]


def step_bytes(model: ModelSpec, shard: Shard, engine: EngineSpec) -> int:
    """Most bytes that the tensors of one step take on this rank: those of the widest moment of a layer, and the logits of all sequences."""
    item = DTYPE_BYTES[engine.dtype]
    qkv = (shard.heads.size + 2 * shard.kv_heads.size) * model.head_dim
    token = item * (4 * model.hidden_size + max(*(_widest(model, shard, kind.mlp) for kind in model.kinds), 2 * qkv) + 2 * qkv)
    logits = 2 * item * shard.vocab_rows * engine.max_batch_size if shard.last else 0
    return token * engine.max_num_tokens + logits


def _widest(model: ModelSpec, shard: Shard, spec: MlpSpec | MoeSpec) -> int:
    """Most values that one token has between the products of an MLP, or of the experts that it chose, all of this rank at worst."""
    if isinstance(spec, MlpSpec):
        return 3 * shard.columns(spec.size).size
    routed = spec.experts_per_token * (3 * shard.expert_columns(spec.size).size + model.hidden_size)
    return routed + (3 * shard.columns(spec.shared.size).size if spec.shared is not None else 0)


def cache_room(model: ModelSpec, shard: Shard, engine: EngineSpec, *, free: int, total: int, host_ranks: int) -> int:
    """Most bytes that a cache of this rank can have of ``free`` bytes, counted with the weights in place. ``total``: of the device.

    On a GPU: all but a step's tensors and ``GPU_RESERVE``, or what ``gpu_memory_utilization`` leaves unused where that is more. On a CPU:
    the rank's share of what is free, of ``host_ranks``.
    """
    if engine.device == "cuda":
        unused = int(total * (1.0 - engine.options.gpu_memory_utilization)) if isinstance(engine, PortableSpec) else 0
        return max(0, free - step_bytes(model, shard, engine) - max(GPU_RESERVE, unused))
    return max(0, free) // host_ranks


def cache_budget(engine: EngineSpec, room: int, host_ranks: int) -> int:
    """Default bytes of this rank's cache: on a GPU all of its ``room``; on a CPU the default share of the host, divided by its
    ``host_ranks``."""
    return room if engine.device == "cuda" else min(int(room * FREE_SHARE), HOST_CAP // host_ranks)


def blocks_that_fit(model: ModelSpec, shard: Shard, engine: EngineSpec, form: Format, budget: int) -> int:
    """Blocks that this rank can hold: as many as ``kv_tokens`` or ``kv_bytes`` (of this rank) say, else as fit ``budget`` bytes.

    Raises :class:`ConfigError` if not even one block fits, or if what is asked for cannot hold one request of the longest kind.
    """
    each, size = block_bytes(model, shard, engine, form), engine.block_size
    blocks = -(-engine.kv_tokens // size) if engine.kv_tokens else engine.kv_bytes // each
    if (engine.kv_tokens or engine.kv_bytes) and blocks * size < (longest := longest_sequence(model, engine)):
        asked = f"kv_tokens: {engine.kv_tokens}" if engine.kv_tokens else f"kv_bytes: {engine.kv_bytes}"
        raise ConfigError(
            f"{asked} cannot hold one request",
            f"that is {blocks * size} tokens; a request may have {longest}",
            f"raise it ({longest} tokens are {-(-longest // size) * each} bytes of a rank), or set a smaller max_seq_len",
        )
    if blocks:
        return blocks
    if budget < each:
        raise ConfigError(
            f"{budget} bytes of KV cache hold no block of {each} bytes",
            "too little memory is free",
            "free some, use more ranks, or lower block_size",
        )
    return budget // each


def check_room(blocks: int, each: int, room: int) -> None:
    """Raises :class:`ConfigError` for a cache of ``blocks`` of ``each`` bytes on a rank that has ``room`` bytes for it."""
    if blocks * each > room:
        raise ConfigError(
            f"a KV cache of {blocks * each / 1e9:.1f} GB does not fit",
            f"{room / 1e9:.1f} GB are left for it on this rank, beside the weights",
            "lower kv_tokens (or kv_bytes), or use more ranks",
        )
