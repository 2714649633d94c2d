"""A writer that follows a guide: random output of a grammar, byte by byte, over the tiny tokenizer."""

from __future__ import annotations

import random

import numpy as np

from tests.support.tiny_models import IM_END
from workers.sampling.definition import allowed_ids
from workers.sampling.guide import Guide

#: Size of the model's vocabulary; the tokenizer has 259 ids.
VOCAB = 320


def allowed(guide: Guide) -> list[int]:
    mask = guide.mask()
    assert len(mask) == 4 * -(-VOCAB // 32)
    return np.flatnonzero(allowed_ids(mask, VOCAB)).tolist()


def write(guide: Guide, seed: int, longest: int = 400) -> bytes:
    """A random output that follows the masks; every byte is its own token. Structure comes first, so that open-ended strings and lists
    come to an end: half of the time the output closes what can be closed."""
    chooser, out = random.Random(seed), b""
    while not guide.done() and len(out) < longest:
        options = allowed(guide)
        closing = next((token for token in (IM_END, *b'}]"') if token in options), None)
        token = closing if closing is not None and chooser.random() < 0.5 else chooser.choice(options)
        guide.advance([token])
        if token == IM_END:
            break
        out += bytes([token])
    return out


def fits(guide: Guide, text: str) -> bool:
    """Whether a grammar takes ``text`` as a whole output."""
    for token in text.encode():
        if token not in allowed(guide):
            return False
        guide.advance([token])
    return guide.done() or IM_END in allowed(guide)
