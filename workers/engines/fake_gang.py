"""The fake engine as a gang of MPI ranks: rank 0 computes, and the others take part in every step.

Owns the synchronization of the ranks. A stopped or dead rank stalls the gang, as in a gang that computes.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from workers.artifacts.artifact import open_artifact
from workers.distributed.agreement import all_or_none, complete
from workers.engines.fake import BYTES, BYTES_EOS, FakeEngine
from workers.protocol.engine import CLOSE_S, Emission
from workers.protocol.specs import ReplicaSpec
from workers.sampling.grammar_checker import compiler


class Meeting:
    """One tiny all-reduce a step."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def vote(self, go_on: bool, bound_s: float | None = None) -> bool:
        """Synchronize with the other ranks; True if all vote to continue. Raises :class:`~workers.protocol.errors.EngineFault` after
        ``bound_s`` seconds."""
        if self._comm is None:
            return go_on
        from mpi4py import MPI

        verdict = array("i", [go_on])
        complete(self._comm.Iallreduce(MPI.IN_PLACE, verdict, MPI.MIN), bound_s)
        return bool(verdict[0])


class FakeLeader(FakeEngine):
    """Rank 0: the FakeEngine of ``spec``; all ranks take part in each of its steps. Its vocabulary is that of the artifact, or bytes if the
    artifact is only a tokenizer or missing."""

    def __init__(self, spec: ReplicaSpec, meeting: Meeting) -> None:
        vocab_size: int = BYTES
        eos_ids: tuple[int, ...] = BYTES_EOS
        if Path(spec.artifact, "config.json").exists():
            artifact = open_artifact(spec.artifact)
            vocab_size, eos_ids = artifact.model.vocab_size, artifact.eos_ids
        guides = compiler(Path(spec.artifact, "tokenizer.json"), vocab_size, eos_ids) if spec.artifact else None
        super().__init__(spec.fake, parallel=spec.parallel, vocab_size=vocab_size, eos_ids=eos_ids, guides=guides)
        self._meeting = meeting

    def step(self) -> list[Emission]:
        self._meeting.vote(True)  # the leader's own watchdog bounds it
        return super().step()

    def close(self) -> None:
        self._meeting.vote(False, CLOSE_S)
        super().close()


class FakeFollower:
    """Any other rank."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    def run(self) -> None:
        while self._meeting.vote(True):
            pass


def build(spec: ReplicaSpec, comm: Any) -> FakeLeader | FakeFollower:
    """This rank's part. ``comm`` None = rank 0 computes for all ranks. Raises the same TriremeError on every rank."""
    meeting = Meeting(comm)
    with all_or_none(comm):
        part = FakeLeader(spec, meeting) if comm is None or comm.Get_rank() == 0 else FakeFollower(meeting)
    return part
