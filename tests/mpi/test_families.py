"""Every family and rope on real MPI ranks, tp 1, 2, 3 (uneven) by pp 1, 2: log-probabilities and greedy tokens are transformers'.

Prompts are longer than windows, original contexts and blocks. Chunks, preemption and prefix hits are part of every run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.mpi.world import run
from tests.reference.engine import request
from tests.support.families import CASES, LONGEST, FamilyCase, family_logprobs, write_family
from workers.protocol.messages import SamplingParams, Submit
from workers.protocol.specs import Parallel, PortableSpec, ReplicaSpec

pytestmark = [pytest.mark.mpi, pytest.mark.families, pytest.mark.timeout(900)]
LAYOUTS = [Parallel(tp=tp, pp=pp) for tp in (1, 2, 3) for pp in (1, 2)]
#: Beside those, with experts distributed whole.
WHOLE_EXPERTS = [Parallel(tp=2, pp=2, expert_parallel=True), Parallel(tp=3, pp=1, expert_parallel=True)]
#: Families that share one world: ranks take long to start, and a world has only so many communicators.
WORLD = 6
TOKENS = 8
#: Bound of log-probabilities. The best two must be further apart than twice of it before another choice counts as wrong.
BOUND = 1e-4


def draw(start: int, stop: int) -> list[int]:
    """Some tokens of one text, so that prompts begin alike."""
    return torch.randint(0, 300, (LONGEST,), generator=torch.Generator().manual_seed(3)).tolist()[start:stop]


#: The first two fill the cache with their prompts and then need more.
TOGETHER = [draw(0, 76), draw(30, 101), draw(20, 40), draw(0, 120)]
#: The second one begins as the first one does.
IN_TURN = [draw(0, 120), draw(0, 90) + draw(0, 9)]


def layouts_of(case: FamilyCase) -> dict[str, Parallel]:
    """The layouts of a case by their names."""
    return {layout.words: layout for layout in (*LAYOUTS, *(WHOLE_EXPERTS if case.experts else ()))}


def submits(prompts: list[list[int]], **params: Any) -> list[Submit]:
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, **params)
    return [request(prompt, sampling, id=i) for i, prompt in enumerate(prompts)]


def spec(case: FamilyCase, folder: Path, parallel: Parallel) -> ReplicaSpec:
    # A prompt of 120 tokens is three chunks; three such sequences do not fit the cache.
    engine = PortableSpec(kv_tokens=case.served, block_size=8, max_batch_size=4, max_num_tokens=48, max_seq_len=case.served)
    return ReplicaSpec(name="r", model="m", artifact=str(folder), parallel=parallel, engine=engine)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives (folder, reports by layout) of a case; a world plays several cases."""

    @cache
    def world(first: int) -> tuple[dict[str, Path], Any]:
        made = tmp_path_factory.mktemp("families")
        cases = CASES[first : first + WORLD]
        folders = {case.name: write_family(case, made / case.name) for case in cases}
        specs = {
            f"{case.name} {name}": msgspec.to_builtins(spec(case, folders[case.name], layout))
            for case in cases
            for name, layout in layouts_of(case).items()
        }
        arguments = {
            "specs": specs,
            "together": msgspec.to_builtins(submits(TOGETHER, prompt_logprobs=1)),
            "in_turn": msgspec.to_builtins(submits(IN_TURN)),
        }
        ranks = max(parallel.world for parallel in LAYOUTS)
        return folders, run(ranks, "tests.mpi.families_program", made / "report.json", arguments, bound_s=600.0)

    def of(case: FamilyCase) -> tuple[Path, dict[str, Any]]:
        folders, reports = world(CASES.index(case) // WORLD * WORLD)
        return folders[case.name], {name: reports[f"{case.name} {name}"] for name in layouts_of(case)}

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_is_what_transformers_computes_on_every_layout(case: FamilyCase, played: Any) -> None:
    folder, reports = played(case)
    told = {name: [*zip(TOGETHER + IN_TURN, each["together"] + each["in turn"], strict=True)] for name, each in reports.items()}
    sequences = sorted({(*prompt, *answer["tokens"]) for pairs in told.values() for prompt, answer in pairs})
    expected = dict(zip(sequences, family_logprobs(folder, [list(each) for each in sequences]), strict=True))
    for layout, pairs in told.items():
        assert reports[layout]["preempted"] > 0 and reports[layout]["hits"] > 0, layout
        worst = 0.0
        for prompt, answer in pairs:
            tokens, wanted = answer["tokens"], expected[*prompt, *answer["tokens"]]
            rows = wanted[len(prompt) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert len(tokens) == TOKENS and bool((rows.max(1).values - chosen <= 2 * BOUND).all()), (layout, len(prompt))
            worst = max(worst, float((chosen - torch.tensor(answer["logprobs"])).abs().max()))
            if answer["prompt"] is not None:
                before = wanted[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
                worst = max(worst, float((before - torch.tensor(answer["prompt"][1:])).abs().max()))
        assert worst <= BOUND, layout
        print(f"{case.name} {layout}: log-probabilities differ by {worst:.1e} at most")
