"""Reported log-probabilities by their definition, in float64: what the sampler's and the prompt's are compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def logprobs_of(logits_row: npt.ArrayLike, token: int, count: int) -> tuple[float, list[int], list[float]]:
    """Reported log-probabilities: log-softmax of the *raw* logits, before bias, penalties, mask and temperature.

    Returns ``token``'s own, then the ``count`` best ids in falling order (ties by id) and theirs.
    """
    logits = np.asarray(logits_row, dtype=np.float64)
    top = logits.max()
    scores = logits - (top + np.log(np.exp(logits - top).sum()))
    best = np.lexsort((np.arange(scores.size), -scores))[:count]
    return float(scores[token]), best.tolist(), scores[best].tolist()
