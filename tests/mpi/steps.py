"""A fixed set of steps over hand-made plans: prefill in chunks, mixed batches, decode, greedy and sampled sequences."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.reference.shards import make_runner
from workers.distributed.group import Group
from workers.models.decoder import DecoderStage
from workers.protocol.messages import SamplingParams
from workers.scheduler.step_plan import OpenSlot, StepPlan, column, encode

PARAMS = (
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5, logprobs=2),
    SamplingParams(temperature=1.0, seed=6, repetition_penalty=1.2),
)
STEPS = 8


def prompt(sequence: int) -> list[int]:
    return [(13 * sequence + 7 * i) % 300 for i in range(9 + 12 * sequence)]


def plans() -> list[StepPlan]:
    """Sequence 2's prompt comes in two chunks, the second together with decodes; tokens are forced, so that layouts can't drift apart."""
    lengths = [len(prompt(sequence)) for sequence in range(3)]
    blocks = [(sequence, 4 * sequence + i) for sequence in range(3) for i in range(4)]
    found = [
        StepPlan(
            step=1,
            slots=column([0, 1, 2]),
            starts=column([0, 0, 0]),
            lengths=column([lengths[0], lengths[1], 20]),
            tokens=column([*prompt(0), *prompt(1), *prompt(2)[:20]]),
            sample=column([1, 1, 0]),
            block_slots=column([slot for slot, _ in blocks]),
            block_ids=column([block for _, block in blocks]),
            opened=[
                OpenSlot(sequence, PARAMS[sequence], lengths[sequence], column(prompt(sequence)) if sequence == 2 else b"")
                for sequence in range(3)
            ],
        ),
        StepPlan(
            step=2,
            slots=column([1, 2, 0]),
            starts=column([lengths[1], 20, lengths[0]]),
            lengths=column([1, lengths[2] - 20, 1]),
            tokens=column([31, *prompt(2)[20:], 30]),
            sample=column([1, 1, 1]),
        ),
    ]
    for step in range(STEPS):
        starts = [lengths[0] + 1 + step, lengths[1] + 1 + step, lengths[2] + step]
        tokens = [(17 * step + sequence) % 300 for sequence in range(3)]
        found.append(
            StepPlan(
                step=3 + step,
                slots=column([0, 1, 2]),
                starts=column(starts),
                lengths=column([1, 1, 1]),
                tokens=column(tokens),
                sample=column([1, 1, 1]),
            )
        )
    return found


def play(stage: DecoderStage, *, tensor: Group, pipeline: Group) -> tuple[list[torch.Tensor], list[bytes]]:
    """(this rank's logits of every step, encoded results); empty but on the last stage."""
    logits: list[torch.Tensor] = []
    if stage.shard.last:
        plain = stage.logits

        def recording(hidden: torch.Tensor) -> torch.Tensor:
            logits.append(plain(hidden))
            return logits[-1].clone()

        stage.logits = recording  # type: ignore[method-assign]
    runner = make_runner(stage, tensor=tensor, pipeline=pipeline, slots=4)
    results = [runner.run(plan) for plan in plans()]
    return logits, [encode(result) for result in results if result is not None]


def write_played(file: Path, played: tuple[list[torch.Tensor], list[bytes]]) -> None:
    """What :func:`play` gave, as one safetensors file: logits by step, results in hex beside them."""
    logits, results = played
    tensors = {f"{step:04d}": tensor.contiguous() for step, tensor in enumerate(logits)}
    save_file(tensors, file, {f"{step:04d}": result.hex() for step, result in enumerate(results)})


def read_played(file: Path) -> tuple[list[torch.Tensor], list[bytes]]:
    with safe_open(file, "pt") as found:
        metadata = found.metadata() or {}
        return [found.get_tensor(name) for name in sorted(found.keys())], [bytes.fromhex(metadata[name]) for name in sorted(metadata)]
