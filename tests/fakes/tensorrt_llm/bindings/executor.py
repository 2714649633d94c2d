"""``tensorrt_llm.bindings.executor`` of the fake: every class of the contract, and an Executor that generates."""

from __future__ import annotations

from tensorrt_llm import _executor, _modes
from tensorrt_llm._bindings import bindings

globals().update(vars(bindings) | {"Response": _executor.Response, "Executor": _executor.Executor})

if _modes.MODES.get("without") == "executor":
    del globals()["Executor"]
