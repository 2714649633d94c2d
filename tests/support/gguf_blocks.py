"""Random blocks of every quantized GGUF tensor type, also of those that the format's own package cannot write."""

from __future__ import annotations

import numpy as np

#: At which bytes of a block its fp16 factors are.
FACTORS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, *, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """[rows, bytes] uint8: a tensor of type ``kind`` [rows, columns] of random bits and finite factors. ``spread``: the standard deviation
    of its values; 0 = factors of either sign, zeros and denormal ones among them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    rng, type_ = np.random.default_rng(seed), GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[type_]
    blocks = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    factors = FACTORS[kind]
    if spread:
        _factors(blocks, factors, np.float16(1) if factors else 127)
        ratio = spread / float(dequantize(blocks, type_).std())
        _factors(blocks, factors, np.float16(ratio) if factors else 127 + round(np.log2(ratio)))
    elif factors:
        _factors(
            blocks, factors, (rng.standard_normal((len(blocks), 1)) * rng.choice([0, 1e-7, 1, 30], (len(blocks), 1))).astype(np.float16)
        )
    else:
        _factors(blocks, factors, rng.integers(0, 240, (len(blocks), 1)).astype(np.uint8))
        blocks[:2, 0] = (0, 1)
    return blocks.reshape(rows, -1)


def _factors(blocks: np.ndarray, at: tuple[int, ...], value: object) -> None:
    """Set every factor of every block: fp16 ones at ``at``, or the exponent in the first byte."""
    for start in at:
        blocks[:, start : start + 2] = np.broadcast_to(np.asarray(value, "<f2"), (len(blocks), 1)).copy().view(np.uint8)
    if not at:
        blocks[:, :1] = np.broadcast_to(np.asarray(value, np.uint8), (len(blocks), 1))
