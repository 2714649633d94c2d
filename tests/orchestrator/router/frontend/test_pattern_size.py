"""The size of a pattern's automaton, estimated from its text."""

from __future__ import annotations

import pytest

from orchestrator.router.frontend.pattern_size import MAX_PATTERN, PatternTooLarge, check_pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        r"^(?:urn:uuid:)?[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
        r"^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}$",
        r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*$",
        r"^\w+([.-]?\w+)*@\w+([.-]?\w+)*(\.\w{2,3})+$",
        r"^(?=.{1,64}@)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*@[^-][A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(\.[A-Za-z]{2,})$",
        r"^.{1,5000}$", r"[a-z]{1,5000}[0-9]{1,5000}\n.{0,100000}", r"^(\d{1,3}\.){3}\d{1,3}$", r"^(?:[0-9A-F]{2}[:-]){5}[0-9A-F]{2}$",
        r"(\+\d{1,3})?\s?\(?\d{1,4}\)?[\s.-]?\d{3}[\s.-]?\d{4}", r"[\]{9999}x]{60}[^]{9999}]{70}\{9999\}{80}",
        r"(a{10}|b{10}){100}", "(", ")", "a{", "{2}", "[",
    ],
)  # fmt: skip
def test_neighbours_add(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a{100}){100}", r"((a{1,30}){1,30}){1,30}", r"(?:x(?P<n>y[ab]{64})z){64,}", r"(a{50}b{50}){50}", r"(\({100}\)){100}",
        r"([)]{100}){100}",
        r"a{9999999999999}", r"(a+)+$", r"((?:[a-z]*))*", r"(\d+){1,}", "", "a" * (MAX_PATTERN + 1),
    ],
)  # fmt: skip
def test_only_nested_repeats_multiply(pattern: str) -> None:
    with pytest.raises(PatternTooLarge):
        check_pattern(pattern)
