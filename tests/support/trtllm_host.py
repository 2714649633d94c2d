"""A host on which TensorRT-LLM seems to be installed, for tests: its builder and nvidia-smi from `tests/fakes/bin`, its distribution from
`tests/fakes`, and checkpoints and engines small enough to make in milliseconds.

Owns what such tests share. Nothing here imports tensorrt_llm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import tiny_model
from workers.artifacts.convert import convert
from workers.engines.trtllm import build as building
from workers.engines.trtllm import node_probe
from workers.engines.trtllm.build_options import BuildOptions
from workers.engines.trtllm.engine_dir import EngineDir
from workers.protocol.specs import Parallel

FAKES = Path(__file__).resolve().parents[1] / "fakes"


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process and its children see the faked programs and distribution."""
    for name in ("TRIREME_FAKE_BUILD", "TRIREME_FAKE_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{FAKES / 'bin'}:{python}:{os.environ.get('PATH', os.defpath)}")
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(FAKES))


def even_model(folder: Path, **model: object) -> Path:
    """A llama whose heads, FFN and layers TensorRT-LLM can split for tp 1, 2 and 4."""
    shape = {"heads": 8, "kv_heads": 4, "hidden": 64, "ffn": 96, "layers": 3, "vocab": 322} | model
    return tiny_model(folder, **shape)  # type: ignore[arg-type]


def checkpoint_of(folder: Path, *, tp: int = 2, pp: int = 2, for_trtllm: bool = True, **model: object) -> Path:
    """`folder`/ck: a checkpoint of :func:`even_model`."""
    source = even_model(folder / "hf", **model)
    return convert(source, folder / "ck", parallel=Parallel(tp=tp, pp=pp), dtype="bf16", for_trtllm=for_trtllm)


def engine_of(folder: Path, checkpoint: Path, *, options: BuildOptions | None = None, target: str = "engine") -> EngineDir:
    """Build with the faked builder; :func:`pretend` first."""
    path = os.environ["PATH"]
    plan = building.prepare(checkpoint, options or BuildOptions(), model="tiny", path=path, facts=node_probe.probe(path, None))
    engine, _ = building.build(plan, folder / target, env=os.environ, on_line=lambda line: None, on_tick=lambda *tick: None)
    return engine
