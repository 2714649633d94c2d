"""Hugging Face folders whose layers are stored as other tools store quantized weights, written by the definition of each form.

The writers go from integers and scales to stored tensors, one value at a time where a format packs them: nothing is shared with the reader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class Layer(NamedTuple):
    """A stored weight: its ``tensors`` by suffix, and the ``values`` [out, in] in float64 that they stand for."""

    tensors: Tensors
    values: torch.Tensor


class Tool(NamedTuple):
    """A way to store weights: the keys of ``quantization_config``, and what writes a layer of (out, in)."""

    config: dict[str, Any]
    write: Callable[[torch.Generator, int, int], Layer]


def _scale(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.01 + 0.002).to(dtype)


def _integers(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def pack(integers: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words of unsigned ``integers`` [r, c], packed along ``axis``. ``order``: which of a word's integers lies in its i-th place."""
    each = 32 // bits
    lines = integers if axis == 1 else integers.T
    words = torch.zeros(len(lines), -(-lines.shape[1] // each), dtype=torch.int64)
    for line, values in enumerate(lines.tolist()):
        for word in range(words.shape[1]):
            held = values[word * each : (word + 1) * each]
            for place in range(each):
                source = place if order is None else order[place]
                if source < len(held):
                    words[line, word] |= held[source] << (bits * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return (words if axis == 1 else words.T).contiguous()


def _fp8(generator: torch.Generator, out: int, inputs: int) -> torch.Tensor:
    return (torch.randn(out, inputs, generator=generator) * 2).to(torch.float8_e4m3fn)


def _fp8_tensor(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight, scale = _fp8(generator, out, inputs), _scale(generator, 1)
    return Layer({"weight": weight, "weight_scale": scale.reshape(()), "input_scale": torch.ones(())}, weight.double() * scale.double())


def _fp8_rows(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight, scale = _fp8(generator, out, inputs), _scale(generator, out, 1, dtype=torch.bfloat16)
    return Layer({"weight": weight, "weight_scale": scale}, weight.double() * scale.double())


def _fp8_blocks(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight = _fp8(generator, out, inputs)
    scale = _scale(generator, -(-out // 16), -(-inputs // 32))
    spread = scale.repeat_interleave(16, 0)[:out].repeat_interleave(32, 1)[:, :inputs]
    return Layer({"weight": weight, "weight_scale_inv": scale}, weight.double() * spread.double())


def _int8_rows(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight, scale = _integers(generator, -128, 128, out, inputs).to(torch.int8), _scale(generator, out, 1)
    return Layer({"weight": weight, "weight_scale": scale}, weight.double() * scale.double())


def _int8_zeros(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight, zero = _integers(generator, -128, 128, out, inputs).to(torch.int8), _integers(generator, -9, 9, out, 1).to(torch.int8)
    scale = _scale(generator, out, 1, dtype=torch.float16)
    values = (weight.double() - zero.double()) * scale.double()
    return Layer({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, values)


def _packed(bits: int, group: int, *, zeros: bool) -> Callable[[torch.Generator, int, int], Layer]:
    def write(generator: torch.Generator, out: int, inputs: int) -> Layer:
        half, groups = 1 << (bits - 1), inputs // group if group else 1
        weight = _integers(generator, -half, half, out, inputs)
        scale = _scale(generator, out, groups, dtype=torch.bfloat16)
        zero = _integers(generator, -half, half, out, groups) if zeros else torch.zeros(out, groups, dtype=torch.int64)
        spread = inputs // groups
        values = (weight - zero.repeat_interleave(spread, 1)).double() * scale.repeat_interleave(spread, 1).double()
        tensors = {"weight_packed": pack(weight + half, bits, 1), "weight_scale": scale, "weight_shape": torch.tensor([out, inputs])}
        return Layer(tensors | ({"weight_zero_point": pack(zero + half, bits, 0)} if zeros else {}), values)

    return write


def _awq(generator: torch.Generator, out: int, inputs: int) -> Layer:
    weight, zero = _integers(generator, 0, 16, inputs, out), _integers(generator, 0, 16, inputs // 16, out)
    scale = _scale(generator, inputs // 16, out, dtype=torch.float16)
    values = ((weight - zero.repeat_interleave(16, 0)).double() * scale.repeat_interleave(16, 0).double()).T
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return Layer({"qweight": pack(weight, 4, 1, order), "qzeros": pack(zero, 4, 1, order), "scales": scale}, values)


def _gptq(bits: int, group: int, *, less_one: int) -> Callable[[torch.Generator, int, int], Layer]:
    def write(generator: torch.Generator, out: int, inputs: int) -> Layer:
        size, groups = group or inputs, inputs // (group or inputs)
        weight, zero = _integers(generator, 0, 1 << bits, inputs, out), _integers(generator, less_one, 1 << bits, groups, out)
        scale = _scale(generator, groups, out, dtype=torch.float16)
        values = ((weight - zero.repeat_interleave(size, 0)).double() * scale.repeat_interleave(size, 0).double()).T
        tensors = {"qweight": pack(weight, bits, 0), "qzeros": pack(zero - less_one, bits, 1), "scales": scale}
        return Layer(tensors | {"g_idx": (torch.arange(inputs) // size).to(torch.int32)}, values)

    return write


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
#: By a name for tests.
TOOLS: dict[str, Tool] = {
    "fp8 tensor": Tool({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, _fp8_tensor),
    "fp8 blocks": Tool({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 32]}, _fp8_blocks),
    "fbgemm fp8": Tool({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, _fp8_rows),
    "modelopt fp8": Tool({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}, _fp8_tensor),
    "ct fp8 tensor": Tool(_compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), _fp8_tensor),
    "ct fp8 rows": Tool(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel", dynamic=False, input_activations=_TOKENS), _fp8_rows
    ),
    "ct int8 rows": Tool(_compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), _int8_rows),
    "ct int8 zeros": Tool(_compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False), _int8_zeros),
    "ct int4": Tool(_compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16), _packed(4, 16, zeros=False)),
    "ct int4 zeros": Tool(
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False), _packed(4, 16, zeros=True)
    ),
    "ct int8 packed rows": Tool(_compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), _packed(8, 0, zeros=False)),
    "awq": Tool({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, _awq),
    "gptq": Tool({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}, _gptq(4, 16, less_one=1)),
    "gptq v2": Tool({"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}, _gptq(4, 16, less_one=0)),
    "gptq 8 bits, one group": Tool({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": True}, _gptq(8, 0, less_one=1)),
}


def quantized_folder(plain: Path, folder: Path, tool: Tool, *, keep: tuple[str, ...] = (), seed: int = 0) -> tuple[Path, Path]:
    """(quantized, dequantized): the model of the folder ``plain`` with random weights that ``tool`` stores, and the folder of plain fp32
    weights that mean the same. Layers whose names hold one of ``keep`` stay plain."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(plain / "model.safetensors")
    stored, meant = dict(weights), dict(weights)
    for name, weight in weights.items():
        if not name.startswith("model.layers.") or weight.ndim != 2 or any(part in name for part in keep):
            continue
        layer = tool.write(generator, *weight.shape)
        del stored[name]
        stored |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in layer.tensors.items()}
        meant[name] = layer.values.float().contiguous()
    quantized, dequantized = folder / "quantized", folder / "dequantized"
    for target, tensors in ((quantized, stored), (dequantized, meant)):
        shutil.copytree(plain, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": tool.config}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, dequantized


def numpy_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The array of a stored tensor as the product's reader gives it: bf16 and fp8 as bits."""
    bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()
