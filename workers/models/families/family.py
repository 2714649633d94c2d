"""The definition of a model family: the keys of its ``config.json``, and the names of its tensors in files.

Owns the keys that the families share. A key that would change the model and is not supported is refused by name. Raises
:class:`~workers.protocol.errors.ConfigError` without a path: the reader of the file adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import (
    MAX_LAYERS,
    Activation,
    AttentionSpec,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RopeScaling,
    RopeSpec,
    YarnScaling,
    model_spec,
)


class FileTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a layer in Hugging Face's files whose name is not the declared one: ``stem`` as the file has it, and the declared stems
    of what it ``holds``, one after another in its rows. ``*`` stands for the number of an expert; where only ``holds`` have it, the file's
    tensor [experts, rows, inputs] holds those of all experts. ``bare``: the file's name ends with the stem, without ``.weight``."""

    stem: str
    holds: tuple[str, ...]
    bare: bool = False


class GgufForm(msgspec.Struct, frozen=True, kw_only=True):
    """How llama.cpp writes the family. ``permuted``: rows of queries and keys lie in interleaved rotary order. ``keys``: of the config, by
    those of the metadata that mean the same. ``tensors``: those with other names than declared, without their layer's prefix. ``facts``:
    keys of the config that llama.cpp knows by the model's size, from the config so far."""

    architecture: str
    permuted: bool = False
    keys: dict[str, str] = {}
    tensors: tuple[FileTensor, ...] = ()
    facts: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One ``model_type``. ``config``: its keys; ``read``: the model that they describe. ``tensors``: those with other names than declared;
    ``packed``: the same where a folder has the experts of a layer in one tensor, as transformers keeps them in memory.
    ``interleaved``: its files pair component 2i of a rotated head with 2i + 1, not i with i + rotated / 2. ``trtllm``: the architecture's
    name in TensorRT-LLM checkpoints; None = its format does not name the family. ``gguf``: None = GGUFs of it are not read, or llama.cpp
    writes it as another family."""

    model_type: str
    config: type[DecoderConfig]
    read: Callable[[Any], ModelSpec]
    tensors: tuple[FileTensor, ...] = ()
    packed: tuple[FileTensor, ...] = ()
    interleaved: bool = False
    trtllm: str | None = None
    gguf: GgufForm | None = None


#: Activations by their names in configs; two names may mean one function.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderConfig(msgspec.Struct, kw_only=True):
    """The keys that families share; defaults are those of transformers' own classes, and a family overrides those that differ."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
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

    def rope(self, *, theta: float = 10000.0, partial: float | None = None, layer_type: str = FULL) -> RopeSpec:
        """The rotary embedding of layers of ``layer_type``. ``theta``: the class's default; ``partial``: the default of
        ``partial_rotary_factor``, None = the family has no such key.

        transformers 5 writes all its keys into ``rope_parameters``, once or for each layer type; older releases write theta beside
        ``rope_scaling``.
        """
        given = (self.rope_scaling or {}) | (self.rope_parameters or {})
        if nested := [key for key, value in given.items() if isinstance(value, dict)]:
            if layer_type not in nested:
                raise ConfigError(f"rope_parameters lack {layer_type}", f"they have {', '.join(nested)}", "each layer type needs its own")
            given = given[layer_type]
        keys = {"rope_theta": self.rope_theta or theta} | given
        if self.original_max_position_embeddings is not None:
            keys["original_max_position_embeddings"] = self.original_max_position_embeddings
        share = keys.get("partial_rotary_factor") or self.partial_rotary_factor or partial or 1.0
        if share != 1.0 and partial is None:
            raise ConfigError(f"partial_rotary_factor={share} is not supported", "known: 1.0")
        return read_rope(keys, int(self.head_size * share), self.max_position_embeddings)

    def windows(self, slides: Callable[[int], bool] = lambda layer: True) -> list[int | None]:
        """The window of each layer's attention, None = the whole context. ``slides``: which layers slide where ``layer_types`` is
        absent."""
        types = self.layer_types or [SLIDING if slides(layer) else FULL for layer in range(self.num_hidden_layers)]
        if len(types) != self.num_hidden_layers:
            raise ConfigError(f"layer_types has {len(types)} values", f"the model has {self.num_hidden_layers} layers")
        return [self.sliding_window if kind == SLIDING else None for kind in types]

    def activation(self) -> Activation:
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"activation {self.hidden_act!r} is not supported", f"known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self.hidden_act]

    def mlp(self, *, bias: bool = False, gated: bool = True) -> MlpSpec:
        return MlpSpec(size=self.intermediate_size, bias=bias, activation=self.activation(), gated=gated)

    def model(self, layers: Sequence[LayerSpec], **facts: Any) -> ModelSpec:
        """The model of ``layers``; ``facts``: other fields of :class:`ModelSpec`, instead of those that follow from the config."""
        if other := set(self.layer_types or ()) - {FULL, SLIDING}:
            raise ConfigError(f"layer type {min(other)!r} is not supported", f"known: {FULL}, {SLIDING}")
        common = {
            "architecture": self.model_type,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab_size,
            "max_position": self._longest(layers),
            "rms_norm_eps": self.rms_norm_eps,
            "tied_embeddings": self.tie_word_embeddings,
        }
        return model_spec([self._without_idle_window(layer) for layer in layers], **common | facts)

    def uniform(
        self,
        attention: AttentionSpec,
        mlp: MlpSpec | MoeSpec | None = None,
        *,
        windows: Sequence[int | None] | None = None,
        **facts: Any,
    ) -> ModelSpec:
        """The pre-norm model whose layers have all ``attention`` and ``mlp`` (default: the config's, without biases), each with its window
        of ``windows``."""
        mlp = mlp or self.mlp()
        every = windows if windows is not None else [None] * self.num_hidden_layers
        return self.model([LayerSpec(attention=attention.sliding(window), mlp=mlp) for window in every], **facts)

    def _longest(self, layers: Sequence[LayerSpec]) -> int:
        """Positions of the model. YaRN stretches the original context by its factor, even where the config keeps the original length."""
        scalings = [layer.attention.rope.scaling for layer in layers if layer.attention.rope is not None]
        stretched = [int(each.original_max_position * each.factor) for each in scalings if isinstance(each, YarnScaling)]
        return max(self.max_position_embeddings, *stretched) if stretched else self.max_position_embeddings

    def _without_idle_window(self, layer: LayerSpec) -> LayerSpec:
        """A window that no sequence is longer than is none, so that equal layers are one kind."""
        window = layer.attention.window
        if window is None or window < self._longest([layer]):
            return layer
        return msgspec.structs.replace(layer, attention=layer.attention.sliding(None))


