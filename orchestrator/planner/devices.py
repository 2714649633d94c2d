"""Rates of devices: the only table of measured and published figures, and of the coefficients fitted to recorded runs.

Owns every number that a plan's speeds depend on, each with its source. `python -m bench.fit` fits the coefficients again and prints the
difference of every recorded run from its prediction. Must never hold a shape of a model.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from orchestrator.planner.cost_model import Rates
from workers.protocol.specs import DType, Parallel

Link = Literal["NVLink", "PCIe", "memory"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's memory. ``memory``: bytes that can be used."""

    name: str
    memory: int


class GpuModel(Gpu, frozen=True, kw_only=True):
    """One kind of GPU, with its speeds. ``copied``: bytes a second that a copy reads and writes; ``product``: bf16 FLOP a second
    of a large product; ``narrow``: the same in FP8, 0 where there is none; ``single``: in fp32 without TF32, as the engine computes it.
    ``recorded``: whether runs on it were recorded."""

    copied: float
    product: float
    narrow: float
    single: float
    link: Link
    recorded: bool


class HostModel(msgspec.Struct, frozen=True, kw_only=True):
    """The CPUs of a node: ``cores`` of them; ``memory``: bytes that are free there before anything is started."""

    memory: int
    cores: int
    name: str = "CPU"
    link: Link = "memory"
    recorded: bool = True


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients that make predictions meet recorded runs. ``read``, ``product``, ``narrow``: shares of a GPU's own figures, or what one
    CPU thread does in a second; seconds for each layer and step. ``error``: relative, twice the root mean square by which the ``runs`` runs
    in ``source`` are missed."""

    read: float
    product: float
    narrow: float
    layer_s: float
    step_s: float
    error: float
    runs: int
    source: str


#: Fitted by `python -m bench.fit` to the 17 runs of the 8B and 70B shapes in gpu.jsonl (one or two GPUs): met within 6.4 %, root mean
#: square 3.0 %. The four runs in 2026-11-22-four-gpus.jsonl were held out, and are of an engine with slower sums and steps: met within
#: 9.3 %, root mean square 6.5 %.
GPU_FIT = Fit(
    read=1.01,
    product=0.847,
    narrow=0.864,
    layer_s=1.2e-5,
    step_s=462e-6,
    error=0.08,
    runs=21,
    source="bench/results/gpu.jsonl and 2026-11-22-four-gpus.jsonl",
)

#: Fitted likewise to four runs of the default model's shape on one thread (AMD EPYC, AVX-512, fp32; CPU seconds): met within 5.0 %. Four
#: figures of two threads and of two ranks were held out: met within 44 %, root mean square 22 %. Another processor is another matter.
HOST_FIT = Fit(
    read=5.85e9,
    product=71.3e9,
    narrow=71.3e9,
    layer_s=20e-6,
    step_s=45.3e-6,
    error=0.35,
    runs=8,
    source="bench/results/cpu.jsonl and cpu-decode.jsonl",
)

#: Measured at the start of every run of bench.gpu (H100, H200), else data sheets' figures at the share of theirs that an H100 reaches:
#: 0.9 of the bandwidth, 0.8 of the dense peak. ``single`` is the data sheets' everywhere, by the same share.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuModel(
            name="H100", memory=81559 << 20, copied=3.0e12, product=798e12, narrow=1596e12, single=54e12, link="NVLink", recorded=True
        ),
        GpuModel(
            name="H200", memory=143771 << 20, copied=4.3e12, product=790e12, narrow=1580e12, single=54e12, link="NVLink", recorded=True
        ),
        GpuModel(name="A100", memory=81920 << 20, copied=1.83e12, product=250e12, narrow=0.0, single=16e12, link="NVLink", recorded=False),
        GpuModel(name="L40S", memory=46068 << 20, copied=0.78e12, product=290e12, narrow=580e12, single=73e12, link="PCIe", recorded=False),
    )
}

#: Of a copy's rate, what attention reads keys and values at, and what runs between products moves at: kernels.jsonl, 0.97 to 0.99.
_STREAMED = 0.97
#: Prefill's attention as a share of a product's rate: 490 of 798 TFLOP/s, once what it moves is counted apart (kernels.jsonl).
_ATTENTION = 0.61
#: Choosing a token, seconds a logit, at the H100's bandwidth: 341 us for 512 rows of 128,256 (kernels.jsonl).
_CHOICE_S, _CHOICE_COPIED = 5.2e-12, 3.0e12
#: Sums over 2 and 4 ranks of one host, from 4 KiB to 64 MiB: 2.5 and 3.7 us and 300 GB/s a rank (sums.jsonl, four-gpus.jsonl).
_SUM_S, _MEMBER_S, _NVLINK = 1.3e-6, 0.6e-6, 300e9
#: A stage's output to the next one: 37 us one way, measured between two GPUs of a host. Beyond a host: a 200 Gb/s port, not measured.
_HOP_S, _WIRE = 37e-6, 20e9
#: Sums over PCIe: latency and rate of a Gen4 slot, not measured.
_PCIE_S, _PCIE = 20e-6, 20e9

#: On a CPU: choosing a token, a logit; a sum or a message between two ranks of a host; bytes a second between hosts (not measured).
_HOST_CHOICE_S, _HOST_SUM_S, _HOST_WIRE = 2e-9, 150e-6, 1e9

#: The leader's own share of a step and of each of its sequences: ``host_us`` of gpu.jsonl without stages (41 to 153 us at 1, 160 to 550 at
#: 256, 218 to 586 at 512).
_LEAD_S, _LEAD_SEQUENCE_S = 0.1e-3, 0.8e-6

#: Bytes that are in use before a rank's weights: the CUDA context and torch (recorded on one GPU); what joining NCCL takes; what groups of
#: tensor-parallel ranks and of stages take beside it (recorded on two and four).
_CONTEXT, _NCCL, _TENSOR, _PIPELINE = 1_250_000_000, 800_000_000, 480_000_000, 750_000_000
#: What a rank on a CPU takes beside weights and cache: interpreter, torch, MPI, and room to compute in (bench.replica: 338 MB, bar 350).
HOST_RANK = 350_000_000


def taken(parallel: Parallel) -> int:
    """Bytes of a GPU's memory that a rank takes beside weights, cache and step."""
    if parallel.world == 1:
        return _CONTEXT
    return _CONTEXT + _NCCL + _TENSOR * (parallel.tp > 1) + _PIPELINE * (parallel.pp > 1)


