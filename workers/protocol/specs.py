"""The description of a replica as frozen values: model shape, layout, number formats, limits.

Owns no state. Every struct checks itself on construction (msgspec runs ``__post_init__`` when decoding too), so every value of these types
is valid. Errors are :class:`~workers.protocol.errors.ConfigError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.trtllm_options import TrtllmOptions

DType = Literal["fp32", "bf16", "fp16"]
ResumeClass = Literal["bitwise", "margin", "valid"]
WaitPolicy = Literal["hybrid", "spin"]
EngineKind = Literal["portable", "fake", "trtllm"]
Device = Literal["cpu", "cuda"]
#: Quantized weight formats that the portable engine supports.
QuantName = Literal["int8", "int4", "fp8"]

MAX_LAYERS, MAX_EXPERTS = 4096, 4096
#: Longest time that sequences should run after SIGTERM, seconds: batch systems send SIGKILL 30 s after it.
TERM_GRACE_S = 20.0
#: Bytes of one element.
DTYPE_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
#: The same formats as TensorRT-LLM's ``QuantAlgo`` names them.
QUANT_ALGOS: dict[QuantName, str] = {"int8": "W8A16", "int4": "W4A16", "fp8": "FP8_PER_CHANNEL_PER_TOKEN"}
#: Requirements of the portable engine's kernels: sizes of an attention head, and the minimum compute capability (bf16 on tensor cores).
GPU_HEAD_DIMS = (16, 32, 64, 128, 256)
GPU_MIN_CAPABILITY = (8, 0)
#: Numbers of weights along the input axis that share a scale, if an output row has several scales.
GROUP_SIZES = (32, 64, 128)


def _require(ok: bool, what: str, why: str = "", hint: str = "") -> None:
    if not ok:
        raise ConfigError(what, why, hint)


class LinearScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="linear"):
    """All rotary frequencies are divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        _require_factor(self.factor)


class Llama3Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="llama3"):
    """Llama 3.1's banded rule: low frequencies are divided by ``factor``, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        _require(self.high_freq_factor > self.low_freq_factor, "rope scaling needs high_freq_factor > low_freq_factor")


class YarnScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="yarn"):
    """YaRN: frequencies that turn less than ``beta_slow`` times within the original context are divided by ``factor``, those that turn more
    than ``beta_fast`` times kept, those between blended. ``truncate``: the two bounds are rounded to whole components.
    ``attention_factor``: cosines and sines are multiplied by it."""

    factor: float
    attention_factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        _require(0.0 < self.attention_factor < math.inf, f"rope attention_factor {self.attention_factor} is not a positive number")
        _require(self.original_max_position > 0, "rope scaling needs a positive original_max_position_embeddings")
        _require(0.0 < self.beta_slow <= self.beta_fast < math.inf, "rope scaling needs 0 < beta_slow <= beta_fast")


class LongRopeScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="longrope"):
    """LongRoPE: each frequency has a divisor of its own, from ``short`` where no sequence is longer than the original context, else from
    ``long``. ``attention_factor``: cosines and sines are multiplied by it, with either."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _require(0.0 < self.attention_factor < math.inf, f"rope attention_factor {self.attention_factor} is not a positive number")
        _require(all(0.0 < each < math.inf for each in self.short + self.long), "a longrope factor is not a positive number")
        _require(self.original_max_position > 0, "rope scaling needs a positive original_max_position_embeddings")


class DivisorScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="divisors"):
    """Each frequency is divided by its own of ``divisors``: how llama.cpp's files store Llama 3.1's rule, worked out."""

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(all(0.0 < each < math.inf for each in self.divisors), "a rope divisor is not a positive number")


#: How rotary frequencies are stretched over a longer context. Decoded by ``kind``.
RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | DivisorScaling


