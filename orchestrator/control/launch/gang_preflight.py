"""Pre-flight of a gang: every node checks itself before mpiexec starts, and the first refusal ends the launch.

Only TensorRT-LLM needs it: with an engine that does not fit its node, it fails late or hangs. Owns nothing; the checks are
`workers.engines.trtllm.preflight`, run on each node by its own Python. Must never wait without a bound.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from orchestrator.control.launch.launcher import GangSpec
from workers.protocol.errors import EnvironmentFault, ErrorReport
from workers.protocol.specs import TrtllmSpec

log = logging.getLogger("trireme.launch")
#: Longest check of one node, seconds: a Python start and an nvidia-smi on a busy node.
LOOK_S = 120.0


class PreflightNode(Protocol):
    """A node that runs a short command to its end."""

    address: str
    ranks: int

    def ask(self, tag: str, argv: Sequence[str], env: Mapping[str, str], bound_s: float) -> tuple[int, str]:
        """(exit code, stdout). Raises EnvironmentFault when it cannot be run or takes too long."""


class _Verdict(msgspec.Struct):
    faults: tuple[ErrorReport, ...] = ()
    notes: tuple[str, ...] = ()


def needed(spec: GangSpec) -> bool:
    return isinstance(spec.replica.engine, TrtllmSpec)


def inspect(spec: GangSpec, nodes: Sequence[PreflightNode], *, family: str, tag: str, env: Mapping[str, str]) -> None:
    """Let all nodes check themselves at the same time. Raises the refusal of the first such node in rank order, with the node's name."""
    with ThreadPoolExecutor(len(nodes), "pre-flight") as pool:
        verdicts = list(pool.map(lambda index: _ask(spec, nodes, index, family, tag, env), range(len(nodes))))
    for node, verdict in zip(nodes, verdicts, strict=True):
        for note in verdict.notes:
            log.info("replica %s on %s: %s", spec.replica.name, node.address, note)
        if verdict.faults:
            error = verdict.faults[0].error()
            error.why = f"node {node.address}: {error.why}" if error.why else f"node {node.address}"
            raise error


def _ask(spec: GangSpec, nodes: Sequence[PreflightNode], index: int, family: str, tag: str, env: Mapping[str, str]) -> _Verdict:
    replica, node = spec.replica, nodes[index]
    order = {
        "artifact": replica.artifact,
        "parallel": replica.parallel,
        "engine": replica.engine,
        "placement": {"ranks": [each.ranks for each in nodes], "node": index, "mpi": family},
    }
    argv = [*spec.command[:-1], f"{spec.command[-1]}.engines.trtllm", msgspec.json.encode(order).decode()]
    code, said = node.ask(tag, argv, env, LOOK_S)
    try:
        return msgspec.json.decode(said.strip().rpartition("\n")[2], type=_Verdict)
    except msgspec.DecodeError:
        why = f"it ended with code {code} and said: {said.strip()[-200:] or 'nothing'}"
        raise EnvironmentFault(f"node {node.address} could not check itself", why, "install trireme-llm there as it is here") from None
