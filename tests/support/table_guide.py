"""A Guide over a list of allowed texts (kind ``choice``), in byte tokens: enough grammar to test the batch's side of the seam."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from workers.protocol.errors import EngineFault, Rejected
from workers.protocol.messages import GuideSpec
from workers.sampling.guide import Guide

VOCAB = 320


class TableGuide:
    def __init__(self, texts: list[bytes]) -> None:
        self._texts = texts
        self._taken = b""

    def _next(self, taken: bytes) -> set[int]:
        return {text[len(taken)] for text in self._texts if text.startswith(taken) and len(text) > len(taken)}

    def mask(self) -> bytes:
        allowed = np.zeros(VOCAB, dtype=np.uint8)
        allowed[list(self._next(self._taken))] = 1
        return np.packbits(allowed, bitorder="little").tobytes()

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token not in self._next(self._taken):
                raise EngineFault(f"the grammar does not allow token {token} here")
            self._taken += bytes([token])

    def done(self) -> bool:
        return self._taken in self._texts


def table_guides(spec: GuideSpec) -> Guide:
    if spec.kind != "choice":
        raise Rejected(f"a table knows no {spec.kind}", code="invalid_schema")
    return TableGuide([text.encode() for text in json.loads(spec.text)])
