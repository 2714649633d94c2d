"""The accelerator beneath a GPU runner: pinned host memory, events in its stream of work, and captured programs that it replays.

Owns the Device protocol, the GPU that implements it, and what needs only a Device: captured programs by size, and staging buffers. Tests
replace the GPU by a CPU (:mod:`tests.support.fake_device`). Must never know of plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.scheduler.step_plan import Ints

#: Sequences of the captured decode steps. Padding adds at most 7 sequences, for which no further weights are read, 15 from 128 on, and 31
#: from 256 on, where products use tiles of 64 rows or more.
DECODE_GRAPH_SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 513, 32))
#: Tokens of the other captured steps. Up to about 256 tokens, padding costs little compared with reading the weights. Longer steps take
#: longer on the device than their launches on the host, so they need no graph. 448 is left out, because at this size cuBLAS chooses a
#: kernel of half the speed for the widest product of an 8B model.
MIXED_GRAPH_SIZES = (32, 64, 128, 192, 256, 320, 384, 512)


class DeviceEvent(Protocol):
    """A point in the device's stream of work. An event that was never recorded counts as reached."""

    def record(self) -> None:
        """Move the event to the end of the work issued so far."""

    def query(self) -> bool:
        """Whether all work before the event is done."""

    def synchronize(self) -> None:
        """Wait until all work before the event is done."""


class Device(Protocol):
    """A device with a main stream, whose work is done in order, and a side stream for work that must not wait behind later steps."""

    @property
    def torch_device(self) -> torch.device: ...

    def pinned(self, words: int) -> Tensor:
        """[words] int32 zeros in pinned host memory: copies from it run in the background, and the device's programs read and write it."""

    def event(self) -> DeviceEvent:
        """A new event, not recorded yet."""

    def capture(self, program: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        """Capture ``program`` and return a function that replays it on the same memory. Tensors that ``program`` allocates are invalid
        after it returns. ``warm_up`` runs before the capture and must use every kernel that ``program`` uses."""

    def side_stream(self, after: DeviceEvent) -> AbstractContextManager[None]:
        """A context whose work runs in the side stream, once the event ``after`` is reached."""

    def check(self) -> None:
        """Raise a known error of the work issued so far."""

    def release(self) -> None:
        """Wait for all work, then drop the captured programs."""


class CudaDevice:
    """The current GPU of this process. Captured programs share one memory pool, so the largest must be captured first."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def pinned(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32, pin_memory=True)

    def event(self) -> DeviceEvent:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, program: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.torch_device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            # Kernels are compiled and workspaces allocated outside the graph.
            warm_up()
            # Other threads of this process (NCCL's watchdog) may call the driver meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            program()
            graph.capture_end()
        main.wait_stream(self._side)
        self._graphs.append(graph)
        return graph.replay

    @contextmanager
    def side_stream(self, after: DeviceEvent) -> Iterator[None]:
        assert isinstance(after, torch.cuda.Event)
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            yield

    def check(self) -> None:
        torch.cuda.current_stream(self.torch_device).query()

    def release(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class GraphProgram(NamedTuple):
    """A program to capture, and a warm-up to run once before the capture."""

    program: Callable[[], None]
    warm_up: Callable[[], None]


def graph_sizes(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """Those of the rising ``sizes`` that steps of up to ``largest`` need. Steps above the last size run without a graph."""
    return sizes[: bisect_left(sizes, largest) + 1]


class Graphs:
    """Captured programs of a few sizes; a step is replayed by the smallest program that holds it.

    ``programs(size)`` makes the program of each of ``sizes``. The largest is captured first, and the smaller ones then use its memory.
    """

    def __init__(self, device: Device, sizes: tuple[int, ...], programs: Callable[[int], GraphProgram]) -> None:
        self._sizes = sizes
        self._replays = {size: device.capture(*programs(size)) for size in reversed(sizes)}

    def size_for(self, least: int) -> int | None:
        """The smallest captured size of at least ``least``; None if all are smaller."""
        at = bisect_left(self._sizes, least)
        return self._sizes[at] if at < len(self._sizes) else None

    def replay(self, size: int) -> None:
        """Issue the program of ``size``. The program reads its inputs when it runs, not now."""
        self._replays[size]()

    def close(self) -> None:
        self._replays.clear()


class Staging:
    """``depth`` pinned buffers of ``words`` int32 that carry numbers to the device in the background. They are used one after the other.

    A buffer is written again only after the work that reads it is done.
    """

    def __init__(self, device: Device, *, words: int, depth: int) -> None:
        self._device = device.torch_device
        self._buffers = [(device.pinned(words), device.event()) for _ in range(depth)]
        self._next = 0

    def send(self, numbers: Ints) -> Tensor:
        """Start copying ``numbers`` [n] to the device; returns the copy [n] int32. Waits for the work that used this buffer ``depth`` sends
        ago."""
        buffer, event = self._buffers[self._next]
        event.synchronize()
        buffer.numpy()[: len(numbers)] = numbers
        return torch.empty(len(numbers), dtype=torch.int32, device=self._device).copy_(buffer[: len(numbers)], non_blocking=True)

    def sent(self) -> None:
        """Call this after all work that reads the last copy is issued: the next send uses the next buffer."""
        self._buffers[self._next][1].record()
        self._next = (self._next + 1) % len(self._buffers)


def pin_numerics() -> None:
    """Make torch compute products in the full precision of their dtypes: no TF32, and no reduced-precision accumulation in half
    precision."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
