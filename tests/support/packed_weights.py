"""Random weights in each packed number format."""

from __future__ import annotations

import torch

from workers.artifacts.number_formats import FP8_MAX
from workers.layout.quant_parts import parts_of
from workers.protocol.specs import Quant

Weights = dict[str, torch.Tensor]


def random_parts(quant: Quant, outs: int, ins: int, seed: int = 0) -> Weights:
    """Parts of a weight [outs, ins], by the packed form's own definition."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for part in parts_of(quant, "fp32"):
        shape = part.shape(outs, ins)
        if part.format in ("int8", "uint8"):
            low, high = (-127, 128) if part.format == "int8" else (0, 256)
            found[part.suffix] = torch.randint(low, high, shape, generator=generator, dtype=torch.int16).to(getattr(torch, part.format))
        elif part.format == "fp8":
            found[part.suffix] = torch.randn(shape, generator=generator).mul_(50).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        else:
            values = torch.rand(shape, generator=generator).add_(0.5).mul_(0.01)
            found[part.suffix] = values.to(torch.bfloat16) if part.format == "bf16" else values
    return found
