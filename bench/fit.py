"""Fits the planner's coefficients to recorded runs, and prints how far each run lies from its prediction.

python -m bench.fit [--device gpu|cpu]

GPUs: the fit uses the runs on one and two GPUs; those on four are held out. CPU: the fit uses the runs with one thread; the figures of a
quiet machine with two threads and two ranks (docs/performance.md) are held out. The result is copied by hand to
:mod:`orchestrator.planner.devices`, with the spread; a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from bench.gpu import write_shape
from bench.report import ROOT
from orchestrator.planner import devices, known_models
from orchestrator.planner.cost_model import Rates, StepLoad, Workload, replay
from orchestrator.planner.devices import GPUS, Fit, gpu_rates, host_rates
from orchestrator.planner.planner import Subject, pipeline_of
from workers.artifacts.artifact import open_artifact
from workers.protocol.specs import PLAIN, DType, ModelSpec, Parallel, PortableSpec, quant_of

RESULTS = ROOT / "bench" / "results"
FITTED, HELD_OUT = "gpu.jsonl", "2026-11-22-four-gpus.jsonl"
CPU_FITTED, CPU_HELD_OUT = "cpu.jsonl", "cpu-decode.jsonl"
Vector = npt.NDArray[np.float64]
#: Coefficients that are fitted, by device.
FREE = {"gpu": ("read", "product", "narrow", "layer_s", "step_s"), "cpu": ("read", "product", "step_s")}


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded run. ``gpu`` empty: on CPUs with ``threads`` per rank. ``seconds`` 0: only its decodes were timed."""

    file: str
    shape: str
    tp: int
    pp: int
    requests: int
    isl: int
    osl: int
    output_tok_s: float
    workload: str
    seconds: float = 0.0
    quant: str | None = None
    gpu: str = ""
    threads: int = 1
    kv_tokens: int = 0
    max_num_tokens: int = 8192
    dtype: DType = "bf16"

    @property
    def parallel(self) -> Parallel:
        return Parallel(tp=self.tp, pp=self.pp)

    @property
    def device(self) -> devices.GpuModel | devices.HostModel:
        return next(gpu for name, gpu in GPUS.items() if name in self.gpu) if self.gpu else devices.HostModel(memory=16 << 30, cores=2)

    @property
    def subject(self) -> Subject:
        """The replica that ran it, with the settings of `bench.gpu` and `bench.cpu_runs`."""
        chosen = {"dtype": self.dtype, "device": "cuda" if self.gpu else "cpu", "threads": self.threads, "max_seq_len": 4096}
        limits = {"max_batch_size": 512 if self.gpu else 64, "max_num_tokens": self.max_num_tokens}
        return Subject(
            name=self.shape,
            model=model_of(self.shape),
            quant=quant_of("fp8") if self.quant == "fp8" else PLAIN,
            engine=msgspec.convert(chosen | limits, PortableSpec),
            gangs=(("r", self.parallel),),
        )

    @property
    def load(self) -> Workload:
        return Workload(name=self.workload, requests=self.requests, isl=self.isl, osl=self.osl)


def model_of(shape: str) -> ModelSpec:
    if shape in known_models.SHAPES:
        return known_models.SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        return open_artifact(write_shape(Path(folder), shape), weights_optional=True).model


def recorded(*files: str) -> Iterator[Recorded]:
    """Every run in these files that a roofline can describe.

    The 135M shape on a GPU is left out: its steps are bound by the host (docs/performance.md), which a roofline of a device does not model.
    """
    for file in files:
        for line in (RESULTS / file).read_text().splitlines():
            found = json.loads(line)
            if "output_tok_s" in found and found["shape"] != "135m":
                yield msgspec.convert(found | {"file": file}, Recorded)


def ratio(run: Recorded, rates: Rates) -> float:
    """The time that ``run`` should have taken over the time that it took."""
    subject, sequences = run.subject, run.requests
    pipeline = pipeline_of(subject, run.parallel, rates)
    if not run.seconds:
        step = StepLoad(tokens=sequences, sequences=sequences, context=sequences * (run.isl + run.osl / 2))
        return pipeline.seconds(step, 1) * run.output_tok_s / sequences
    sequences = subject.engine.max_batch_size
    return replay(pipeline, run.load, sequences=sequences, max_num_tokens=run.max_num_tokens).seconds / run.seconds


def misses(runs: Sequence[Recorded], fit: Fit) -> Vector:
    """log(predicted / measured) of each run."""
    return np.array([math.log(ratio(run, rates_of(run, fit))) for run in runs])


def rates_of(run: Recorded, fit: Fit) -> Rates:
    device = run.device
    return gpu_rates(device, run.dtype, fit) if isinstance(device, devices.GpuModel) else host_rates(run.threads, fit)


def fitted(runs: Sequence[Recorded], start: Fit, free: Sequence[str], turns: int = 12) -> Fit:
    """Least squares over relative errors (Levenberg and Marquardt); coefficients are changed by factors."""

    def moved(steps: Vector) -> Fit:
        return msgspec.structs.replace(
            start, **{name: getattr(start, name) * math.exp(step) for name, step in zip(free, steps, strict=True)}
        )

    at, damping = np.zeros(len(free)), 1e-3
    found = misses(runs, moved(at))
    for _ in range(turns):
        slope = _slope(lambda steps: misses(runs, moved(steps)), at, found)
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(free)), -slope.T @ found)
        tried = at + np.clip(step, -0.5, 0.5)
        after = misses(runs, moved(tried))
        if after @ after < found @ found:
            at, found, damping = tried, after, damping / 3
        else:
            damping *= 4
    return moved(at)


def _slope(function: Callable[[Vector], Vector], at: Vector, value: Vector, by: float = 1e-4) -> Vector:
    return np.stack([(function(at + by * np.eye(len(at))[i]) - value) / by for i in range(len(at))], 1)


def show(title: str, runs: Sequence[Recorded], fit: Fit) -> None:
    found = misses(runs, fit)
    print(f"{title}: root mean square {100 * float(np.sqrt(np.mean(found**2))):.1f} %, largest {100 * float(abs(found).max()):.1f} %")
    for run, miss in zip(runs, found, strict=True):
        what = f"{run.shape} tp={run.tp} pp={run.pp} {run.quant or run.dtype}" + ("" if run.gpu else f" threads={run.threads}")
        print(f"  {what:<40} {run.workload:<14} {run.output_tok_s:9.1f} tok/s  time {100 * (math.exp(miss) - 1):+5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=tuple(FREE), default="gpu")
    device = parser.parse_args().device
    files, start = ((FITTED, HELD_OUT), devices.GPU_FIT) if device == "gpu" else ((CPU_FITTED, CPU_HELD_OUT), devices.HOST_FIT)
    runs, held_out = (list(recorded(file)) for file in files)
    found = fitted(runs, start, FREE[device])
    print(json.dumps({name: float(f"{getattr(found, name):.3g}") for name in FREE[device]}))
    show("fitted to", runs, found)
    show("held out", held_out, found)


if __name__ == "__main__":
    main()
