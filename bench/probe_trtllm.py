"""Compares the backends' use of TensorRT-LLM with an installed package: every name, keyword, attribute, method and enum member.

python -m bench.probe_trtllm

The uses come from the backends' source, as in the contract test. Prints a line for each one that is missing or cannot be checked from
outside, and a summary as JSON; exit code 1 if one is missing, 4 if there is no TensorRT-LLM.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import workers.engines.trtllm
from tests.support.trtllm_contract import PYTHON, Reader

BACKENDS = ("executor.py", "llmapi.py")
NOT_HERE = 4
Verdict = Literal["there", "missing", "untold"]


def uses() -> list[str]:
    """``a.b.Class``, ``a.b.Class.member``, ``a.b.call(keyword=)``: everything that the backends' source uses, as far as its type is
    known."""
    folder = Path(workers.engines.trtllm.__file__).parent
    seen = set().union(*(Reader((folder / name).read_text()).seen for name in BACKENDS))
    return sorted(importable(use) for use in seen if re.fullmatch(r"[\w.]+(\(\w+=\))?", use))


def importable(use: str) -> str:
    """The same use, with the module from which the class is imported, if another module defines it."""
    for name, entry in PYTHON.items():
        if "import_from" in entry and re.match(rf"{re.escape(name)}(?!\w)", use):
            return f"{entry['import_from']}.{name.rpartition('.')[2]}{use.removeprefix(name)}"
    return use


def find(name: str) -> tuple[Any, list[str]]:
    """(the object for the longest importable prefix of a dotted name, the remaining parts)."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        while cut < len(parts) and hasattr(found, parts[cut]):
            found, cut = getattr(found, parts[cut]), cut + 1
        return found, parts[cut:]
    return None, parts


def keywords(thing: Any) -> set[str] | None:
    """The keywords that a callable accepts; None if it has no signature."""
    for table in ("model_fields", "__dataclass_fields__"):
        if hasattr(thing, table):
            return set(getattr(thing, table))
    told = getattr(thing.__init__ if inspect.isclass(thing) else thing, "__doc__", "") or ""
    if re.search(r"\(self(: |, |\))", told):  # how bindings write their signatures
        return set(re.findall(r"(\w+): ", told))
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(each.kind is each.VAR_KEYWORD for each in parameters) else {each.name for each in parameters}


def judge(use: str) -> Verdict:
    """Whether the installed package has it. Attributes that a Python class sets in its constructor cannot be seen on the class."""
    name, _, keyword = use.rstrip(")=").partition("(")
    thing, left = find(name)
    if thing is None or len(left) > 1 or (left and not inspect.isclass(thing)):
        return "missing"
    if left:
        declared = {
            *getattr(thing, "__annotations__", ()),
            *getattr(thing, "model_fields", ()),
            *getattr(thing, "__dataclass_fields__", ()),
        }
        bound = "nanobind" in str(type(thing)) or "pybind11" in str(type(thing))
        return "there" if left[0] in declared else "missing" if bound else "untold"
    if not keyword:
        return "there"
    takes = keywords(thing)
    return "untold" if takes is None else "there" if keyword in takes else "missing"


def main() -> int:
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        print("error: TensorRT-LLM is not installed", file=sys.stderr)
        return NOT_HERE
    verdicts = {use: judge(use) for use in uses()}
    for use, verdict in verdicts.items():
        if verdict != "there":
            print(f"{verdict}: {use}")
    count = {kind: list(verdicts.values()).count(kind) for kind in ("there", "missing", "untold")}
    print(json.dumps({"version": version, **count}))
    return 1 if count["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
