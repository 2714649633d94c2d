"""The hardware of this node: the facts from which automatic settings are chosen.

Owns nothing and changes nothing. A short-lived child process with torch inspects the GPUs, because it sees what the ranks will see; this
process never loads torch. A node without a GPU starts no child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from orchestrator.control.launch.gpu_ledger import VISIBLE, visible_gpus
from orchestrator.planner.automatic import GpuHardware, NodeHardware

#: Longest that a child may take to start torch and the driver, seconds.
LOOK_S = 120.0
#: Memory that the driver and the child itself use on an idle GPU, at most, bytes: a GPU with no more in use counts as free.
IDLE_BYTES = 2 << 30
#: Features in /proc/cpuinfo of processors that multiply in bfloat16, and of those on which torch supports it.
FAST_BF16 = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
SOME_BF16 = FAST_BF16 | {"avx512bw", "avx_ne_convert"}

#: Prints {"fault": why there is none, "gpus": [[name, major, minor, free bytes, bytes in all], ...]}.
_CHILD = """
import json, torch
fault, gpus = "", []
if torch.version.cuda is None:
    fault = f"torch {torch.__version__} is a build without CUDA"
else:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        fault = str(error).strip().splitlines()[0]
    else:
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append([facts.name, facts.major, facts.minor, *torch.cuda.mem_get_info(index)])
print(json.dumps({"fault": fault, "gpus": gpus}))
"""


def look(env: Mapping[str, str], *, gpus: bool, cpuinfo: Path = Path("/proc/cpuinfo"), devices: Path = Path("/dev")) -> NodeHardware:
    """This node, with the GPUs that ``env`` shows. ``gpus`` False: do not search for GPUs."""
    flags = _cpu_flags(cpuinfo)
    found: tuple[GpuHardware, ...] = ()
    fault = ""
    if gpus and visible_gpus(env, devices):
        found, fault = _look_at_gpus(env)
    elif gpus and VISIBLE in env and visible_gpus({}, devices):
        fault = f"{VISIBLE} hides all GPUs"
    return NodeHardware(
        gpus=found,
        gpu_fault=fault,
        memory=int(psutil.virtual_memory().available),
        cores=psutil.cpu_count() or 1,
        bf16=bool(flags & SOME_BF16),
        fast_bf16=bool(flags & FAST_BF16),
    )


def _look_at_gpus(env: Mapping[str, str]) -> tuple[tuple[GpuHardware, ...], str]:
    """(GPUs, why none can be used; empty if there are some)."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _CHILD],
            capture_output=True,
            text=True,
            timeout=LOOK_S,
            check=True,
            stdin=subprocess.DEVNULL,
            env={**env},
        )
        said = json.loads(ran.stdout)
    except subprocess.TimeoutExpired:
        return (), f"the driver did not answer within {LOOK_S:.0f} s"
    except subprocess.CalledProcessError as error:
        return (), f"torch cannot look at them: {(error.stderr.strip().splitlines() or ['no word'])[-1]}"
    gpus = tuple(
        GpuHardware(name=name, capability=(major, minor), memory=total if total - free < IDLE_BYTES else free)
        for name, major, minor, free, total in said["gpus"]
    )
    return gpus, said["fault"]


def _cpu_flags(cpuinfo: Path) -> set[str]:
    """The features of the first processor: ``flags`` on x86, ``Features`` on ARM."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())
