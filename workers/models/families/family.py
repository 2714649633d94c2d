"""What a model family is: the keys of its ``config.json``, and the names that its tensors have in files.

Owns the keys that the families share. A key that would change the model and is not computed is refused by name. Raises
:class:`~workers.protocol.errors.ConfigError` without a path: the reader of the file adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import (
    AttentionSpec,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MlpSpec,
    ModelSpec,
    RopeScaling,
    RopeSpec,
    YarnScaling,
    model_spec,
)


class FileTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a layer in Hugging Face's files whose name is not the declared one: ``stem`` as the file has it, and the declared stems
    of what it ``holds``, one after another in its rows."""

    stem: str
    holds: tuple[str, ...]


class GgufForm(msgspec.Struct, frozen=True, kw_only=True):
    """How llama.cpp writes the family. ``permuted``: rows of queries and keys lie in interleaved rotary order."""

    architecture: str
    permuted: bool = False


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One ``model_type``. ``config``: its keys; ``read``: the model that they describe. ``tensors``: those with other names than declared.
    ``trtllm``: the architecture's name in TensorRT-LLM checkpoints; None = its format does not name the family. ``gguf``: None = GGUFs of
    it are not read, or llama.cpp writes it as another family."""

    model_type: str
    config: type[DecoderConfig]
    read: Callable[[Any], ModelSpec]
    tensors: tuple[FileTensor, ...] = ()
    trtllm: str | None = None
    gguf: GgufForm | None = None


class DecoderConfig(msgspec.Struct, kw_only=True):
    """The keys that families share; defaults are those of transformers' own classes, and a family overrides those that differ."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // max(1, self.num_attention_heads)

    def rope(self, *, theta: float = 10000.0, partial: bool = False) -> RopeSpec:
        """The rotary embedding. ``theta``: the class's default; ``partial``: whether the family heeds ``partial_rotary_factor``.

        transformers 5 writes all its keys into ``rope_parameters``; older releases write theta beside ``rope_scaling``.
        """
        keys = {"rope_theta": self.rope_theta or theta} | (self.rope_scaling or {}) | (self.rope_parameters or {})
        if self.original_max_position_embeddings is not None:
            keys.setdefault("original_max_position_embeddings", self.original_max_position_embeddings)
        share = self.partial_rotary_factor or keys.get("partial_rotary_factor") or 1.0
        if share != 1.0 and not partial:
            raise ConfigError(f"partial_rotary_factor={share} is not supported", "known: 1.0")
        return read_rope(keys, int(self.head_size * share), self.max_position_embeddings)

    def model(self, layers: Sequence[LayerSpec], *, window: int | None = None, **facts: Any) -> ModelSpec:
        """The model of ``layers``. ``window``: of sliding attention. Up to the length of its window a sliding-window model is exactly a
        full-attention model: it is served that far."""
        if self.hidden_act != "silu":
            raise ConfigError(f"activation {self.hidden_act!r} is not supported", "known: silu")
        if other := set(self.layer_types or ()) - {"full_attention", "sliding_attention"}:
            raise ConfigError(f"layer type {min(other)!r} is not supported", "known: full_attention, sliding_attention")
        position = self.max_position_embeddings
        return model_spec(
            layers,
            architecture=self.model_type,
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_size,
            vocab_size=self.vocab_size,
            max_position=min(position, window) if window else position,
            rms_norm_eps=self.rms_norm_eps,
            tied_embeddings=self.tie_word_embeddings,
            **facts,
        )

    def uniform(self, attention: AttentionSpec, *, mlp_bias: bool = False, window: int | None = None, **facts: Any) -> ModelSpec:
        """The model whose layers are all alike: pre-norm, with ``attention``."""
        layer = LayerSpec(attention=attention, mlp=MlpSpec(size=self.intermediate_size, bias=mlp_bias))
        return self.model([layer] * self.num_hidden_layers, window=window, **facts)


def read_rope(keys: dict[str, Any], dim: int, max_position: int) -> RopeSpec:
    """The rotary embedding of ``dim`` components that the ``keys`` of ``rope_parameters`` describe, in a model of ``max_position``."""
    theta = keys["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ConfigError(f"rope_theta {theta!r} does not make sense", "it is a positive number")
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind == "default" and any(isinstance(value, dict) for value in keys.values()):
        raise ConfigError("rotary parameters per layer type are not supported", "all layers share one table")
    if kind == "default":
        return RopeSpec(dim=dim, theta=float(theta))
    if kind == "dynamic":
        raise ConfigError(
            "rope scaling 'dynamic' is not supported",
            "its frequencies change with the length of a sequence, so that cached keys would become wrong",
            "replace it by yarn or linear, or remove it and stay within the original context",
        )
    if kind not in _SCALINGS:
        raise ConfigError(f"rope scaling {kind!r} is not supported", f"known: default, {', '.join(_SCALINGS)}")
    try:
        return RopeSpec(dim=dim, theta=float(theta), scaling=_SCALINGS[kind](_Scaling(kind, keys, max_position)))
    except (TypeError, ValueError, ZeroDivisionError, msgspec.ValidationError) as error:
        raise ConfigError("rope scaling does not make sense", str(error)) from error


class _Scaling:
    """The keys of a scaling of one ``kind``."""

    def __init__(self, kind: str, keys: dict[str, Any], max_position: int) -> None:
        self._kind, self._keys, self.max_position = kind, keys, max_position

    def number(self, key: str, default: float | None = None) -> float:
        value = self._keys.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"rope scaling {self._kind!r} lacks {key}", "the scaling cannot be computed without it")
        return msgspec.convert(value, float)

    def optional(self, key: str) -> float | None:
        return None if self._keys.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        if key not in self._keys:
            raise ConfigError(f"rope scaling {self._kind!r} lacks {key}", "the scaling cannot be computed without it")
        return msgspec.convert(self._keys[key], tuple[float, ...])

    def flag(self, key: str, default: bool) -> bool:
        value = self._keys.get(key)
        return default if value is None else msgspec.convert(value, bool)

    @property
    def original(self) -> int:
        return int(self.number("original_max_position_embeddings", self.max_position))


def _linear(keys: _Scaling) -> RopeScaling:
    return LinearScaling(factor=keys.number("factor"))


def _llama3(keys: _Scaling) -> RopeScaling:
    return Llama3Scaling(
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor"),
        high_freq_factor=keys.number("high_freq_factor"),
        original_max_position=int(keys.number("original_max_position_embeddings")),
    )


def _yarn(keys: _Scaling) -> RopeScaling:
    """Absent factors are what transformers makes of them: https://arxiv.org/abs/2309.00071, section 3.4; ``mscale`` is DeepSeek's."""
    factor = keys.number("factor")
    attention, mscale, of_all = keys.optional("attention_factor"), keys.optional("mscale"), keys.optional("mscale_all_dim")
    if attention is None:
        attention = _mscale(factor, mscale) / _mscale(factor, of_all) if mscale and of_all else _mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        attention_factor=attention,
        original_max_position=keys.original,
        beta_fast=keys.number("beta_fast", 32.0) or 32.0,
        beta_slow=keys.number("beta_slow", 1.0) or 1.0,
        truncate=keys.flag("truncate", True),
    )


def _mscale(factor: float, by: float) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(keys: _Scaling) -> RopeScaling:
    original = keys.original
    factor, attention = keys.number("factor", keys.max_position / original), keys.optional("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return LongRopeScaling(
        short=keys.numbers("short_factor"), long=keys.numbers("long_factor"), attention_factor=attention, original_max_position=original
    )


_SCALINGS: dict[str, Callable[[_Scaling], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
