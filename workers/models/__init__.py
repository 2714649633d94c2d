"""Model code: one pipeline stage of a decoder, its layers and its rotary embedding, over :mod:`workers.kernels`."""
