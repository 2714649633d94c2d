"""Quantized weights of a Hugging Face folder: the form in which each linear layer is stored.

Owns the configs of the tools (compressed-tensors, FP8, ModelOpt, AWQ, GPTQ). A folder's tensors decide which layers are quantized, the
config in which form: lists of layers that a tool left alone are spelled in too many ways. A form that would be read wrongly is refused by
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from workers.artifacts.json_file import decode
from workers.artifacts.stored_forms import PackedRows, Scaled, StoredForm, Transposed
from workers.protocol.errors import ArtifactError

#: What ModelOpt writes beside ``config.json``, or in it.
MODELOPT, MODELOPT_METHOD = "hf_quant_config.json", "modelopt"
#: Files in which tools say how they quantized the weights, where ``config.json`` does not: (name, method).
_BESIDE = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
_PLAIN_HINT = "use the unquantized model"


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """``method``: the tool's name. ``forms``: (targets, form); a layer has the form of the first whose targets name it. Targets are names
    of layers, ``re:`` and a pattern, or ``Linear`` for all."""

    method: str
    forms: tuple[tuple[tuple[str, ...], StoredForm], ...]

    def form_of(self, layer: str) -> StoredForm | None:
        """The form of ``layer`` (``model.layers.0.mlp.down_proj``) if it is quantized."""
        return next((form for targets, form in self.forms if any(_names(target, layer) for target in targets)), None)

    @property
    def words(self) -> str:
        """The tool and its forms, for messages."""
        return f"{self.method} ({'; '.join(dict.fromkeys(form.words for _, form in self.forms))})"


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return target == "Linear" or layer == target or layer.endswith(f".{target}")


def read_scheme(folder: Path, config: dict[str, Any]) -> Scheme | None:
    """How the weights of ``folder`` are quantized by its ``config.json`` or the file that a tool left beside it; None: they are not, or
    only TensorRT-LLM reads them (:func:`only_tensorrt_llm`). Raises :class:`ArtifactError` naming a form that is not read."""
    found = _find(folder, config)
    if found is None:
        return None
    path, method, keys = found
    if method == MODELOPT_METHOD:
        return _modelopt(keys)
    if method not in _METHODS:
        known = ", ".join(sorted((*_METHODS, MODELOPT_METHOD)))
        raise ArtifactError(f"{path}: weights quantized with {method!r} are not supported", f"known: {known}", _PLAIN_HINT)
    try:
        return Scheme(method=method, forms=_METHODS[method](keys))
    except (msgspec.ValidationError, re.error) as error:
        raise ArtifactError(f"{path}: the quantization {method!r} does not make sense", str(error), "copy or download it again") from error
    except _RefusedForm as error:
        raise ArtifactError(f"{path}: {method} weights with {error.what} are not supported", error.why, _PLAIN_HINT) from error


def modelopt_algorithm(folder: Path, config: dict[str, Any]) -> str | None:
    """ModelOpt's name of the format of the weights; None where it did not quantize them."""
    found = _find(folder, config)
    algorithm = found[2].get("quant_algo") if found is not None and found[1] == MODELOPT_METHOD else None
    return algorithm if isinstance(algorithm, str) and algorithm != "NO_QUANT" else None


def _find(folder: Path, config: dict[str, Any]) -> tuple[Path, str, dict[str, Any]] | None:
    """(file, method, its keys)."""
    path = folder / "config.json"
    for key in ("quantization_config", "quantization", "compression_config"):
        if raw := config.get(key):
            # MLX writes ``quantization`` without a method, and old releases of compressed-tensors ``compression_config``.
            unnamed = {"quantization": "MLX", "compression_config": "compressed-tensors"}.get(key, "unnamed")
            given: dict[str, Any] = raw if isinstance(raw, dict) else {"quant_method": raw}
            return path, str(given.get("quant_method", unnamed)), given
    if (folder / MODELOPT).is_file():
        keys = decode(folder / MODELOPT, dict[str, Any]).get("quantization")
        return folder / MODELOPT, MODELOPT_METHOD, keys if isinstance(keys, dict) else {}
    for name, method in _BESIDE:
        if (folder / name).is_file():
            keys = decode(folder / name, dict[str, Any])
            return folder / name, str(keys.get("quant_method") or method), keys
    return None


