"""The default model's weights as transformers reads them from its GGUF: a digest of each tensor, written down in ``data/``.

transformers takes 20 s of a core for it, so a usual run compares with the record, and a long one compares the record with transformers.
Record again: ``python -m tests.reference.default_model_weights``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.model_store import DEFAULT_MODEL, pull
from workers.protocol.errors import EnvironmentFault

RECORD = Path(__file__).parent / "data" / "default_model_weights.json"


def default_model() -> Path:
    """The default model's GGUF; skips the test, and says why, where it cannot be had."""
    try:
        return pull(DEFAULT_MODEL, Path(os.environ.get("TRIREME_TEST_CACHE", Path.home() / ".cache" / "trireme")))
    except EnvironmentFault as error:
        pytest.skip(f"no default model: {error}")


def digest(values: np.ndarray[Any, Any]) -> str:
    """A SHA-256 over shape and values, as fp32."""
    content = np.ascontiguousarray(values, dtype=np.float32)
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()[:32]


def of_transformers(path: Path) -> dict[str, str]:
    """Hugging Face name -> digest of every tensor that transformers makes of a GGUF."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    return {name: digest(tensor.numpy()) for name, tensor in sorted(tensors.items())}


def recorded() -> dict[str, str]:
    return dict(json.loads(RECORD.read_text()))


if __name__ == "__main__":
    RECORD.write_text(json.dumps(of_transformers(default_model()), indent=1) + "\n")
