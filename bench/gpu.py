"""The portable engine on NVIDIA GPUs: fixed workloads on the shapes of Llama 3.1 with random weights, one JSON line each.

python -m bench.gpu [--case 8b --case 8b-tp2 ...] [--workload latency-b1 ...] [--output FILE] [--profile DIR]

All requests are submitted at once to the real engine (leader and ranks, under mpiexec where there are several), prefix cache off. Without
--case: all cases that the visible GPUs can run. ``floor_share``: the hardware's own time, from rates measured here, over the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.report import commit, facts, record, say
from orchestrator.planner import cost_model
from workers.__main__ import GPU_ENVIRONMENT
from workers.protocol.specs import Parallel, PortableOptions, PortableSpec, QuantName, ReplicaSpec

ROOT = Path(__file__).resolve().parent.parent
#: Longest that one case may take, seconds.
BOUND_S = 420

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "70b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    },
}
#: name → requests, prompt and output tokens of each.
WORKLOADS = {load.name: (load.requests, load.isl, load.osl) for load in cost_model.WORKLOADS}


class Case(msgspec.Struct, frozen=True):
    """One engine, started once; ``workloads``: the default workloads for it."""

    shape: str
    parallel: Parallel
    quant: QuantName | None = None
    workloads: tuple[str, ...] = tuple(WORKLOADS)


_LONG = ("latency-b1", "balanced")
CASES = {
    "8b": Case("8b", Parallel()),
    "8b-fp8": Case("8b", Parallel(), "fp8"),
    "8b-int8": Case("8b", Parallel(), "int8", _LONG),
    "8b-int4": Case("8b", Parallel(), "int4", _LONG),
    "135m": Case("135m", Parallel(), None, _LONG),
    "8b-tp2": Case("8b", Parallel(tp=2), None, ("latency-b1", "balanced", "decode-heavy")),
    "8b-pp2": Case("8b", Parallel(pp=2), None, ("balanced", "decode-heavy")),
    "70b-tp2": Case("70b", Parallel(tp=2), None, _LONG),
    "70b-pp2": Case("70b", Parallel(pp=2), None, _LONG),
}


def write_shape(folder: Path, shape: str) -> Path:
    """A Hugging Face folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return folder


def spec_of(case: Case, artifact: Path, *, load_format: str = "dummy") -> ReplicaSpec:
    engine = PortableSpec(
        dtype="bf16",
        device="cuda",
        max_batch_size=512,
        max_num_tokens=8192,
        max_seq_len=4096,
        prefix_cache=False,
        wait="spin",
        options=PortableOptions(quant=case.quant, load_format="dummy" if load_format == "dummy" else "auto"),
    )
    return ReplicaSpec(name="bench", model=case.shape, artifact=str(artifact), parallel=case.parallel, engine=engine)


def launched(ranks: int) -> list[str]:
    """The command that runs a module on ``ranks`` ranks."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if ranks > 1 and mpiexec is None:
        raise SystemExit("several ranks need mpiexec: pip install mpich")
    return [*([str(mpiexec), "-n", str(ranks)] if ranks > 1 else []), sys.executable, "-m"]


def run(spec: ReplicaSpec, arguments: dict[str, Any], bound_s: float = BOUND_S) -> Iterator[dict[str, Any]]:
    """Yield the lines that rank 0 prints; after a failure, which is reported, the earlier lines stay valid."""
    told = {"spec": msgspec.to_builtins(spec), "started": time.time(), **arguments}
    environment = os.environ | GPU_ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [*launched(spec.parallel.world), "bench.gpu_rank", json.dumps(told)]
    with subprocess.Popen(argv, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        clock = threading.Timer(bound_s, lambda: (say(f"not done within {bound_s:.0f} s"), os.killpg(process.pid, 9)))
        clock.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            clock.cancel()
            if sys.exc_info()[0] is not None:  # interrupted: without this, ranks would hold their GPUs until they are done
                os.killpg(process.pid, 9)
    if process.returncode:
        say(f"the ranks ended with {process.returncode}")


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", action="append", choices=tuple(CASES))
    parser.add_argument("--workload", action="append", choices=tuple(WORKLOADS))
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--profile", type=Path, help="folder for tables of kernels")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    visible = gpus()
    names = args.case or [name for name, case in CASES.items() if (case.parallel.world > 1) == (visible > 1)]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            case = CASES[name]
            say(f"bench.gpu: {name}")
            spec = spec_of(case, write_shape(Path(folder, case.shape), case.shape))
            profile = str(args.profile / f"{name}.txt") if args.profile else ""
            wanted = [workload for workload in case.workloads if not args.workload or workload in args.workload]
            workloads = [(workload, *WORKLOADS[workload]) for workload in wanted]
            for found in run(spec, {"workloads": workloads, "profile": profile}):
                record(facts(args.commit) | found, args.output)


if __name__ == "__main__":
    main()
