"""Every class of ``tensorrt_llm.bindings.executor`` as the contract has it, without behaviour; nested ones hang on their owners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tensorrt_llm._contract import PYTHON, make

_PREFIX = "tensorrt_llm.bindings.executor."


def collect() -> SimpleNamespace:
    found = SimpleNamespace(kv_cache=SimpleNamespace())
    for path in sorted(PYTHON):  # an owner before what it owns
        if path.startswith(_PREFIX) and PYTHON[path]["kind"] != "function":
            *owners, name = path.removeprefix(_PREFIX).split(".")
            owner: Any = found
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, name, make(path))
    return found


bindings = collect()
