"""Rotary embedding: the angle by which each pair of components is rotated at every position.

Owns the frequency rules (plain, linear, llama3, yarn, longrope, divisors). Must never depend on a request.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.protocol.specs import DivisorScaling, LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling


def inverse_frequencies(rope: RopeSpec, positions: int) -> Tensor:
    """[dim / 2] fp32, radians for each position; ``positions``: tokens of the longest sequence.

    The llama3 rule is that of Llama 3.1's reference code: frequencies of long wavelengths are divided by ``factor``, those of short ones
    kept, and those between are blended, linearly in the number of rotations within the original context. LongRoPE's long divisors hold
    for all positions as soon as a sequence may be longer than the original context: keys that are cached cannot be rotated again.
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim))
    scaling = rope.scaling
    match scaling:
        case None:
            return frequencies
        case LinearScaling():
            return frequencies / scaling.factor
        case Llama3Scaling():
            rotations = scaling.original_max_position * frequencies / (2 * math.pi)
            blend = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
            return (1 - blend) * frequencies / scaling.factor + blend * frequencies
        case YarnScaling():
            return _yarn(rope, scaling, frequencies)
        case LongRopeScaling():
            factors = scaling.long if positions > scaling.original_max_position else scaling.short
            return frequencies / torch.tensor(factors)
        case DivisorScaling():
            return frequencies / torch.tensor(scaling.divisors)


def _yarn(rope: RopeSpec, scaling: YarnScaling, frequencies: Tensor) -> Tensor:
    """https://arxiv.org/abs/2309.00071, section 3.2."""

    def component(rotations: float) -> float:
        """The (fractional) pair that turns ``rotations`` times within the original context."""
        return rope.dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = component(scaling.beta_fast), component(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2).float() - low) / (high - low if high > low else 0.001)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def attention_factor(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied by."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0


def rope_angles(rope: RopeSpec, positions: int) -> Tensor:
    """[positions, dim / 2] radians, fp32."""
    return torch.outer(torch.arange(positions).float(), inverse_frequencies(rope, positions))
