"""The kernels of an NVIDIA GPU: implements :class:`workers.kernels.Kernels` with functions of the Triton modules. Owns nothing."""

from workers.kernels.attention import paged_attention
from workers.kernels.fused import (
    activate,
    activate_fp8,
    add_layer_norm,
    add_rms_norm,
    add_rms_norm_fp8,
    embed,
    rope_rows,
    rope_store,
    rope_table,
)

__all__ = [
    "activate",
    "activate_fp8",
    "add_layer_norm",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "embed",
    "paged_attention",
    "rope_rows",
    "rope_store",
    "rope_table",
]
