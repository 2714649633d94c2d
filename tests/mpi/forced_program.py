"""The default model on tp * pp ranks, fed prompts and then forced tokens; every last-stage rank compares its logits with a file's.

Run by ``test_default_model.py`` under mpiexec. The file holds [prompts, steps + 1, vocab] fp32 logits; the report, differences and choices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
from mpi4py import MPI

from workers.distributed.rank_groups import split
from workers.protocol.messages import SamplingParams
from workers.protocol.specs import ReplicaSpec
from workers.runner.bring_up import bring_up
from workers.scheduler.step_plan import OpenSlot, StepPlan, column, view


def main() -> None:
    arguments = json.loads(sys.argv[1])
    spec = msgspec.convert(arguments["spec"], ReplicaSpec)
    prompts, forced = arguments["prompts"], arguments["forced"]
    comm = MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() > 1 else None
    context = split(spec, comm)
    built = bring_up(spec, context)
    shard, stage, size = built.shard, built.runner.stage, built.capacity.block_size
    reference = np.load(arguments["logits"], mmap_mode="r")
    seen: list[torch.Tensor] = []
    plain = stage.logits
    stage.logits = lambda hidden: seen.append(plain(hidden)) or seen[-1].clone()
    need = [-(-(len(p) + len(f)) // size) for p, f in zip(prompts, forced, strict=True)]
    chosen: list[list[int]] = []
    worst = scale = 0.0

    def step(plan: StepPlan, at: int) -> None:
        nonlocal worst, scale
        answer = built.runner.issue(plan)
        if not shard.last or answer is None:
            return
        result = answer.result()
        chosen.append(view(result.tokens).tolist())
        expected = torch.from_numpy(np.array(reference[:, at, shard.vocab.start : shard.vocab.stop]))
        found = seen.pop()[:, : shard.vocab.size]
        worst = max(worst, float((found - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))

    everyone = list(range(len(prompts)))
    plan = StepPlan(
        step=1,
        slots=column(everyone),
        starts=column([0] * len(prompts)),
        lengths=column([len(prompt) for prompt in prompts]),
        tokens=column([token for prompt in prompts for token in prompt]),
        sample=column([1] * len(prompts)),
        block_slots=column([row for row in everyone for _ in range(need[row])]),
        block_ids=column(list(range(sum(need)))),
        opened=[OpenSlot(row, SamplingParams(temperature=0.0), len(prompt)) for row, prompt in enumerate(prompts)],
    )
    step(plan, 0)
    for at in range(len(forced[0])):
        plan = StepPlan(
            step=at + 2,
            slots=column(everyone),
            starts=column([len(p) + at for p in prompts]),
            lengths=column([1] * len(prompts)),
            tokens=column([f[at] for f in forced]),
            sample=column([1] * len(prompts)),
        )
        step(plan, at + 1)
    if shard.last:
        report = {
            "delta": worst,
            "scale": scale,
            "steps": chosen,
            "rss_mb": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6,
        }
        Path(f"{arguments['report']}.{shard.tp_rank}").write_text(json.dumps(report))
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.Get_rank() == 0:
        Path(arguments["report"]).write_text("{}")


if __name__ == "__main__":
    main()
