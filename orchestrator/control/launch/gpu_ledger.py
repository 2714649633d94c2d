"""The assignment of this host's GPUs to gangs.

Owns the ledger of one launcher without a resource manager (under Ray, placement groups assign GPUs). Never accesses a GPU, and needs no
driver: the ranks report a broken GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The entries of ``CUDA_VISIBLE_DEVICES``, else the numbers of the host's GPUs."""
    if VISIBLE in env:
        return [name.strip() for name in env[VISIBLE].split(",") if name.strip()]
    numbers = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia*")]
    return sorted((number for number in numbers if number.isdigit()), key=int)


class GpuLedger:
    """Assigns GPUs to gangs, each GPU to one gang at a time."""

    def __init__(self, gpus: list[str]) -> None:
        self._free = list(gpus)
        self._taken: dict[tuple[str, int], list[str]] = {}

    def take(self, gang: tuple[str, int], count: int) -> dict[str, str]:
        """The variable that shows ``gang`` its ``count`` GPUs; fewer if there are not enough, and then its ranks refuse to start."""
        taken, self._free = self._free[:count], self._free[count:]
        self._taken[gang] = taken
        return {VISIBLE: ",".join(taken)}

    def give_back(self, gang: tuple[str, int]) -> None:
        self._free = self._taken.pop(gang, []) + self._free
