"""Checks what TensorRT-LLM can serve: an engine folder, or Hugging Face weights. Reads descriptions only; must never import
tensorrt_llm."""

from __future__ import annotations

from pathlib import Path

from workers.artifacts.artifact import Artifact, open_artifact
from workers.artifacts.hf_quantization import MODELOPT_METHOD
from workers.engines.trtllm.engine_dir import EngineDir, is_engine_dir, read_engine_dir
from workers.protocol.errors import ArtifactError


def open_model(path: str | Path) -> EngineDir | Artifact:
    """Raises :class:`ArtifactError` if TensorRT-LLM cannot run it (the hint says how to make it runnable), or if it is damaged."""
    if is_engine_dir(path):
        return read_engine_dir(path)
    artifact = open_artifact(path)
    if artifact.kind == "checkpoint":
        raise ArtifactError(f"{path} is a checkpoint, not an engine", "engines are built for one kind of GPU", f"trireme build {path}")
    if artifact.kind == "gguf":
        hint = f"trireme convert {path}, then trireme build; or use --engine portable"
        raise ArtifactError(f"{path} is a GGUF file", "TensorRT-LLM does not read it", hint)
    if artifact.scheme is not None and artifact.scheme.method != MODELOPT_METHOD:
        why = f"its weights are quantized with {artifact.scheme.words}, TensorRT-LLM is given those of ModelOpt"
        raise ArtifactError(f"{path} is not served by TensorRT-LLM", why, "use --engine portable, or the unquantized model")
    return artifact
