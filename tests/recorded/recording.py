"""Compares a text with its recording under ``data/<area>/``, and masks what differs from run to run. Writes nothing."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data"
ROOT = Path(__file__).resolve().parent.parent.parent
MASK = "<masked>"
#: The boxes that help texts are drawn with.
_BOXES = str.maketrans({"─": "-", "│": "|"} | dict.fromkeys("╭╮╰╯├┤", "+"))
#: Ids and times that are new in every run, and what stands in their place.
_NEW_EACH_TIME = (
    (re.compile(r"\b(chatcmpl|cmpl|infer)-[0-9a-f]{32}"), r"\1-<id>"),
    (re.compile(r"\bcall_[0-9a-f]{24}"), "call_<id>"),
    (re.compile(r'"created":\d+'), '"created":<time>'),
)


def as_json(value: Any) -> str:
    """One key or item a line, so that a diff can be read."""
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


def as_text(text: str) -> str:
    """Boxes are drawn with ASCII, any other character becomes an escape, and the text ends with one line end."""
    return text.rstrip("\n").translate(_BOXES).encode("ascii", "backslashreplace").decode() + "\n"


def masked(text: str, places: Mapping[str, str] | None = None) -> str:
    """``text`` without ids and times. ``places``: text -> what to show for it, such as a temporary folder."""
    for pattern, shown in _NEW_EACH_TIME:
        text = pattern.sub(shown, text)
    for found, shown in (places or {}).items():
        text = text.replace(found, shown)
    return text


def without(value: Any, names: Iterable[str]) -> Any:
    """A JSON value in which every key of ``names``, at any depth, has the mask as its value."""
    hidden = frozenset(names)
    if isinstance(value, dict):
        return {key: MASK if key in hidden else without(inner, hidden) for key, inner in value.items()}
    return [without(inner, hidden) for inner in value] if isinstance(value, list) else value


def recorded(area: str) -> dict[str, str]:
    """File name -> text of all that is recorded of an area."""
    return {file.name: file.read_text() for file in sorted((FOLDER / area).glob("*"))}


def check(area: str, name: str, now: str) -> None:
    """Fails with a diff where ``now`` is not what is recorded."""
    file = FOLDER / area / name
    how = f"if this change is wanted: python -m tests.recorded.record {area}"
    assert file.exists(), f"{file} is not there; {how}"
    then = file.read_text()
    if then != now:
        lines = difflib.unified_diff(then.splitlines(), now.splitlines(), "recorded", "now", lineterm="")
        raise AssertionError("\n".join([f"{file.relative_to(ROOT)} differs; {how}", *lines]))


def check_names(area: str, now: Iterable[str]) -> None:
    """Fails where something is recorded that is no longer there, or the reverse."""
    missing, gone = set(now) - recorded(area).keys(), recorded(area).keys() - set(now)
    assert not missing and not gone, f"not recorded: {sorted(missing)}; gone: {sorted(gone)}; python -m tests.recorded.record {area}"
