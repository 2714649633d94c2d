"""A stand-in for TensorRT-LLM 1.2, generated from its published API as ``tests/contracts/tensorrt_llm_api.json`` records it.

It generates what :mod:`workers.engines.fake`'s oracle says, over as many MPI ranks as the engine has, and fails in the ways that users
report (``_modes``). It exists to prove the orchestrator; it says nothing about TensorRT-LLM.
"""

from __future__ import annotations

from tensorrt_llm import _modes
from tensorrt_llm._contract import make

__version__ = _modes.MODES.get("version", "1.2.1")

SamplingParams = make("tensorrt_llm.SamplingParams")

if _modes.MODES.get("without") != "llm":
    from tensorrt_llm._llm import LLM as LLM