def _require_factor(factor: float) -> None:
    _require(1.0 <= factor < math.inf, f"rope scaling factor {factor} is not a number of at least 1")


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rotary embedding of the first ``dim`` components of each query and key head; component i is paired with i + dim / 2."""

    dim: int
    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _require(self.dim > 0 and self.dim % 2 == 0, f"{self.dim} rotated components are no pairs", "rotary embedding turns pairs")
        _require(0 < self.theta < math.inf, f"rope_theta must be a positive number, got {self.theta}")
        named: tuple[tuple[str, tuple[float, ...]], ...] = ()
        if isinstance(self.scaling, LongRopeScaling):
            named = (("longrope short_factor", self.scaling.short), ("longrope long_factor", self.scaling.long))
        elif isinstance(self.scaling, DivisorScaling):
            named = (("rope divisors", self.scaling.divisors),)
        for name, factors in named:
            _require(len(factors) == self.dim // 2, f"{name}: {len(factors)} values, not {self.dim // 2}", "one for each pair")


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What attention layers differ in. ``rope`` None: positions are not encoded. ``qkv_bias``, ``out_bias``: the products add a bias.
    ``qk_norm``: queries and keys are normed, each head alone or over the whole width of all heads. ``scale``: of the scores; None =
    head_dim ** -0.5. ``window``: a token attends to so many tokens, itself included; None = to all before it. ``softcap``: scores s become
    cap * tanh(s / cap)."""

    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        _require(self.scale is None or 0.0 < self.scale < math.inf, f"the scale of attention scores must be positive, got {self.scale}")
        _require(self.window is None or self.window > 0, f"sliding_window must be positive, got {self.window}")
        _require_cap(self.softcap)

    def sliding(self, window: int | None) -> AttentionSpec:
        """The same with another window."""
        return msgspec.structs.replace(self, window=window)


def _require_cap(cap: float | None) -> None:
    _require(cap is None or 0.0 < cap < math.inf, f"a soft cap must be a positive number, got {cap}")


#: What an MLP computes of each column: SiLU, GELU by the error function or by tanh, or the square of ReLU.
Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu2"]


class MlpSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="dense"):
    """A dense MLP with ``size`` columns between: down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

    size: int
    bias: bool = False
    activation: Activation = "silu"
    gated: bool = True

    def __post_init__(self) -> None:
        _require(self.size > 0, f"intermediate_size must be positive, got {self.size}")


class SharedExpertSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An expert that every token takes beside those that its router chooses, with ``size`` columns. ``gated``: what it gives is multiplied
    by the sigmoid of a product of its own; else by 1."""

    size: int
    gated: bool = False

    def __post_init__(self) -> None:
        _require(self.size > 0, f"the size of a shared expert must be positive, got {self.size}")


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="moe"):
    """A mixture of ``experts`` gated MLPs of ``size`` columns each, of which every token takes the ``experts_per_token`` with the largest
    router logits; their sum is weighted by the softmax of the logits over all experts, or with ``renormalise`` over the chosen ones.

    A softmax keeps the order, so families that choose before the softmax and those that choose after it differ in ``renormalise`` alone.
    """

    experts: int
    experts_per_token: int
    size: int
    renormalise: bool = True
    activation: Activation = "silu"
    shared: SharedExpertSpec | None = None

    def __post_init__(self) -> None:
        _require(self.size > 0, f"the size of an expert must be positive, got {self.size}")
        _require(0 < self.experts <= MAX_EXPERTS, f"the number of experts must be in 1..{MAX_EXPERTS}, got {self.experts}")
        _require(0 < self.experts_per_token <= self.experts, f"a token cannot take {self.experts_per_token} experts of {self.experts}")


class NormSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model norms. ``centred``: LayerNorm, which subtracts the mean first; else the root-mean-square norm. ``plus_one``: the stored
    weights lack 1. ``weight``, ``bias``: what the norms of the residual stream have; those of queries and keys have weights alone."""

    centred: bool = False
    plus_one: bool = False
    weight: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _require(self.centred or not self.bias, "a root-mean-square norm has no bias")
        _require(self.weight or not (self.plus_one or self.bias), "a norm without weights has no bias either")


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decoder layer. ``pre_norm``: attention and MLP read the normed residual stream, else the stream itself; ``post_norm``: what each
    gives is normed before it is added. ``parallel``: the MLP reads what attention reads, through the same norm, not what it gives."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False

    def __post_init__(self) -> None:
        _require(not self.parallel or (self.pre_norm and not self.post_norm), "parallel attention and MLP have one norm, before both")


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of a decoder: grouped-query attention, norms of one form, and layers of the ``kinds``, of which layer i is
    ``kinds[layers[i]]``.

    Facts of attention that shape the K/V cache are the model's, since all layers share its blocks: ``num_heads``, ``num_kv_heads``,
    ``head_dim``. ``architecture``: the family's name, as Hugging Face's ``model_type``. ``embedding_multiplier``,
    ``residual_multiplier``: of embeddings, and of what attention and MLP give; ``logits_divisor``: of the logits. ``logits_softcap``:
    logits l become cap * tanh(l / cap). ``rms_norm_eps``: of every norm.
    """

    architecture: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    kinds: tuple[LayerSpec, ...]
    layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    tied_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    norm: NormSpec = NormSpec()

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_position"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(0 <= self.rms_norm_eps < math.inf, f"rms_norm_eps must be a number of at least 0, got {self.rms_norm_eps}")
        for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
            _require(0 < abs(getattr(self, name)) < math.inf, f"{name} must be a number other than 0, got {getattr(self, name)}")
        # Tables of tensors are made from this number before any weight is looked at.
        _require(self.num_layers <= MAX_LAYERS, f"num_layers {self.num_layers} is more than {MAX_LAYERS}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads",
            "grouped-query attention needs a whole number of query heads per key/value head",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd", "rotary embedding turns pairs")
        _require(sorted(set(self.layers)) == list(range(len(self.kinds))), "layers and kinds of layers do not belong together")
        _require_cap(self.logits_softcap)
        normed = any(kind.attention.qk_norm is not None for kind in self.kinds)
        _require(not (normed and self.norm.centred), "a LayerNorm of queries and keys is not computed")
        for rope in self.ropes:
            _require(rope.dim <= self.head_dim, f"{rope.dim} rotated components are more than head_dim {self.head_dim}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(kind.attention.rope for kind in self.kinds if kind.attention.rope is not None))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers' attention; None = the whole context."""
        return tuple(dict.fromkeys(kind.attention.window for kind in self.kinds))

    @property
    def widest_mlp(self) -> int:
        """Columns of the widest MLP; of an expert where a layer has experts."""
        return max(kind.mlp.size for kind in self.kinds)

    @property
    def moes(self) -> tuple[MoeSpec, ...]:
        """The different mixtures of experts of the layers."""
        return tuple(dict.fromkeys(kind.mlp for kind in self.kinds if isinstance(kind.mlp, MoeSpec)))

    def layer(self, index: int) -> LayerSpec:
        return self.kinds[self.layers[index]]


def model_spec(layers: Sequence[LayerSpec], **facts: Any) -> ModelSpec:
    """The model of ``layers``; equal ones become one kind. ``facts``: the other fields of :class:`ModelSpec`. Raises ConfigError."""
    _require(0 < len(layers) <= MAX_LAYERS, f"num_layers {len(layers)} is not in 1..{MAX_LAYERS}")
    kinds = {kind: index for index, kind in enumerate(dict.fromkeys(layers))}
    return ModelSpec(kinds=tuple(kinds), layers=tuple(kinds[layer] for layer in layers), **facts)


def uniform_decoder(
    *,
    num_layers: int,
    intermediate_size: int,
    head_dim: int,
    rope_theta: float = 10000.0,
    rope_scaling: RopeScaling | None = None,
    qkv_bias: bool = False,
    qk_norm: Literal["head"] | None = None,
    **facts: Any,
) -> ModelSpec:
    """A model whose layers are all alike, as Llama's, Qwen 2's and Qwen 3's are: pre-norm, no other biases, heads rotated whole."""
    rope = RopeSpec(dim=head_dim, theta=rope_theta, scaling=rope_scaling)
    attention = AttentionSpec(rope=rope, qkv_bias=qkv_bias, qk_norm=qk_norm)
    layer = LayerSpec(attention=attention, mlp=MlpSpec(size=intermediate_size))
    # The number is checked before a list of that length is made.
    _require(0 < num_layers <= MAX_LAYERS, f"num_layers {num_layers} is not in 1..{MAX_LAYERS}")
    return model_spec([layer] * num_layers, head_dim=head_dim, **facts)


class Parallel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layout of one replica: ``tp`` ranks share each layer, ``pp`` stages share the layers; world = tp * pp.

    Rank order is TensorRT-LLM's: rank = pp_rank * tp + tp_rank. ``expert_parallel``: experts are distributed whole to the ``tp`` ranks;
    else each rank has some columns of every expert.
    """

    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        _require(self.tp >= 1 and self.pp >= 1, f"tp and pp must be at least 1, got tp={self.tp} pp={self.pp}")

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def words(self) -> str:
        """The layout for people: ``tp=2 pp=1``, and whether experts are whole."""
        return f"tp={self.tp} pp={self.pp}{' ep' if self.expert_parallel else ''}"

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def pp_rank(self, rank: int) -> int:
        return rank // self.tp

    def check(self, model: ModelSpec) -> None:
        """Raises :class:`ConfigError` when ``model`` cannot be split this way by the portable engine."""
        _require(
            self.tp <= model.num_heads,
            f"tp={self.tp} is more than the model's {model.num_heads} query heads",
            "each rank needs at least one whole query head",
            f"use --tp-size {model.num_heads} or less",
        )
        _require(
            self.pp <= model.num_layers,
            f"pp={self.pp} is more than the model's {model.num_layers} layers",
            "each stage needs at least one layer",
            f"use --pp-size {model.num_layers} or less",
        )
        _require(
            not self.expert_parallel or bool(model.moes),
            "this model has no experts to be distributed to ranks",
            "its layers have dense MLPs, which tensor parallelism cuts",
            "leave --expert-parallel out",
        )
        for moe in model.moes:
            _require(
                not self.expert_parallel or self.tp <= moe.experts,
                f"tp={self.tp} is more than the model's {moe.experts} experts",
                "with --expert-parallel each rank needs at least one whole expert",
                "use fewer ranks, or leave --expert-parallel out",
            )


class Quant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quantization as TensorRT-LLM's checkpoint names it (``quantization`` in ``config.json``); ``quant_algo`` None = none.

    ``group_size``: one of ``GROUP_SIZES``; None = one scale an output row. ``has_zero_point``: groups have an offset beside their scale.
    """

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: tuple[str, ...] | None = None

    def same_weights(self, other: Quant) -> bool:
        """Whether weights have the same format, whatever the format of the KV cache."""
        return self == msgspec.structs.replace(other, kv_cache_quant_algo=self.kv_cache_quant_algo)

    @property
    def weights(self) -> QuantName | None:
        """The format that the portable engine computes with; None for unquantized weights, and for formats that only TensorRT-LLM reads."""
        name = next((name for name, algo in QUANT_ALGOS.items() if algo == self.quant_algo), None)
        grouped = self.group_size in GROUP_SIZES and self.has_zero_point
        plain = self.group_size is None and not self.has_zero_point
        return None if self.pre_quant_scale or not (grouped if name == "int4" else plain) else name


#: Nothing quantized.
PLAIN = Quant()


def quant_of(name: QuantName, group_size: int | None = None) -> Quant:
    """The Quant of a weight format; ``group_size`` None = 64 where the format has groups. Embedding and head stay as they are.

    Raises :class:`ConfigError` for a group size that the format does not have.
    """
    grouped = name == "int4"
    _require(grouped or group_size is None, f"{name} weights have no groups", "each output row has one scale", "leave the group size out")
    size = (group_size or 64) if grouped else None
    _require(size is None or size in GROUP_SIZES, f"group_size must be {', '.join(map(str, GROUP_SIZES))}, got {size}")
    return Quant(
        quant_algo=QUANT_ALGOS[name],
        group_size=size,
        has_zero_point=grouped,
        exclude_modules=("lm_head", "transformer.vocab_embedding"),
    )


class DeviceIndependentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of every engine whose defaults suit every device. Sizes: tokens, bytes.

    ``kv_tokens`` = 0 means: as many as ``kv_bytes`` holds; ``kv_bytes`` = 0 too means the engine's default share of free memory.
    ``max_seq_len`` = 0 means the model's own context.
    """

    max_seq_len: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    block_size: int = 16
    prefix_cache: bool = True
    deterministic: bool = False
    fixed_shape: bool = False
    wait: WaitPolicy = "hybrid"
    threads: int = 1

    def __post_init__(self) -> None:
        _require(self.block_size in (8, 16, 32, 64, 128), f"block_size must be 8, 16, 32, 64 or 128, got {self.block_size}")
        for name in ("max_seq_len", "kv_tokens", "kv_bytes"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(self.threads >= 1, "threads must be at least 1")


def check_step_limits(max_batch_size: int, max_num_tokens: int) -> None:
    """Raises :class:`ConfigError` for invalid limits of a step. ``max_batch_size``: sequences; ``max_num_tokens``: tokens."""
    _require(1 <= max_batch_size <= 4096, f"max_batch_size must be in 1..4096, got {max_batch_size}")
    _require(
        max_num_tokens >= max_batch_size,
        f"max_num_tokens ({max_num_tokens}) is below max_batch_size ({max_batch_size})",
        "one step must be able to hold one token of every sequence",
        "raise max_num_tokens or lower max_batch_size",
    )


class CommonEngineSpec(DeviceIndependentSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of every engine: how one replica runs a model. Sizes: tokens, sequences, bytes."""

    dtype: DType = "fp32"
    max_batch_size: int = 64
    max_num_tokens: int = 256
    device: Device = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_limits(self.max_batch_size, self.max_num_tokens)


class PortableOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the portable engine alone. ``load_format`` ``dummy``: random weights for the artifact's shape, which then needs no files
    of weights. ``quant``: quantize plain weights while loading them; None = as the artifact has them. ``gpu_memory_utilization``: the share
    of a GPU's total memory that may be in use, by all processes; a reserve stays free in any case (:mod:`workers.layout.memory`)."""

    load_format: Literal["auto", "dummy"] = "auto"
    quant: QuantName | None = None
    gpu_memory_utilization: float = 1.0

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        _require(0.0 < share <= 1.0, f"gpu_memory_utilization must be above 0 and at most 1, got {share}", "it is a share", "0.9 is usual")


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cost of a step of the fake engine: ``fake_step_ms`` + ``fake_token_us`` / 1000 * tokens in the step, milliseconds."""

    fake_step_ms: float = 1.0
    fake_token_us: float = 0.0


class PortableSpec(CommonEngineSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="portable"):
    """This project's own engine: torch, MPI and NCCL, on CPUs or GPUs."""

    options: PortableOptions = PortableOptions()


class FakeSpec(CommonEngineSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="fake"):
    """An engine without weights, whose steps take a given time."""

    options: FakeOptions = FakeOptions()


class TrtllmSpec(CommonEngineSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="trtllm"):
    """TensorRT-LLM."""

    options: TrtllmOptions = TrtllmOptions()


#: One engine with its settings. Decoded by ``kind``.
EngineSpec: TypeAlias = PortableSpec | FakeSpec | TrtllmSpec


class RouterAddress(msgspec.Struct, frozen=True, kw_only=True):
    """The address of one router, for leaders and clients. ``server_key`` is the router's public CURVE key in z85; empty on ``ipc://``."""

    endpoint: str
    server_key: str = ""


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that rank 0 needs to run one replica; the launcher writes it as JSON (mode 0600), other ranks get it over MPI.

    ``epoch`` = launch time in ms * 2**16 + 16 random bits, made by the launcher (:mod:`workers.epoch`): larger = newer.
    ``tokenizer``: a folder with ``tokenizer.json``; empty = the artifact's own.
    ``run_dir``: where rank 0 writes ``state.json`` and each rank its ``rank<N>.log``; empty = log to stderr, no state file.
    ``key_file``: this replica's CURVE key pair (JSON: public, secret), needed for ``tcp://`` routers only.
    ``drain_grace_s``: how long sequences may run after SIGTERM; after that they continue at other replicas. ``announced``: its name at
    routers that serve replicas of several deployments; empty = ``name``. ``log_format``: of the ranks' logs.
    """

    name: str
    model: str
    artifact: str
    tokenizer: str = ""
    epoch: int = 0
    parallel: Parallel = Parallel()
    engine: EngineSpec = PortableSpec()
    routers: tuple[RouterAddress, ...] = ()
    run_dir: str = ""
    key_file: str = ""
    heartbeat_s: float = 0.2
    hang_floor_s: float = 10.0
    drain_grace_s: float = TERM_GRACE_S
    announced: str = ""
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        _require(bool(self.name) and self.name.isprintable() and "/" not in self.name, f"replica name {self.name!r} is not usable")

    @property
    def needs_mpi(self) -> bool:
        """Whether the replica needs MPI: several ranks communicate over MPI, and TensorRT-LLM calls it even for one. In a fake engine, rank
        0 can compute for all ranks."""
        return isinstance(self.engine, TrtllmSpec) or (self.parallel.world > 1 and isinstance(self.engine, PortableSpec))

    @property
    def portable(self) -> PortableSpec:
        """The engine of a replica that is known to run the portable one; the two properties below do the same for the others."""
        assert isinstance(self.engine, PortableSpec)
        return self.engine

    @property
    def fake(self) -> FakeSpec:
        assert isinstance(self.engine, FakeSpec)
        return self.engine

    @property
    def trtllm(self) -> TrtllmSpec:
        assert isinstance(self.engine, TrtllmSpec)
        return self.engine
