"""Values of GGUF tensor types: bit for bit those of the format's own package."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.gguf_blocks import FACTORS, random_blocks
from workers.artifacts.gguf_quants import GGUF_TYPES, REFUSED_TYPES

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: GGUF_TYPES[kind].name)
def test_values_are_the_packages_own_to_the_bit(kind: int) -> None:
    type_ = GGUF_TYPES[kind]
    if type_.name in FACTORS:
        stored = random_blocks(type_.name, 24, 1024)
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind))
    else:
        plain = np.random.default_rng(0).standard_normal((24, 1024)).astype(np.float32)
        stored = gguf.quants.quantize(plain, gguf.GGMLQuantizationType(kind))
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind))
    values = type_.decode(stored.view(np.uint8).reshape(-1, type_.bytes))
    assert values.dtype == np.float32 and np.isfinite(values).all() and np.unique(values).size > 9
    assert np.array_equal(values.reshape(24, 1024).view(np.uint32), expected.view(np.uint32))


def test_every_type_of_the_format_is_read_or_refused_by_its_name() -> None:
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert {kind: type_.name for kind, type_ in GGUF_TYPES.items()} | REFUSED_TYPES == known
    assert not GGUF_TYPES.keys() & REFUSED_TYPES.keys()


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: GGUF_TYPES[kind].name)
def test_blocks_have_the_formats_sizes(kind: int) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (GGUF_TYPES[kind].values, GGUF_TYPES[kind].bytes)
