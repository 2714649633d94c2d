"""The portable engine over real ranks: the same tokens as one rank, a clean end, and one clean error when any rank cannot load."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.mpi.world import run
from tests.reference.engine import request, serve
from tests.support.tiny_models import tiny_model
from workers.artifacts.convert import convert
from workers.engines.portable import build
from workers.protocol.messages import SamplingParams, Submit
from workers.protocol.specs import Parallel, PortableSpec, ReplicaSpec

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), heads=9, kv_heads=3, vocab=331, layers=5)


def spec(artifact: Path, parallel: Parallel, **engine: object) -> ReplicaSpec:
    settings = PortableSpec(kv_tokens=2048, max_batch_size=16, max_num_tokens=64, **engine)  # type: ignore[arg-type]
    return ReplicaSpec(name="r", model="m", artifact=str(artifact), parallel=parallel, engine=settings)


def requests() -> list[Submit]:
    kinds = (
        SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=10, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=7, ignore_eos=True, logprobs=2),
    )
    return [request([(7 * i + 3 * j) % 300 for j in range(4 + 9 * i)], kinds[i % 3], id=i) for i in range(12)]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_say_what_one_rank_says(folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    alone = serve(build(spec(folder, Parallel()), None), requests())  # type: ignore[arg-type]
    report = tmp_path / "report.json"
    arguments = {"spec": msgspec.to_builtins(spec(folder, Parallel(tp=tp, pp=pp))), "requests": msgspec.to_builtins(requests())}
    found = run(tp * pp, "tests.mpi.engine_program", report, arguments)
    assert found["free"] and found["hits"] > 0
    for which in ("tokens", "again"):
        for i, (tokens, stream) in enumerate(zip(found[which], alone, strict=True)):
            if tokens != stream.tokens:
                parted = next(p for p, (a, b) in enumerate(zip(tokens, stream.tokens, strict=False)) if a != b)
                print(f"{which} {i} parted at {parted}: gap {found['gaps'][i][parted]:.2e}")
                assert i % 3 == 0 and found["gaps"][i][parted] < 1e-3
    for rank in range(tp * pp):
        print(f"rank {rank}:", Path(f"{report}.{rank}").read_text())


def test_fixed_shapes_are_bitwise_on_ranks_too(folder: Path, tmp_path: Path) -> None:
    """The second run finds prefixes in the cache and other batch mates' timing; tokens must not move at all."""
    arguments = {
        "spec": msgspec.to_builtins(spec(folder, Parallel(tp=2), fixed_shape=True)),
        "requests": msgspec.to_builtins(requests()),
    }
    found = run(2, "tests.mpi.engine_program", tmp_path / "report.json", arguments)
    assert found["tokens"] == found["again"]


def test_one_corrupt_shard_is_one_clean_error_everywhere(folder: Path, tmp_path: Path) -> None:
    parallel = Parallel(tp=2, pp=2)
    artifact = tmp_path / "checkpoint"
    convert(folder, artifact, parallel=parallel, dtype="fp32")
    shard = artifact / "rank2.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0xFF
    shard.write_bytes(data)
    report = tmp_path / "report.json"
    run(4, "tests.mpi.engine_program", report, {"spec": msgspec.to_builtins(spec(artifact, parallel)), "requests": []})
    errors = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(4)]
    assert {error["code"] for error in errors} == {"artifact_error"}
    assert all("rank2.safetensors" in error["message"] for error in errors), errors
