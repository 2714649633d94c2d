"""``python -m workers.engines.trtllm ORDER``: the pre-flight of one node, run there by the gang's launcher before mpiexec.

Owns the process only: an order (JSON) in, a verdict (one line of JSON) out; the exit code is that of the first fault. Starts no MPI.
"""

from __future__ import annotations

import os
import sys

import msgspec

from workers.engines.trtllm import node_probe, preflight
from workers.engines.trtllm.engine_dir import is_engine_dir, read_engine_dir
from workers.protocol.errors import ArtifactError, ConfigError, ErrorReport, TriremeError
from workers.protocol.specs import EngineSpec, Parallel


class NodeCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The replica to run, and its placement."""

    artifact: str
    parallel: Parallel
    engine: EngineSpec
    placement: preflight.GangPlacement


class NodeVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """``faults``: the first one is the cause to show; none = ranks may start. ``notes``: checks that were not possible."""

    faults: tuple[ErrorReport, ...] = ()
    notes: tuple[str, ...] = ()


def judge(order: NodeCheck, path: str, visible: str | None) -> NodeVerdict:
    """Probe this node and compare. A failed probe is a fault too."""
    try:
        facts = node_probe.probe(path, visible)
        engine = read_engine_dir(order.artifact) if is_engine_dir(order.artifact) else None
    except TriremeError as error:
        return NodeVerdict(faults=(ErrorReport.of(error),))
    if not os.path.isdir(order.artifact):
        absent = ArtifactError(f"there is no model at {order.artifact}", "this node has no such folder", "share or copy it to every node")
        return NodeVerdict(faults=(ErrorReport.of(absent),))
    found = preflight.faults(engine, order.parallel, order.engine, facts, order.placement)
    return NodeVerdict(faults=tuple(map(ErrorReport.of, found)), notes=tuple(preflight.notes(engine, facts)))


def main(argv: list[str]) -> int:
    try:
        order = msgspec.json.decode(argv[0] if argv else "", type=NodeCheck)
    except msgspec.MsgspecError as error:
        print(ConfigError("this is not an order for a pre-flight", str(error), "the launcher writes it").lines(), file=sys.stderr)
        return ConfigError.exit_code
    verdict = judge(order, os.environ.get("PATH", os.defpath), os.environ.get("CUDA_VISIBLE_DEVICES"))
    print(msgspec.json.encode(verdict).decode())
    return verdict.faults[0].exit_code if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
