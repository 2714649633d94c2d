"""The prompts of planned requests, made from seeds, so that every run with the same settings sends the same prompts. Pure.

Tokens are counted noise: position i of block b is a hash of (seed, b, i), so that a block is the same wherever a trace shows its id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestrator.loadgen.schedule import BLOCK, PlannedRequest

#: Ids below 256 are in every vocabulary; the first few are often special tokens.
_LOW, _HIGH = 32, 256
#: Ids of blocks without a trace: each request has a different prompt.
_OWN = np.uint64(1 << 63)
#: Words that are one token each in most vocabularies.
_WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his", "but", "at",
    "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all", "her", "she", "there", "would", "their",
    "we", "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so", "up", "said", "what", "its", "about", "than",
    "into", "them", "can", "only", "other", "time", "new", "some",
)  # fmt: skip


def token_ids(planned: PlannedRequest, seed: int) -> list[int]:
    """``planned.input`` ids between 32 and 255."""
    found: list[int] = (_LOW + _noise(planned, seed) % np.uint64(_HIGH - _LOW)).tolist()
    return found


def text(planned: PlannedRequest, seed: int) -> str:
    """``planned.input`` words: about as many tokens."""
    return " ".join(_WORDS[index] for index in (_noise(planned, seed) % np.uint64(len(_WORDS))).tolist())


def _noise(planned: PlannedRequest, seed: int) -> npt.NDArray[np.uint64]:
    """64 random bits a position."""
    positions = np.arange(planned.input, dtype=np.uint64)
    size = np.uint64(BLOCK)
    if planned.blocks:
        ids = np.array(planned.blocks, dtype=np.int64).astype(np.uint64)
        blocks = ids[np.minimum(positions // size, np.uint64(len(ids) - 1)).astype(np.int64)]
    else:
        blocks = np.full(planned.input, _OWN | np.uint64(planned.index), dtype=np.uint64)
    # Positions count through the whole prompt: where a trace lists fewer blocks than the prompt has, the last one still does not repeat.
    return _mix(_mix(blocks ^ _mix(np.full(1, seed % 2**64, dtype=np.uint64))) + positions)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