def refuse(**keys: Any) -> None:
    """Raises ConfigError for the first of ``keys`` that is set: it would change the model, and is not computed."""
    for key, value in keys.items():
        if value:
            raise ConfigError(f"{key}={value} is not supported", "known: False")


def read_rope(keys: dict[str, Any], dim: int, max_position: int) -> RopeSpec:
    """The rotary embedding of ``dim`` components that the ``keys`` of ``rope_parameters`` describe, in a model of ``max_position``."""
    theta = keys["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ConfigError(f"rope_theta {theta!r} does not make sense", "it is a positive number")
    kind = keys.get("rope_type", keys.get("type", "default"))
    # Dynamic scaling begins beyond max_position_embeddings, as far as which the model is served: up to there it scales nothing.
    if kind in ("default", "dynamic"):
        return RopeSpec(dim=dim, theta=float(theta))
    if kind not in _SCALINGS:
        raise ConfigError(f"rope scaling {kind!r} is not supported", f"known: default, dynamic, {', '.join(_SCALINGS)}")
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
        original_max_position=keys.original,
    )


def _yarn(keys: _Scaling) -> RopeScaling:
    """Absent factors are what transformers makes of them: https://arxiv.org/abs/2309.00071, section 3.4; ``mscale`` is DeepSeek's."""
    # DeepSeek's configs leave the factor out: it is the ratio of the two lengths then.
    factor = keys.number("factor", keys.max_position / keys.original)
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