class _RefusedForm(Exception):
    """A form that is not read: ``what`` it is, and ``why``."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why


def _everything(form: StoredForm) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    return ((("Linear",), form),)


def _modelopt(keys: dict[str, Any]) -> Scheme | None:
    form = {"FP8": Scaled(element="fp8", per="tensor"), "FP8_PER_CHANNEL_PER_TOKEN": Scaled(element="fp8", per="row")}.get(
        str(keys.get("quant_algo"))
    )
    return None if form is None else Scheme(method=MODELOPT_METHOD, forms=_everything(form))


class _Fp8(msgspec.Struct):
    weight_block_size: tuple[int, int] | None = None
    fmt: str = "e4m3"


def _fp8(keys: dict[str, Any]) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    found = msgspec.convert(keys, _Fp8)
    if found.fmt not in ("e4m3", "float8_e4m3fn"):
        raise _RefusedForm(f"fmt {found.fmt!r}", "known: e4m3")
    if found.weight_block_size is None:
        return _everything(Scaled(element="fp8", per="tensor"))
    if min(found.weight_block_size) < 1:
        raise _RefusedForm(f"weight_block_size {list(found.weight_block_size)}", "a block has at least one value")
    return _everything(Scaled(element="fp8", scale="weight_scale_inv", per="block", block=found.weight_block_size))


def _fbgemm_fp8(keys: dict[str, Any]) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    return _everything(Scaled(element="fp8", per="row"))


class _Awq(msgspec.Struct):
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    version: str = "gemm"


def _awq(keys: dict[str, Any]) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    found = msgspec.convert(keys, _Awq)
    _refuse_bits(found.bits or found.w_bit or 4, (4,))
    if found.version.lower() != "gemm":
        raise _RefusedForm(f"version {found.version!r}", "known: gemm")
    return _everything(Transposed(bits=4, group=_group(found.group_size or found.q_group_size or 128), awq=True))


class _Gptq(msgspec.Struct):
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    checkpoint_format: str = "gptq"


def _gptq(keys: dict[str, Any]) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    found = msgspec.convert(keys, _Gptq)
    _refuse_bits(found.bits, (2, 4, 8))
    if found.desc_act and found.group_size != -1:
        raise _RefusedForm("desc_act", "its groups are scattered over the inputs, so that ranks cannot share them")
    if found.checkpoint_format not in ("gptq", "gptq_v2"):
        raise _RefusedForm(f"checkpoint_format {found.checkpoint_format!r}", "known: gptq, gptq_v2")
    form = Transposed(bits=found.bits, group=_group(found.group_size), zero_less_one=found.checkpoint_format == "gptq")
    return _everything(form)


class _Weights(msgspec.Struct):
    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    actorder: str | bool | None = None


class _Group(msgspec.Struct):
    targets: list[str]
    weights: _Weights | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _Group] = {}
    format: str = "dense"
    sparsity_config: dict[str, Any] | None = None


def _compressed_tensors(keys: dict[str, Any]) -> tuple[tuple[tuple[str, ...], StoredForm], ...]:
    found = msgspec.convert(keys, _CompressedTensors)
    sparse = (found.sparsity_config or {}).get("format", "dense")
    if sparse != "dense":
        raise _RefusedForm(f"the sparse format {sparse!r}", "known: dense")
    groups = [group for group in found.config_groups.values() if group.weights is not None]
    return tuple((tuple(group.targets), _compressed(group.weights, group.format or found.format)) for group in groups if group.weights)


def _compressed(weights: _Weights, form: str) -> StoredForm:
    if weights.actorder not in (None, False, "static", "weight"):
        raise _RefusedForm(f"actorder {weights.actorder!r}", "its groups are scattered over the inputs")
    strategy = weights.strategy or ("group" if weights.group_size else "tensor")
    per: dict[str, Literal["tensor", "row", "group", "block"]] = {
        "tensor": "tensor", "channel": "row", "group": "group", "block": "block",
    }  # fmt: skip
    if strategy not in per:
        raise _RefusedForm(f"the strategy {strategy!r}", f"known: {', '.join(per)}")
    group = _group(weights.group_size or -1) if strategy == "group" else 0
    if form == "pack-quantized" and weights.type == "int" and strategy in ("group", "channel"):
        _refuse_bits(weights.num_bits, (2, 4, 8))
        return PackedRows(bits=weights.num_bits, group=group, zero=not weights.symmetric)
    elements: dict[tuple[str, str], Literal["fp8", "int8"]] = {
        ("float-quantized", "float"): "fp8", ("naive-quantized", "float"): "fp8",
        ("int-quantized", "int"): "int8", ("naive-quantized", "int"): "int8",
    }  # fmt: skip
    if (form, weights.type) not in elements:
        raise _RefusedForm(f"the format {form!r}", "known: pack-quantized, float-quantized, int-quantized, naive-quantized")
    _refuse_bits(weights.num_bits, (8,))
    return Scaled(
        element=elements[form, weights.type],
        per=per[strategy],
        group=group,
        block=weights.block_structure or (128, 128),
        zero=not weights.symmetric,
    )


def _refuse_bits(bits: int, known: Sequence[int]) -> None:
    if bits not in known:
        raise _RefusedForm(f"{bits} bits", f"known: {', '.join(map(str, known))}")


def _group(size: int) -> int:
    """Inputs of a group; 0 = all inputs of a row, which the tools write as -1."""
    if size == -1:
        return 0
    if size < 1:
        raise _RefusedForm(f"group_size {size}", "it is a number of inputs, or -1")
    return size


#: By ``quant_method``.
_METHODS: dict[str, Callable[[dict[str, Any]], tuple[tuple[tuple[str, ...], StoredForm], ...]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
}
