"""How large the automaton of a regular expression can become, estimated from its text.

Neighbours add and only nested repeats multiply: ``[0-9a-f]{8}-[0-9a-f]{4}`` has 13 positions, ``(a{100}){100}`` has 10,000. It never judges
whether a pattern is well formed: the compiler of the grammar does that.
"""

from __future__ import annotations

import re

import msgspec

MAX_PATTERN = 2048
#: Positions of a pattern, where no counted repeat stands in another one: such repeats are counted while the text is matched.
MAX_POSITIONS = 1 << 20
#: Positions of a counted repeat that has another one inside: the matcher may be in every combination of their counts.
MAX_NESTED = 4096

_ATOM = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|.", re.DOTALL)
_REPEAT = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
_GROUP = re.compile(r"\((?:\?(?:P?<\w+>|[\w-]*:|[=!]|<[=!]|[\w-]+(?=\))))?")


class _Part(msgspec.Struct):
    """A piece of a pattern. ``positions``: its atoms, each as often as counted repeats copy it. ``counted``: it holds a counted repeat.
    ``loop``: it is one atom under an unbounded repeat, and nothing else."""

    positions: int = 0
    counted: bool = False
    loop: bool = False


class PatternTooLarge(Exception):
    """The pattern's automaton may become too large; the text says why."""


def check_pattern(pattern: str) -> None:
    """Raises :class:`PatternTooLarge`."""
    if not 1 <= len(pattern) <= MAX_PATTERN:
        raise PatternTooLarge(f"a pattern has 1 to {MAX_PATTERN} characters")
    open_groups: list[_Part] = []
    current = _Part()
    at = 0
    while at < len(pattern):
        if pattern[at] == "(":
            group = _GROUP.match(pattern, at)
            assert group is not None
            at = group.end()
            open_groups.append(current)
            current = _Part()
            continue
        if pattern[at] == ")" and open_groups:
            part, current = current, open_groups.pop()
            at += 1
        else:
            atom = _ATOM.match(pattern, at)
            assert atom is not None
            part = _Part(positions=1)
            at = atom.end()
        repeat = _REPEAT.match(pattern, at)
        if repeat is not None:
            part = _repeated(part, repeat)
            at = repeat.end()
        current = _joined(current, part)
    while open_groups:
        current = _joined(open_groups.pop(), current)


def _repeated(part: _Part, repeat: re.Match[str]) -> _Part:
    low, comma, high = repeat.groups()
    counted = low is not None and bool(low or high)
    unbounded = repeat[0][0] in "*+" or (counted and bool(comma) and not high)
    if part.loop and unbounded:
        # It matches what the inner repeat matches, and it makes some matchers explode.
        raise PatternTooLarge("a repeat of a single repeated item matches nothing more; repeat it once")
    copies = max(1, int((high or low)[:9])) if counted else 1
    positions = part.positions * copies
    if copies > 1 and part.counted and positions > MAX_NESTED:
        raise PatternTooLarge(f"the pattern's nested repeats multiply to {positions} positions, more than {MAX_NESTED}")
    return _Part(positions=positions, counted=part.counted or copies > 1, loop=unbounded and part.positions == 1)


def _joined(left: _Part, right: _Part) -> _Part:
    """Two neighbours or alternatives."""
    positions = left.positions + right.positions
    if positions > MAX_POSITIONS:
        raise PatternTooLarge(f"the pattern's repeats add up to more than {MAX_POSITIONS} positions")
    return _Part(positions=positions, counted=left.counted or right.counted, loop=right.loop and not left.positions)
