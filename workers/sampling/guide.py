"""The Guide protocol: a grammar that the output must follow.

Pure; ``workers.sampling.llguidance_guide`` implements it with llguidance, tests with a table. The scheduler of one leader owns a guide;
when a sequence continues on another replica, its guide is rebuilt from the emitted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from workers.protocol.messages import GuideSpec


class Guide(Protocol):
    """The state of one sequence's grammar."""

    def mask(self) -> bytes:
        """Packed bitmask of the allowed next ids: bit ``i % 32`` of little-endian uint32 word ``i // 32``; ceil(vocab / 32) words."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Consume tokens, including the one that ends the output. Raises :class:`~workers.protocol.errors.EngineFault` if the grammar does
        not allow them, or has become too large to follow."""

    def done(self) -> bool:
        """Whether the output is complete and only an end-of-sequence token could follow."""


#: Compiles a grammar; raises :class:`~workers.protocol.errors.Rejected` (code ``invalid_schema``) for an invalid one.
GuideFactory = Callable[[GuideSpec], Guide]
