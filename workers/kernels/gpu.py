"""The kernels of an NVIDIA GPU: implements :class:`workers.kernels.Kernels` with functions of the Triton modules. Owns nothing."""

from workers.kernels.attention import paged_attention
from workers.kernels.fused import (
    add_rms_norm,
    add_rms_norm_fp8,
    embed,
    rope_rows,
    rope_store,
    rope_table,
    silu_mul,
    silu_mul_fp8,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fp8",
    "embed",
    "paged_attention",
    "rope_rows",
    "rope_store",
    "rope_table",
    "silu_mul",
    "silu_mul_fp8",
]
