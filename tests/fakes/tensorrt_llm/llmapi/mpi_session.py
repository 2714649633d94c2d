"""``tensorrt_llm.llmapi.mpi_session`` of the fake: a session over a communicator whose other ranks sit in an MPICommExecutor."""

from __future__ import annotations

import os
from typing import Any

from tensorrt_llm._contract import make_class


class MpiCommSession(make_class("tensorrt_llm.llmapi.mpi_session.MpiCommSession")):  # type: ignore[misc]
    def prepare(self) -> None:
        from mpi4py.futures import MPICommExecutor

        comm = self.__dict__["comm"]
        if comm.Get_rank() != 0:
            raise RuntimeError("only rank 0 can start multi-node session")
        if self.__dict__["n_workers"] != comm.Get_size():
            raise ValueError("n_workers must be equal to the communicator's size")
        self._owner = MPICommExecutor(comm, root=0)
        self._pool: Any = self._owner.__enter__()

    def hello(self) -> set[int]:
        """Process ids of the other ranks, as far as they take tasks."""
        tasks = [self._pool.submit(os.getpid) for _ in range(self.__dict__["n_workers"] - 1)]
        return {task.result() for task in tasks}

    def shutdown(self, wait: bool = True) -> None:
        self._owner.__exit__(None, None, None)
