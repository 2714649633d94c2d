"""What a node says of itself: its processor from /proc/cpuinfo, its GPUs from a child process in which a pretend torch answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.control.launch import node_hardware
from orchestrator.control.launch.node_hardware import IDLE_BYTES, look
from orchestrator.planner.automatic import GpuHardware

GIB = 1 << 30
#: A torch as the child needs it. CUDA, ERROR and GPUS are filled in.
TORCH = """
__version__ = "9.9"
class version: cuda = CUDA
class cuda:
    @staticmethod
    def init():
        if ERROR: raise RuntimeError(ERROR)
    @staticmethod
    def device_count(): return len(GPUS)
    @staticmethod
    def get_device_properties(index):
        class Facts: name, major, minor = GPUS[index][:3]
        return Facts
    @staticmethod
    def mem_get_info(index): return GPUS[index][3:]
"""


def pretend(folder: Path, *, cuda: str | None = "12.8", error: str = "", gpus: list[tuple[object, ...]] | None = None) -> dict[str, str]:
    """The environment in which this torch is found."""
    package = folder / "torch"
    package.mkdir()
    text = TORCH.replace("CUDA", repr(cuda)).replace("ERROR", repr(error)).replace("GPUS", repr(gpus or []))
    (package / "__init__.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


def devices(folder: Path, count: int) -> Path:
    for name in [*(f"nvidia{index}" for index in range(count)), "nvidiactl", "nvidia-uvm", "null"]:
        (folder / name).touch()
    return folder


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    (tmp_path / "dev").mkdir()
    return devices(tmp_path / "dev", 2)


def test_gpus_are_what_torch_sees(tmp_path: Path, dev: Path) -> None:
    total = 80 * GIB
    env = pretend(tmp_path, gpus=[("NVIDIA H100", 9, 0, total - IDLE_BYTES + 1, total), ("NVIDIA H100", 9, 0, 30 * GIB, total)])
    seen = look(env, gpus=True, devices=dev)
    # What the look itself takes of an idle GPU does not count; another program's share of a busy one does.
    assert seen.gpus == (
        GpuHardware(name="NVIDIA H100", memory=total, capability=(9, 0)),
        GpuHardware(name="NVIDIA H100", memory=30 * GIB, capability=(9, 0)),
    )
    assert seen.gpu_fault == "" and seen.memory > 0 and seen.cores >= 1


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ({"cuda": None}, "torch 9.9 is a build without CUDA"),
        ({"error": "the driver is too old\nupdate it"}, "the driver is too old"),
    ],
)
def test_gpus_that_torch_cannot_use_are_none_with_the_reason(tmp_path: Path, dev: Path, torch: dict[str, str], told: str) -> None:
    seen = look(pretend(tmp_path, **torch), gpus=True, devices=dev)  # type: ignore[arg-type]
    assert seen.gpus == () and seen.gpu_fault == told


def test_a_torch_that_does_not_load_is_a_reason_too(tmp_path: Path, dev: Path) -> None:
    env = pretend(tmp_path)
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    seen = look(env, gpus=True, devices=dev)
    assert seen.gpus == () and "libcudart.so.12" in seen.gpu_fault


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_hardware, "LOOK_S", 0.3)
    env = pretend(tmp_path)
    (tmp_path / "torch" / "__init__.py").write_text("import time; time.sleep(60)")
    assert "did not answer" in look(env, gpus=True, devices=dev).gpu_fault


@pytest.mark.parametrize("wanted", [True, False])
def test_without_a_gpu_no_process_is_started(tmp_path: Path, dev: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "bare").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    assert look(env, gpus=wanted, devices=devices(tmp_path / "bare", 0)).gpu_fault == ""
    if not wanted:  # nobody asks: the GPUs that are there are not looked at
        assert look(env, gpus=False, devices=dev).gpus == ()
    hidden = look(env | {"CUDA_VISIBLE_DEVICES": ""}, gpus=wanted, devices=dev)
    assert hidden.gpus == () and hidden.gpu_fault == ("CUDA_VISIBLE_DEVICES hides all GPUs" if wanted else "")


@pytest.mark.parametrize(
    ("line", "some", "fast"),
    [
        ("flags\t\t: fpu avx2", False, False),
        ("flags\t\t: fpu avx512bw", True, False),
        ("flags\t\t: fpu avx512bw avx512_bf16", True, True),
        ("flags\t\t: amx_bf16 amx_tile", True, True),
        ("Features\t: fp asimd bf16 i8mm", True, True),
        ("", False, False),
    ],
)
def test_processors_with_bfloat16(tmp_path: Path, line: str, some: bool, fast: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\nflags\t\t: avx512_bf16\n" if line else "processor\t: 0\n")
    seen = look(os.environ, gpus=False, cpuinfo=cpuinfo)
    assert (seen.bf16, seen.fast_bf16) == (some, fast)
    assert not look(os.environ, gpus=False, cpuinfo=tmp_path / "none").bf16


def test_a_host_never_imports_torch_for_it() -> None:
    program = (
        "import os, sys; from orchestrator.control.launch import node_hardware; node_hardware.look(os.environ, gpus=True);"
        "print(*sorted({'torch', 'ray', 'numpy.linalg'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "ray"} & set(ran.stdout.split())
