"""The rules of a request about single token ids, as a :class:`~workers.sampling.guide.Guide`: ``allowed_token_ids`` and ``bad_words``.

Pure. Like a grammar, the rules use the mask of each step, so no engine's sampler knows them, and they apply before top-k and top-p. A
grammar of the request is an additional rule here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from workers.protocol.messages import SamplingParams
from workers.sampling.definition import stop_set
from workers.sampling.guide import Guide


class TokenRules:
    """The state of one sequence: the mask is that of ``grammar`` (None = no grammar) without the ids that the rules of ``params`` forbid.

    For a bad word of several ids, the last id is forbidden when the output ends with the others; words are searched in the output only. If
    the rules allow no id at all, the output is complete: :meth:`done`. ``stops``: end-of-sequence ids of the model.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, eos_ids: Iterable[int], grammar: Guide | None) -> None:
        self._grammar = grammar
        self._bytes = -(-vocab_size // 32) * 4
        allowed = np.zeros(self._bytes * 8, np.uint8)
        allowed[range(vocab_size) if params.allowed_token_ids is None else list(params.allowed_token_ids)] = 1
        allowed[[word[0] for word in params.bad_words if len(word) == 1]] = 0
        self._allowed = np.packbits(allowed, bitorder="little")
        self._words = [(word[:-1], word[-1]) for word in params.bad_words if len(word) > 1]
        self._longest = max((len(before) for before, _ in self._words), default=0)
        #: Ids that the sampler itself forbids until ``min_tokens`` are emitted: they do not count as allowed ids.
        self._early = [id for id in stop_set(params, eos_ids) if 0 <= id < vocab_size]
        self._min_tokens = params.min_tokens
        self._count = 0
        self._tail: tuple[int, ...] = ()
        self._mask = self._make()

    def mask(self) -> bytes:
        return self._mask.tobytes()

    def advance(self, tokens: Sequence[int]) -> None:
        if not tokens:
            return
        if self._grammar is not None:
            self._grammar.advance(tokens)
        self._count += len(tokens)
        self._tail = (*self._tail, *tokens)[-self._longest :] if self._longest else ()
        self._mask = self._make()

    def done(self) -> bool:
        return (self._grammar is not None and self._grammar.done()) or not self._mask.any()

    def _make(self) -> np.ndarray:
        mask = self._allowed.copy()
        last = [id for before, id in self._words if self._tail[len(self._tail) - len(before) :] == before]
        if self._count < self._min_tokens:
            last += self._early
        for id in last:
            mask[id >> 3] &= ~np.uint8(1 << (id & 7))
        if self._grammar is not None:
            mask &= np.frombuffer(self._grammar.mask(), np.uint8)
        return mask
