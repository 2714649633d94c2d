"""Mutations of good requests, all from one seed: bytes that flip, vanish and repeat, and values that were never meant to be there.

Owns the random numbers, so that a failure comes back with its seed and number.
"""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import msgspec

#: Values that programs do not expect; the second group exists in msgpack only.
EDGES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 319, 320, 1023, 1025, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 0.5,
    1e-320, 1e308, "", "a", "\0", "\n", "\u202e", "\ud7ff", "🙂", "x" * 300, "../../etc/passwd", "%s%n", "{{7*7}}", "<|im_end|>", [], {},
    [[]], [{}], {"": None}, ["a", 1], [-1], [0] * 100, {"$ref": "#"}, {"type": "object"},
)  # fmt: skip
WIRE_EDGES: tuple[Any, ...] = (*EDGES, math.nan, math.inf, -math.inf, b"", b"\xff", msgspec.msgpack.Ext(1, b"x"))
#: Bytes that mean something to a parser here or there.
TOKENS = (
    b"\r\n", b"\r\n\r\n", b"\n", b"\0", b"\xff", b":", b" ", b"{", b"}", b"[", b"]", b'"', b",", b"\\u0000", b"\\ud800", b"1e999", b"-0",
    b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n", b"HTTP/1.1", b"%00", b"\xc1", b"\xc7", b"\xdd\xff\xff\xff\xff",
)  # fmt: skip


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bytes(self, data: bytes) -> bytes:
        """``data`` after one to four small accidents."""
        found = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            self._accident(found)
        return bytes(found)

    def _accident(self, data: bytearray) -> None:
        pick, size = self.random, len(data)
        at = pick.randrange(size + 1)
        kind = pick.randrange(8)
        if kind == 0 and size:
            data[at % size] ^= 1 << pick.randrange(8)
        elif kind == 1 and size:
            data[at % size] = pick.randrange(256)
        elif kind == 2:
            data[at:at] = pick.randbytes(pick.randint(1, 8))
        elif kind == 3:
            data[at:at] = pick.choice(TOKENS)
        elif kind == 4:
            del data[at : at + pick.randint(1, 16)]
        elif kind == 5:
            data[at:at] = data[at : at + pick.randint(1, 64)]
        elif kind == 6 and pick.random() < 0.3:
            del data[at:]
        elif kind == 7:
            other = pick.randrange(size + 1)
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]

    def tree(self, value: Any, edges: tuple[Any, ...] = EDGES) -> Any:
        """``value``, made of dicts and lists, changed in one to three places; it is taken apart, so give a copy."""
        for _ in range(self.random.randint(1, 3)):
            value = self._touch(value, edges)
        return value

    def _touch(self, value: Any, edges: tuple[Any, ...]) -> Any:
        """Go down by chance and change what is there."""
        pick = self.random
        if isinstance(value, dict) and value and pick.random() < 0.9:
            key = pick.choice(list(value))
            kind = pick.randrange(10)
            if kind == 0:
                del value[key]
            elif kind == 1:
                value[str(pick.choice(edges))[:40]] = self._edge(edges)
            else:
                value[key] = self._touch(value[key], edges)
            return value
        if isinstance(value, list) and value and pick.random() < 0.9:
            at = pick.randrange(len(value))
            kind = pick.randrange(10)
            if kind == 0:
                del value[at]
            elif kind == 1:
                value.insert(at, self._edge(edges))
            elif kind == 2:
                value *= 2
            else:
                value[at] = self._touch(value[at], edges)
            return value
        kind = pick.randrange(10)
        if kind == 0:
            return [value]
        if kind == 1:
            return {"a": value}
        if kind == 2 and isinstance(value, int):
            return value + pick.choice((-1, 1, 2**32))
        if kind == 3 and isinstance(value, str):
            return value * 3
        return self._edge(edges)

    def _edge(self, edges: tuple[Any, ...]) -> Any:
        """One of them; a container is a copy, for it may be changed next."""
        found = self.random.choice(edges)
        return copy.deepcopy(found) if isinstance(found, list | dict) else found
