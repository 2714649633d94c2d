"""The accelerator beneath a device runner: memory that both see, marks in its stream, and programs that it replays.

Owns the Device seam and the GPU that implements it; tests have a CPU in its place (:mod:`tests.support.fake_device`). Must never know of
plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from workers.scheduler.step_plan import Ints

#: Rows of decode steps: padding costs at most 7 rows, whose weights are read anyway, 15 from 128 on, and 31 from 256 on, where products
#: are made of tiles of 64 rows and more.
DECODES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 513, 32))
#: Tokens of other steps: up to about 256 padding costs little beside the weights. Longer steps take longer on the device than their
#: launches on the host. 448 is left out: for the widest product of 8B cuBLAS then takes a kernel of half the speed.
MIXED = (32, 64, 128, 192, 256, 320, 384, 512)

#: What to capture, and what to run once before.
Programs = tuple[Callable[[], None], Callable[[], None]]


class Mark(Protocol):
    """A place in the device's stream of work. Before it stands anywhere there is nothing to wait for."""

    def record(self) -> None:
        """Stand at the end of the work issued so far."""

    def query(self) -> bool:
        """Whether all work up to it is done."""

    def synchronize(self) -> None:
        """Wait for it."""


class Device(Protocol):
    """One stream of work, in order, and a second one beside it for what must not wait behind later steps."""

    @property
    def place(self) -> torch.device: ...

    def pinned(self, words: int) -> Tensor:
        """[words] zeros, int32, of the host: copies run beside it, and the device's programs read and write it."""

    def mark(self) -> Mark:
        """A new mark, which stands nowhere yet."""

    def capture(self, program: Callable[[], None], once: Callable[[], None]) -> Callable[[], None]:
        """``program`` as something to run again and again, on the same memory: what it makes anew is gone when it returns. ``once`` is run
        before, and uses every kernel that it does."""

    def beside(self, mark: Mark) -> AbstractContextManager[None]:
        """A context whose work runs beside the stream, once ``mark`` is reached."""

    def check(self) -> None:
        """Raises what work issued so far ran into, as far as it is known by now."""

    def release(self) -> None:
        """Wait for all work, then forget what was captured."""


class CudaDevice:
    """The current GPU of this process. Captured programs share one memory pool: capture the largest first."""

    def __init__(self, device: torch.device) -> None:
        self.place = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def pinned(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32, pin_memory=True)

    def mark(self) -> Mark:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, program: Callable[[], None], once: Callable[[], None]) -> Callable[[], None]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.place)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            # Kernels are compiled and workspaces made outside the graph.
            once()
            # Other threads of this process (NCCL's watchdog) may ask the driver questions meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            program()
            graph.capture_end()
        here.wait_stream(self._side)
        self._graphs.append(graph)
        return graph.replay

    @contextmanager
    def beside(self, mark: Mark) -> Iterator[None]:
        assert isinstance(mark, torch.cuda.Event)
        self._side.wait_event(mark)
        with torch.cuda.stream(self._side):
            yield

    def check(self) -> None:
        torch.cuda.current_stream(self.place).query()

    def release(self) -> None:
        torch.cuda.synchronize(self.place)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


def graph_sizes(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Those of the rising ``sizes`` that steps of up to ``most`` need; larger steps than the last run without a graph."""
    return sizes[: bisect_left(sizes, most) + 1]


class Graphs:
    """``programs(size)`` for each of ``sizes``. Largest first: the smaller ones then live in its memory."""

    def __init__(self, device: Device, sizes: tuple[int, ...], programs: Callable[[int], Programs]) -> None:
        self._sizes = sizes
        self._programs = {size: device.capture(*programs(size)) for size in reversed(sizes)}

    def size_for(self, least: int) -> int | None:
        """The smallest captured size that is ``least`` or more; None where all are too small."""
        at = bisect_left(self._sizes, least)
        return self._sizes[at] if at < len(self._sizes) else None

    def replay(self, size: int) -> None:
        """Run the program of ``size`` on what its inputs hold when the device gets there."""
        self._programs[size]()

    def close(self) -> None:
        self._programs.clear()


class Staging:
    """``depth`` buffers of ``words`` int32, used in turn."""

    def __init__(self, device: Device, *, words: int, depth: int) -> None:
        self._place = device.place
        self._buffers = [(device.pinned(words), device.mark()) for _ in range(depth)]
        self._turn = 0

    def send(self, numbers: Ints) -> Tensor:
        """``numbers`` on the device, once the copy that this starts is done. Waits for what the buffer fed ``depth`` turns ago."""
        buffer, mark = self._buffers[self._turn]
        mark.synchronize()
        buffer.numpy()[: len(numbers)] = numbers
        return torch.empty(len(numbers), dtype=torch.int32, device=self._place).copy_(buffer[: len(numbers)], non_blocking=True)

    def sent(self) -> None:
        """All that reads what was sent last is issued: the next buffer's turn."""
        self._buffers[self._turn][1].record()
        self._turn = (self._turn + 1) % len(self._buffers)


def pin_numerics() -> None:
    """Products in the precision that their formats say: no TF32, and no reduced-precision sums in half-precision products."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
