"""Prompts that arrive during decoding on one GPU: time to the first token and step times, with captured steps and without, alternating.

python -m bench.gpu_mixed [--case 8b] [--case 8b-fp8] [--output FILE]

32 sequences decode; every eighth step a prompt joins, 40 of them, for 8 tokens each. One JSON line per prompt length and mode: medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu import CASES, spec_of, write_shape
from bench.gpu_rank import submits
from bench.report import commit, facts, record, say
from workers.artifacts.artifact import open_artifact
from workers.engines.portable import PortableEngine, build

ROWS, JOINERS, EVERY, TURNS = 32, 40, 8, 2
PROMPTS = (100, 400)


def played(engine: PortableEngine, vocab: int, prompt: int, seed: int) -> dict[str, float]:
    """One run: seconds in all, milliseconds to the first token of a new prompt (median) and of a step (median and 99th percentile)."""
    for i, submit in enumerate(submits(ROWS, 64, 360, vocab, seed)):
        engine.submit(i, submit)
    joiners = submits(JOINERS, prompt, 8, vocab, seed + 1)
    sent: dict[int, float] = {}
    firsts, steps = list[float](), list[float]()
    begin = time.perf_counter()
    while engine.busy():
        if len(steps) % EVERY == EVERY - 1 and len(sent) < JOINERS:
            id = ROWS + len(sent)
            engine.submit(id, joiners[len(sent)])
            sent[id] = time.perf_counter()
        start = time.perf_counter()
        emissions = engine.step()
        now = time.perf_counter()
        steps.append((now - start) * 1e3)
        firsts += [(now - sent[emission.id]) * 1e3 for emission in emissions if emission.first == 0 and emission.id in sent]
    late = sorted(steps)[int(0.99 * len(steps))]
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "ttft_ms": statistics.median(firsts), "step_ms": statistics.median(steps), "step_p99_ms": late}


def measured(name: str, folder: Path) -> list[dict[str, Any]]:
    case = CASES[name]
    spec = spec_of(case, write_shape(folder / case.shape, case.shape))
    vocab = open_artifact(spec.artifact, weights_optional=True).model.vocab_size
    engine = build(spec, None)
    assert isinstance(engine, PortableEngine)
    mixed = engine._runner._mixed  # type: ignore[attr-defined]
    fitting = mixed.size_for
    played(engine, vocab, PROMPTS[0], seed=0)
    lines = []
    for prompt in PROMPTS:
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for turn in range(TURNS):
            for captured, runs in found.items():
                mixed.size_for = fitting if captured else lambda least: None
                runs.append(played(engine, vocab, prompt, seed=100 * turn + prompt))
        for captured, runs in found.items():
            medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            subject = {"engine": "trireme", "gpu": torch.cuda.get_device_name(), "shape": case.shape, "quant": case.quant}
            lines.append(subject | {"workload": "joiners", "prompt": prompt, "captured": captured} | medians)
    engine.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", action="append", choices=[name for name, case in CASES.items() if case.parallel.world == 1])
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.case or ["8b"]:
            say(f"bench.gpu_mixed: {name}")
            for found in measured(name, Path(folder)):
                record(facts(args.commit) | found, args.output)


if __name__ == "__main__":
    main()
