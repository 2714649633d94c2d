"""GGUF files: header, metadata as a ModelSpec, and dequantized weights as a Source.

Reads tensors by blocks (:mod:`workers.artifacts.gguf_quants`); only the rows or blocks of a slice are touched. Undoes the row permutation
that llama-family GGUFs apply to q and k for interleaved rotary embedding. Sizes and counts of the header are bounded by the file
before use. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from workers.artifacts.gguf_quants import GGUF_TYPES, REFUSED_TYPES, GgufType
from workers.artifacts.git_lfs import HEAD_BYTES, refuse_pointer
from workers.artifacts.number_formats import Array
from workers.artifacts.recognition import what_file
from workers.artifacts.safetensors_file import COPY_AGAIN, SUPPORTED_MODELS, regular
from workers.artifacts.source import Block, rotary_halves
from workers.layout.sharding import ModelTensor, Span
from workers.models.families.family import Family
from workers.models.registry import gguf_families, gguf_places, rotated_rows
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import (
    DivisorScaling,
    LinearScaling,
    LongRopeScaling,
    ModelSpec,
    RopeScaling,
    YarnScaling,
)

MAGIC = b"GGUF"
#: Number of values that are dequantized at a time, so that their temporaries stay in a core's second-level cache.
_CHUNK = 1 << 16
#: Keys of a split model, and how the names of its files end.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
#: Of norms; a model has one of them.
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
#: Tensors that are rotary parameters, not weights: the divisor of each frequency, and LongRoPE's for short and long contexts.
ROPE_DIVISORS, LONG_ROPE = "rope_freqs.weight", ("rope_factors_short.weight", "rope_factors_long.weight")


class Info(NamedTuple):
    """A tensor: numpy shape (rows first), format, offset from the start of its file, bytes, and the index of its file among the parts."""

    shape: tuple[int, ...]
    format: GgufType
    offset: int
    size: int
    part: int = 0


class GgufFile:
    """A mapped GGUF model, in one file or in several parts: ``metadata`` of the first file, and the ``tensors`` of all.

    Raises :class:`ArtifactError` for a file that is damaged or not supported, for a part that is missing, and for a part that is not the
    first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _MappedFile(path)
        self._parts = [first, *(_MappedFile(part, index + 1) for index, part in enumerate(_other_parts(path, first.metadata)))]
        self.metadata, self.tensors = first.metadata, dict(first.tensors)
        for part in self._parts[1:]:
            if part.metadata.get(SPLIT_NO) != part.index:
                raise ArtifactError(
                    f"{part.path} is not part {part.index + 1} of {path}", f"its {SPLIT_NO} is {part.metadata.get(SPLIT_NO)}", COPY_AGAIN
                )
            if twice := self.tensors.keys() & part.tensors.keys():
                raise ArtifactError(f"{part.path} holds {min(twice)} a second time", "another part holds it too", COPY_AGAIN)
            self.tensors |= part.tensors
        wanted = first.metadata.get(SPLIT_TENSORS, len(self.tensors)) if len(self._parts) > 1 else len(self.tensors)
        if wanted != len(self.tensors):
            raise ArtifactError(f"the parts of {path} are not whole", f"they hold {len(self.tensors)} tensors of {wanted}", COPY_AGAIN)

    @property
    def files(self) -> list[Path]:
        """All files of the model, the first one first."""
        return [part.path for part in self._parts]

    @property
    def quantized_types(self) -> list[str]:
        """Names of the quantized tensor types in the file, the one with most values first."""
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            if info.format.values > 1:
                counts[info.format.name] = counts.get(info.format.name, 0) + math.prod(info.shape)
        return sorted(counts, key=lambda name: -counts[name])

    def block_bytes(self, info: Info) -> Array:
        """[rows, blocks a row, bytes a block] uint8 view of a tensor."""
        blocks = info.shape[-1] // info.format.values
        rows = math.prod(info.shape[:-1])
        return self._parts[info.part].view(info).reshape(rows, blocks, info.format.bytes)

    def vector(self, name: str) -> tuple[float, ...]:
        """The values of a tensor of one row. Raises KeyError where there is none."""
        info = self.tensors[name]
        return tuple(info.format.decode(self.block_bytes(info).reshape(-1, info.format.bytes)).reshape(-1).tolist())

    def release(self) -> None:
        for part in self._parts:
            part.release()


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The parts of a split model after its first file ``path``, existing or not."""
    count, number = metadata.get(SPLIT_COUNT, 1), metadata.get(SPLIT_NO, 0)
    if type(count) is not int or type(number) is not int:
        raise ArtifactError(f"{path} is damaged", f"{SPLIT_COUNT} is {count!r}, {SPLIT_NO} is {number!r}", COPY_AGAIN)
    if count <= 1:
        return []
    stem = PART.sub("", path.name)
    if number:
        raise ArtifactError(
            f"{path} is part {number + 1} of {count} of a split GGUF",
            "a model is opened by its first part",
            f"give {path.parent / part_name(stem, 0, count)}",
        )
    if path.name != part_name(stem, 0, count):
        raise ArtifactError(
            f"{path} is part 1 of {count} of a split GGUF",
            "the other parts cannot be found by its name",
            f"rename it to NAME{part_name('', 0, count)}, as the others",
        )
    found = [path.parent / part_name(stem, index, count) for index in range(1, count)]
    if missing := next((part for part in found if not part.exists()), None):
        raise ArtifactError(f"{missing} is missing", f"the GGUF is split into {count} parts", "copy or download that part too")
    return found


def part_name(stem: str, index: int, count: int) -> str:
    """The name of a file of a split model, ``index`` from 0."""
    return f"{stem}-{index + 1:05}-of-{count:05}.gguf"


class _MappedFile:
    """One mapped GGUF file; ``index`` among the parts of its model."""

    def __init__(self, path: Path, index: int = 0) -> None:
        self.path, self.index = path, index
        try:
            with regular(path).open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read", str(error), COPY_AGAIN) from error
        self._at = 0
        try:
            self.metadata, self.tensors = self._header()
        except (struct.error, ValueError, LookupError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged or truncated", f"header ends at byte {self._at} of {self.size}", COPY_AGAIN) from error

    def view(self, info: Info) -> Array:
        return np.frombuffer(self._map, np.uint8, info.size, info.offset)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def _header(self) -> tuple[dict[str, Any], dict[str, Info]]:
        if self._map[:4] != MAGIC:
            refuse_pointer(self.path, self._map[:HEAD_BYTES])
            raise what_file(self.path)
        self._at = 4
        version = self._scalar("<I")
        if version >= 1 << 16:
            raise ArtifactError(f"{self.path} is a big-endian GGUF", "only little-endian files are read", "use the little-endian file")
        if version not in (2, 3):
            raise ArtifactError(f"{self.path} is GGUF version {version}", "versions 2 and 3 are known", "convert the model again")
        tensors, pairs = self._count(), self._count()
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        raw = [(self._string(), self._shape(), self._scalar("<I"), self._scalar("<Q")) for _ in range(tensors)]
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(align)
        base = -(-self._at // align) * align
        return metadata, {name: self._info(name, shape, kind, base + offset) for name, shape, kind, offset in raw}

    def _info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Info:
        if kind not in GGUF_TYPES:
            known = ", ".join(each.name for each in GGUF_TYPES.values())
            found = REFUSED_TYPES.get(kind, f"tensor type {kind}")
            raise ArtifactError(f"{self.path}: {name} is {found}", f"known: {known}", "use a file of these types, such as Q8_0 or Q4_K_M")
        form = GGUF_TYPES[kind]
        size = math.prod(shape) // form.values * form.bytes
        if not shape or min(shape) < 1 or shape[-1] % form.values or offset + size > self.size:
            raise ArtifactError(
                f"{self.path}: {name} {list(shape)} does not fit the file", f"bytes {offset}..{offset + size} of {self.size}", COPY_AGAIN
            )
        return Info(shape, form, offset, size, self.index)

    def _scalar(self, form: str) -> Any:
        value = struct.unpack_from(form, self._map, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _count(self) -> int:
        count: int = self._scalar("<Q")
        if count > self.size - self._at:
            raise IndexError(count)
        return count

    def _string(self) -> str:
        length = self._count()
        text = self._map[self._at : self._at + length].decode()
        self._at += length
        return text

    def _shape(self) -> tuple[int, ...]:
        dimensions = self._scalar("<I")
        if dimensions > 4:
            raise IndexError(dimensions)
        return tuple(reversed([self._scalar("<Q") for _ in range(dimensions)]))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        kind = self._scalar("<I")
        count = self._count()
        if kind not in SCALARS:
            return [self._value(kind) for _ in range(count)]
        values = np.frombuffer(self._map, SCALARS[kind], count, self._at).tolist()
        self._at += count * struct.calcsize(SCALARS[kind])
        return values


def _short(value: float) -> float:
    """The shortest decimal with the same fp32 value: metadata holds 1e-5 as 9.999999747e-06."""
    return float(str(np.float32(value)))


def read_model(file: GgufFile) -> ModelSpec:
    """The model that the metadata describes, absent keys as llama.cpp takes them. Raises :class:`ArtifactError`, naming what is missing or
    not supported."""
    path = file.path
    _refuse(path, file)
    keys = _Keys(path, str(file.metadata["general.architecture"]), file.metadata)
    try:
        family = gguf_families()[keys.family]
        model = family.read(msgspec.convert(_config(keys, file, family), family.config))
        return _as_stored(model, file, _scaling(keys, file))
    except KeyError as error:
        raise ArtifactError(f"{path} lacks {error.args[0]}", "the model cannot be told without it", COPY_AGAIN) from error
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"{path}: the metadata does not make sense", str(error), COPY_AGAIN) from error


def _config(keys: _Keys, file: GgufFile, family: Family) -> dict[str, Any]:
    """The metadata as keys of the family's own config."""
    assert family.gguf is not None
    hidden, heads = keys.number("embedding_length"), keys.number("attention.head_count")
    head_dim = keys.number("attention.key_length", hidden // heads)
    if (size := keys.number("attention.value_length", head_dim)) != head_dim:
        what = f"{keys.path}: values of another length are not supported"
        raise ArtifactError(what, f"{keys.family}.attention.value_length is {size}, heads have {head_dim}", SUPPORTED_MODELS)
    found = {
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.number("context_length"),
        "rope_theta": _short(keys.number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # Of these a file without a window or a cap has no key, whatever the config's own default is.
        "sliding_window": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if (rotated := keys.number("rope.dimension_count", head_dim)) != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    for key, name in ({EPSILONS[0]: "rms_norm_eps"} | family.gguf.keys).items():
        value = keys.data.get(f"{keys.family}.{key}")
        if value is not None:
            found[name] = _short(value) if isinstance(value, float) else value
    if not any(f"{keys.family}.{key}" in keys.data for key in EPSILONS):
        raise KeyError(f"{keys.family}.{EPSILONS[0]}")
    # A window of 0 tokens is none.
    found["sliding_window"] = found["sliding_window"] or None
    return found if family.gguf.facts is None else found | family.gguf.facts(found)


def _as_stored(model: ModelSpec, file: GgufFile, scaling: RopeScaling | None) -> ModelSpec:
    """``model`` with the biases that the file holds, and its ``scaling``, which the rope of sliding layers has not where it is another
    one."""
    biases = {
        name: any(f"blk.0.{each}.bias" in file.tensors for each in names)
        for name, names in (("qkv_bias", ("attn_q", "attn_qkv")), ("out_bias", ("attn_output",)))
    }
    kinds = []
    for kind in model.kinds:
        attention = msgspec.structs.replace(kind.attention, **biases)
        local = len(model.ropes) > 1 and attention.window is not None
        if attention.rope is not None and not local:
            attention = msgspec.structs.replace(attention, rope=msgspec.structs.replace(attention.rope, scaling=scaling))
        mlp = msgspec.structs.replace(kind.mlp, bias="blk.0.ffn_up.bias" in file.tensors)
        kinds.append(msgspec.structs.replace(kind, attention=attention, mlp=mlp))
    return msgspec.structs.replace(model, kinds=tuple(kinds))


def _refuse(path: Path, file: GgufFile) -> None:
    data = file.metadata
    family = data.get("general.architecture")
    if (kind := data.get("general.type", "model")) != "model" or family == "clip":
        what = {"adapter": "a LoRA adapter", "mmproj": "an image encoder (mmproj)"}.get(
            "mmproj" if family == "clip" else str(kind), str(kind)
        )
        raise ArtifactError(f"{path} is {what}, not a model", f"general.type is {kind!r}", "give the GGUF of the language model itself")
    if family not in (known := gguf_families()):
        raise ArtifactError(f"{path}: GGUF architecture {family!r} is not supported", f"known: {', '.join(known)}", SUPPORTED_MODELS)
    if data.get(f"{family}.expert_count"):
        raise ArtifactError(
            f"{path}: a mixture of experts is not read from a GGUF", f"expert_count is {data[f'{family}.expert_count']}", SUPPORTED_MODELS
        )
    if data.get(f"{family}.attention.causal", True) is False:
        raise ArtifactError(f"{path} is a model that makes embeddings", "its attention is not causal", "give one that generates text")


class _Keys(NamedTuple):
    """The metadata keys of a model's own family."""

    path: Path
    family: str
    data: dict[str, Any]

    def number(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, which may be stored once for all layers or once a layer; ``default`` where it is absent.

        Raises KeyError for an absent key without a default, and :class:`ArtifactError` where the layers differ.
        """
        name = f"{self.family}.{key}"
        value = self.data.get(name, default)
        if value is None:
            raise KeyError(name)
        if isinstance(value, list):
            if not value or any(each != value[0] for each in value):
                raise ArtifactError(f"{self.path}: {name} differs from layer to layer", "all layers must have one shape", SUPPORTED_MODELS)
            return value[0]
        return value


def _scaling(keys: _Keys, file: GgufFile) -> RopeScaling | None:
    """llama.cpp's rule: divisors in a tensor hold whatever the keys say; the type is linear where none is named; an old file names its
    factor ``scale_linear``; 0 and 1 scale nothing."""
    kind = keys.data.get(f"{keys.family}.rope.scaling.type", "linear")
    factor = _short(keys.number("rope.scaling.factor", keys.data.get(f"{keys.family}.rope.scale_linear", 0.0)))
    attention = _short(keys.number("rope.scaling.attn_factor", 1.0))
    original = keys.number("rope.scaling.original_context_length", keys.number("context_length"))
    if ROPE_DIVISORS in file.tensors:
        return DivisorScaling(divisors=file.vector(ROPE_DIVISORS))
    if kind == "longrope" or all(name in file.tensors for name in LONG_ROPE):
        short, long = (file.vector(name) for name in LONG_ROPE)
        return LongRopeScaling(short=short, long=long, attention_factor=attention, original_max_position=original)
    if kind not in ("none", "linear", "yarn"):
        raise ArtifactError(f"{keys.path}: rope scaling {kind!r} is not supported", "known: none, linear, yarn, longrope", SUPPORTED_MODELS)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return LinearScaling(factor=factor)
    return YarnScaling(
        factor=factor,
        attention_factor=attention * (1.0 + 0.1 * math.log(factor)),
        original_max_position=original,
        beta_fast=_short(keys.number("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_short(keys.number("rope.scaling.yarn_beta_slow", 1.0)),
    )


class GgufSource:
    """Dequantized weights of a GGUF file, in fp32."""

    def __init__(self, file: GgufFile, model: ModelSpec) -> None:
        """Raises :class:`ArtifactError` naming the first tensor that is missing, misshapen or unknown."""
        self._file, self._head_dim = file, model.head_dim
        form = gguf_families()[file.metadata["general.architecture"]].gguf
        self._interleaved = rotated_rows(model) if form is not None and form.permuted else {}
        self._places, self._plus_one = gguf_places(model), model.norm.plus_one
        wanted = {place.name: place.shape for place in self._places.values()}
        for name, shape in wanted.items():
            if name not in file.tensors:
                raise ArtifactError(f"{file.path} lacks the tensor {name}", "its metadata means a model that has it", COPY_AGAIN)
            if file.tensors[name].shape != shape:
                raise ArtifactError(
                    f"{file.path}: {name} has shape {list(file.tensors[name].shape)}", f"expected {list(shape)}", COPY_AGAIN
                )
        if extra := [name for name in file.tensors if name not in wanted and name not in (ROPE_DIVISORS, *LONG_ROPE)]:
            raise ArtifactError(
                f"{file.path} holds a tensor that the model does not have: {extra[0]}", f"{len(extra)} such tensors", SUPPORTED_MODELS
            )

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        name, row, _ = self._places[tensor.name]
        info = self._file.tensors[name]
        raw, unit = self._file.block_bytes(info), info.format.values
        if tensor.axis == 0 and len(info.shape) > 1:
            values = _dequantize(raw[row + span.start : row + span.stop], info.format)
        else:
            # Read the whole blocks around the span: a slice may start inside a block.
            vector = len(info.shape) == 1
            start, stop = (row + span.start, row + span.stop) if vector else (span.start, span.stop)
            rows = raw if vector else raw[row : row + tensor.shape[0]]
            first, last = start // unit, -(-stop // unit)
            values = _dequantize(rows[:, first:last], info.format)[:, start - first * unit : stop - first * unit]
            values = values.reshape(-1) if vector else values
        if self._plus_one and tensor.name.endswith("norm.weight"):
            values = values - np.float32(1.0)  # llama.cpp adds the 1 that the norms of the family lack
        if rotated := self._interleaved.get(tensor.name):
            values = rotary_halves(values, self._head_dim, rotated)
        return Block(values, "fp32")

    def release(self) -> None:
        self._file.release()


def _dequantize(raw: Array, form: GgufType) -> Array:
    """[rows, values] fp32 of ``raw`` [rows, blocks, bytes], some rows at a time, because a dequantizer's temporaries are several times as
    large as its result."""
    rows, blocks, width = raw.shape
    result = np.empty((rows, blocks * form.values), np.float32)
    step = max(1, _CHUNK // (blocks * form.values))
    for start in range(0, rows, step):
        part = np.ascontiguousarray(raw[start : start + step]).reshape(-1, width)
        result[start : start + step] = form.decode(part).reshape(-1, blocks * form.values)
    return result
