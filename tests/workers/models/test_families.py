"""Families' tiny models against transformers, as threads of this process: tp=2, and a pipeline of two stages one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.conformance import in_threads
from tests.support.families import EXPERTS, LONGEST, REPRESENTATIVE, case_named, family_logprobs, write_family
from workers.artifacts.artifact import open_artifact
from workers.distributed.group import Group
from workers.kernels.reference import attention_layout
from workers.layout.sharding import shard_of
from workers.models.decoder import DecoderStage
from workers.protocol.specs import Parallel
from workers.runner.kv_cache import KvCache
from workers.runner.weights import fill, load_shards

TP2_PP2 = Parallel(tp=2, pp=2)
WHOLE_EXPERTS = Parallel(tp=2, pp=2, expert_parallel=True)
TABLE = np.random.default_rng(0).permutation(16).astype(np.int32)[None, :]


def stage_of(folder: Path, parallel: Parallel, rank: int, group: Group) -> DecoderStage:
    """The stage of ``rank``, filled by the loader."""
    artifact = open_artifact(folder)
    shard = shard_of(artifact.model, parallel, rank)
    stage = DecoderStage(
        artifact.model, parallel, shard, group, dtype=torch.float32, device=torch.device("cpu"), positions=artifact.model.max_position
    )
    fill(stage.parameters(), load_shards(artifact, parallel, rank, "fp32"))
    stage.freeze()
    return stage


def logits_of(folder: Path, ids: torch.Tensor, chunks: list[int], parallel: Parallel = TP2_PP2) -> torch.Tensor:
    """[tokens, vocabulary] of one sequence that is computed in ``chunks``."""

    def member(group: Group) -> torch.Tensor:
        torch.set_num_threads(1)
        stages = [stage_of(folder, parallel, parallel.tp * pp_rank + group.rank, group) for pp_rank in range(parallel.pp)]
        model = stages[0].model
        caches = [KvCache(model, stage.shard, blocks=16, block_size=16, dtype=stage.dtype, device=stage.device) for stage in stages]
        found, start = [], 0
        with torch.inference_mode():
            for size in chunks:
                layout = attention_layout(np.array([start], np.int32), np.array([size], np.int32), TABLE, 16, windows=model.windows)
                hidden = stages[0].embed(ids[start : start + size])
                for stage, cache in zip(stages, caches, strict=True):
                    hidden = stage.forward(hidden, layout, cache.layers)
                found.append(stages[-1].logits(hidden)[:, : stages[-1].shard.vocab.size])
                start += size
        return torch.cat(found)

    return torch.cat(in_threads(parallel.tp, member), 1)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_family_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    folder = write_family(case_named(name), tmp_path)
    ids = torch.randint(0, 300, (LONGEST - 20,), generator=torch.Generator().manual_seed(1))
    (expected,) = family_logprobs(folder, [ids.tolist()])
    found = logits_of(folder, ids, [70, 1, 1, 9, 50, *[1] * (len(ids) - 131)]).log_softmax(-1)
    delta = float((found - expected).abs().max())
    assert delta <= 1e-4
    top = expected.topk(2, -1).values
    sure = top[:, 0] - top[:, 1] > 2e-4
    assert torch.equal(found.argmax(-1)[sure], expected.argmax(-1)[sure])


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_may_be_cut_or_dealt_whole_and_stored_apart_or_together(name: str, tmp_path: Path) -> None:
    apart, packed = (write_family(case_named(name), tmp_path / kind, packed=kind == "packed") for kind in ("apart", "packed"))
    ids = torch.randint(0, 300, (30,), generator=torch.Generator().manual_seed(1))
    (expected,) = family_logprobs(apart, [ids.tolist()])
    for folder, parallel in ((apart, TP2_PP2), (packed, WHOLE_EXPERTS)):
        found = logits_of(folder, ids, [20, 1, 9], parallel).log_softmax(-1)
        assert float((found - expected).abs().max()) <= 1e-4
