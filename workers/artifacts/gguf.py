"""GGUF files: header, metadata as a ModelSpec, and dequantized weights as a Source.

Reads F32, F16, Q8_0 and Q4_1 by blocks with numpy; only the rows or blocks of a slice are touched. Undoes the row permutation that
llama-family GGUFs apply to q and k for interleaved rotary embedding. Sizes and counts of the header are bounded by the file before use.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from workers.artifacts.number_formats import Array
from workers.artifacts.safetensors_file import COPY_AGAIN, SUPPORTED_MODELS, regular
from workers.artifacts.source import CHUNK, Block
from workers.layout.sharding import EMBEDDING, FINAL_NORM, HEAD, ModelTensor, Span, whole_tensors
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import ModelSpec

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
#: Common tensor types that are not supported, by their usual names.
REFUSED = {2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"}
#: ``general.architecture`` values whose q and k rows are stored permuted.
PERMUTED = ("llama",)
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Format(NamedTuple):
    """A tensor type: values a block, bytes a block, and the dequantizer of [blocks, bytes] uint8 into [blocks, values] fp32."""

    name: str
    values: int
    bytes: int
    decode: Callable[[Array], Array]


def _plain(dtype: str) -> Callable[[Array], Array]:
    return lambda blocks: blocks.view(dtype).astype(np.float32)


def _q8_0(blocks: Array) -> Array:
    return blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_1(blocks: Array) -> Array:
    scale, low = (blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
    nibbles = blocks[:, 4:]
    # The low nibbles are the block's first half, the high ones its second.
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) * scale + low


FORMATS = {
    0: Format("F32", 1, 4, _plain("<f4")),
    1: Format("F16", 1, 2, _plain("<f2")),
    3: Format("Q4_1", 32, 20, _q4_1),
    8: Format("Q8_0", 32, 34, _q8_0),
}


class Info(NamedTuple):
    """A tensor of the file: numpy shape (rows first), format, offset from the start of the file, bytes."""

    shape: tuple[int, ...]
    format: Format
    offset: int
    size: int


class GgufFile:
    """A mapped GGUF file: ``metadata`` and ``tensors``. Raises :class:`ArtifactError` for a file that is damaged or not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def block_bytes(self, info: Info) -> Array:
        """[rows, blocks a row, bytes a block] uint8 view of a tensor."""
        blocks = info.shape[-1] // info.format.values
        rows = math.prod(info.shape[:-1])
        return np.frombuffer(self._map, np.uint8, info.size, info.offset).reshape(rows, blocks, info.format.bytes)

    def release(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def _header(self) -> tuple[dict[str, Any], dict[str, Info]]:
        if self._map[:4] != MAGIC:
            raise ArtifactError(
                f"{self.path} is not a GGUF file", "its first bytes are not GGUF", "give a GGUF, a folder or a model's name"
            )
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ArtifactError(f"{self.path} is GGUF version {version}", "versions 2 and 3 are known", COPY_AGAIN)
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
        if kind not in FORMATS:
            known = ", ".join(f.name for f in FORMATS.values())
            found = REFUSED.get(kind, f"tensor type {kind}")
            raise ArtifactError(f"{self.path}: {name} is {found}", f"known: {known}", "use a file of one of these types, such as Q8_0")
        form = FORMATS[kind]
        size = math.prod(shape) // form.values * form.bytes
        if not shape or min(shape) < 1 or shape[-1] % form.values or offset + size > self.size:
            raise ArtifactError(
                f"{self.path}: {name} {list(shape)} does not fit the file", f"bytes {offset}..{offset + size} of {self.size}", COPY_AGAIN
            )
        return Info(shape, form, offset, size)

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
    """The model that the metadata describes. Raises :class:`ArtifactError`, naming what is missing or not supported."""
    data, path = file.metadata, file.path
    family = data.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ArtifactError(f"{path}: GGUF architecture {family!r} is not supported", "known: llama, qwen2, qwen3", SUPPORTED_MODELS)
    if data.get(f"{family}.expert_count"):
        raise ArtifactError(
            f"{path}: mixture of experts is not supported", f"expert_count is {data[f'{family}.expert_count']}", SUPPORTED_MODELS
        )
    if "rope_freqs.weight" in file.tensors:
        raise ArtifactError(f"{path} carries its own rotary frequencies", "Llama 3.1 scaling is not in the metadata", "use the safetensors")
    try:
        hidden, heads = data[f"{family}.embedding_length"], data[f"{family}.attention.head_count"]
        head_dim = data.get(f"{family}.attention.key_length", hidden // heads)
        if data.get(f"{family}.rope.dimension_count", head_dim) != head_dim:
            raise ArtifactError(f"{path}: partial rotary embedding is not supported", f"it covers less than {head_dim}", SUPPORTED_MODELS)
        facts = {
            "architecture": family,
            "hidden_size": hidden,
            "intermediate_size": data[f"{family}.feed_forward_length"],
            "num_layers": data[f"{family}.block_count"],
            "num_heads": heads,
            "num_kv_heads": data.get(f"{family}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "max_position": data[f"{family}.context_length"],
            "rms_norm_eps": _short(data[f"{family}.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _short(data.get(f"{family}.rope.freq_base", 10000.0)),
            "rope_scaling": _scaling(path, family, data),
            "tied_embeddings": "output.weight" not in file.tensors,
            "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
            "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        }
        return msgspec.convert(facts, ModelSpec)
    except KeyError as error:
        raise ArtifactError(f"{path} lacks {error.args[0]}", "the model cannot be told without it", COPY_AGAIN) from error
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"{path}: the metadata does not make sense", str(error), COPY_AGAIN) from error


def _scaling(path: Path, family: str, data: dict[str, Any]) -> dict[str, Any] | None:
    kind = data.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ArtifactError(f"{path}: rope scaling {kind!r} is not supported", "known: none, linear", SUPPORTED_MODELS)
    return {"kind": "linear", "factor": _short(data[f"{family}.rope.scaling.factor"])}


def stored_name(tensor: str) -> str:
    """The GGUF name of the whole tensor whose Hugging Face name is ``tensor``."""
    fixed = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
    if tensor in fixed:
        return fixed[tensor]
    layer, rest = tensor.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[stem]}.{kind}"


class GgufSource:
    """Dequantized weights of a GGUF file, in fp32."""

    def __init__(self, file: GgufFile, model: ModelSpec) -> None:
        """Raises :class:`ArtifactError` naming the first tensor that is missing, misshapen or unknown."""
        self._file, self._head_dim = file, model.head_dim
        self._permuted = file.metadata["general.architecture"] in PERMUTED
        wanted = {stored_name(name): tensor for name, tensor in whole_tensors(model).items()}
        for name, tensor in wanted.items():
            if name not in file.tensors:
                raise ArtifactError(f"{file.path} lacks the tensor {name}", "its metadata means a model that has it", COPY_AGAIN)
            if file.tensors[name].shape != tensor.shape:
                raise ArtifactError(
                    f"{file.path}: {name} has shape {list(file.tensors[name].shape)}", f"expected {list(tensor.shape)}", COPY_AGAIN
                )
        if extra := [name for name in file.tensors if name not in wanted]:
            raise ArtifactError(
                f"{file.path} holds a tensor that the model does not have: {extra[0]}", f"{len(extra)} such tensors", SUPPORTED_MODELS
            )

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        info = self._file.tensors[stored_name(tensor.name)]
        raw, unit = self._file.block_bytes(info), info.format.values
        if tensor.axis == 1 or len(info.shape) == 1:
            # Read the whole blocks around the span: a slice may start inside a block.
            first, last = span.start // unit, -(-span.stop // unit)
            values = _dequantize(raw[:, first:last], info.format)[:, span.start - first * unit : span.stop - first * unit]
            values = values if tensor.axis == 1 else values.reshape(-1)
        else:
            values = _dequantize(raw[span.start : span.stop], info.format)
        if self._permuted and (".q_proj." in tensor.name or ".k_proj." in tensor.name):
            values = _unpermute(values, self._head_dim)
        return Block(values, "fp32")

    def release(self) -> None:
        self._file.release()


def _dequantize(raw: Array, form: Format) -> Array:
    """[rows, values] fp32 of ``raw`` [rows, blocks, bytes], some rows at a time: a dequantizer's temporaries are several times its
    result."""
    rows, blocks, width = raw.shape
    result = np.empty((rows, blocks * form.values), np.float32)
    step = max(1, CHUNK // (blocks * form.values))
    for start in range(0, rows, step):
        part = np.ascontiguousarray(raw[start : start + step]).reshape(-1, width)
        result[start : start + step] = form.decode(part).reshape(-1, blocks * form.values)
    return result


def _unpermute(values: Array, head_dim: int) -> Array:
    """Reorder rows of whole heads from interleaved rotary order (pairs side by side) to halves (component i paired with i + dim / 2)."""
    paired = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