def leading_s(sequences: int) -> float:
    """The leader's own time for a decode step of ``sequences``, seconds, while the device computes."""
    return _LEAD_S + sequences * _LEAD_SEQUENCE_S


def gpu_rates(gpu: GpuModel, dtype: DType, fit: Fit = GPU_FIT) -> Rates:
    """The rates of a rank on ``gpu`` that computes in ``dtype``, according to ``fit``."""
    direct = gpu.link == "NVLink"
    product = gpu.single if dtype == "fp32" else gpu.product
    return Rates(
        read=gpu.copied * fit.read,
        cached=gpu.copied * _STREAMED,
        traffic=gpu.copied * _STREAMED,
        product=product * fit.product,
        narrow=gpu.narrow * fit.narrow,
        attention=product * _ATTENTION,
        layer_s=fit.layer_s,
        alone_s=0.0,
        step_s=fit.step_s,
        choice_s=_CHOICE_S * _CHOICE_COPIED / gpu.copied,
        sum_s=_SUM_S if direct else _PCIE_S,
        member_s=_MEMBER_S,
        link=_NVLINK if direct else _PCIE,
        hop_s=_HOP_S,
        wire=_WIRE,
    )


def host_rates(threads: float, fit: Fit = HOST_FIT) -> Rates:
    """The rates of a rank with ``threads`` CPU cores of its own, according to ``fit``. Sums and hops are copies in shared memory."""
    read = fit.read * threads
    return Rates(
        read=read,
        cached=read,
        traffic=read,
        product=fit.product * threads,
        narrow=fit.narrow * threads,
        attention=fit.product * threads,
        layer_s=fit.layer_s,
        alone_s=fit.layer_s,
        step_s=fit.step_s,
        choice_s=_HOST_CHOICE_S,
        sum_s=_HOST_SUM_S,
        member_s=0.0,
        link=fit.read,
        hop_s=_HOST_SUM_S,
        wire=_HOST_WIRE,
    )
