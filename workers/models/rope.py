"""Rotary embedding: the angle by which each pair of components is rotated at every position.

Owns the frequency rules (plain, linear, llama3). Must never depend on a request. Component i is paired with component i + dim / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.protocol.specs import ModelSpec, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] fp32, radians for each position.

    The llama3 rule is that of Llama 3.1's reference code: frequencies of long wavelengths are divided by ``factor``, those of short ones
    kept, and those between are blended, linearly in the number of rotations within the original context.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    rotations = scaling.original_max_position * frequencies / (2 * math.pi)
    blend = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_angles(model: ModelSpec, positions: int) -> Tensor:
    """[positions, head_dim / 2] radians, fp32."""
    return torch.outer(torch.arange(positions).float(), inverse_frequencies(model.head_dim, model.rope_theta, model.rope_scaling))
