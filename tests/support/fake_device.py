"""A CPU that replaces the GPU, so that a GPU runner's buffers and its order of work are tested without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.runner.device import DeviceEvent


class _DoneEvent:
    """An event of a device whose work is done as soon as it is issued."""

    def record(self) -> None:
        return

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class FakeDevice:
    """Implements :class:`workers.runner.device.Device`: all work is done at once, and a captured program is run again at each replay."""

    torch_device = torch.device("cpu")

    def pinned(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32)

    def event(self) -> DeviceEvent:
        return _DoneEvent()

    def capture(self, program: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        warm_up()
        return program

    @contextmanager
    def side_stream(self, after: DeviceEvent) -> Iterator[None]:
        yield

    def check(self) -> None:
        return

    def release(self) -> None:
        return
