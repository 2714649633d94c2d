"""Loading: each rank gets exactly its slices from every kind of artifact, holds them once, and refuses what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.tiny_models import tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact
from workers.artifacts.convert import convert
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import Parallel

torch = pytest.importorskip("torch")
from workers.runner.weights import fill, load_shards  # noqa: E402


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hf"), vocab=321, layers=3)


@pytest.fixture(scope="module")
def whole(hf: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in load_file(str(hf / "model.safetensors")).items()}


def shards(path: Path, parallel: Parallel, rank: int, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    return dict(load_shards(open_artifact(path), parallel, rank, dtype))  # type: ignore[arg-type]


def test_slices_written_out_by_hand(hf: Path, whole: dict[str, torch.Tensor]) -> None:
    # 6 query and 3 key/value heads of 8 rows over tp=2: q0-3 with kv0-1, q4-5 with kv2; layers 2 + 1 over pp=2.
    parallel = Parallel(tp=2, pp=2)
    got = [shards(hf, parallel, rank) for rank in range(4)]
    for layer, stage, local in ((0, 0, 0), (1, 0, 1), (2, 1, 0)):
        source, name = f"model.layers.{layer}.", f"transformer.layers.{local}."
        q, k, v = (whole[f"{source}self_attn.{x}_proj.weight"] for x in "qkv")
        low, high = got[stage * 2], got[stage * 2 + 1]
        assert torch.equal(low[name + "attention.qkv.weight"], torch.cat([q[:32], k[:16], v[:16]]))
        assert torch.equal(high[name + "attention.qkv.weight"], torch.cat([q[32:], k[16:], v[16:]]))
        dense = whole[source + "self_attn.o_proj.weight"]
        assert torch.equal(low[name + "attention.dense.weight"], dense[:, :32])
        assert torch.equal(high[name + "attention.dense.weight"], dense[:, 32:])
        gate, up, down = (whole[f"{source}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        assert torch.equal(high[name + "mlp.fc.weight"], gate[48:])
        assert torch.equal(high[name + "mlp.gate.weight"], up[48:])
        assert torch.equal(low[name + "mlp.proj.weight"], down[:, :48])
        assert torch.equal(low[name + "input_layernorm.weight"], whole[source + "input_layernorm.weight"])
        assert torch.equal(high[name + "post_layernorm.weight"], whole[source + "post_attention_layernorm.weight"])
    embedding = whole["model.embed_tokens.weight"]
    padded = torch.cat([embedding, torch.zeros(1, 48)])
    for stage, name in ((0, "transformer.vocab_embedding.weight"), (1, "lm_head.weight")):
        assert torch.equal(torch.cat([got[stage * 2][name], got[stage * 2 + 1][name]]), padded)
    assert torch.equal(got[3]["transformer.ln_f.weight"], whole["model.norm.weight"])
    assert "transformer.ln_f.weight" not in got[0] and "lm_head.weight" not in got[1]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2, pp=2), Parallel(tp=4, pp=3)], ids=lambda p: f"tp{p.tp}pp{p.pp}")
def test_every_source_gives_the_same_shards(architecture: str, parallel: Parallel, tmp_path: Path) -> None:
    hf = tiny_model(tmp_path / "hf", architecture=architecture, layers=3, tied=architecture != "llama")
    sources = [
        convert(hf, tmp_path / "own", parallel=parallel),
        convert(hf, tmp_path / "single", parallel=Parallel()),
        tiny_gguf(hf, tmp_path / "tiny.gguf"),
    ]
    for rank in range(parallel.world):
        expected = shards(hf, parallel, rank)
        for source in sources:
            got = shards(source, parallel, rank)
            assert list(got) == list(expected)
            assert all(torch.equal(got[name], expected[name]) for name in expected), source


@pytest.mark.parametrize(("stored", "wanted"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "bf16")])
def test_number_formats_are_converted_while_loading(hf: Path, stored: str, wanted: str, tmp_path: Path) -> None:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    source = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2), dtype=stored)  # type: ignore[arg-type]
    original, got = shards(hf, Parallel(tp=2), 1), shards(source, Parallel(tp=2), 1, wanted)
    for name, values in got.items():
        assert values.dtype == types[wanted]
        assert torch.equal(values, original[name].to(types[stored]).to(types[wanted])), name


def test_a_head_kept_for_tensorrt_llm_is_not_loaded_twice(hf: Path, tmp_path: Path) -> None:
    source = convert(hf, tmp_path / "ck", parallel=Parallel(tp=3), for_trtllm=True)
    assert list(shards(source, Parallel(tp=3), 0)) == list(shards(hf, Parallel(tp=3), 0))


def test_another_layout_names_both(hf: Path, tmp_path: Path) -> None:
    source = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2))
    with pytest.raises(ArtifactError, match="is for tp=2 pp=1, the replica has tp=1 pp=2"):
        load_shards(open_artifact(source), Parallel(pp=2), 0, "fp32")


def test_damage_is_found_before_the_first_tensor(hf: Path, tmp_path: Path) -> None:
    artifact = open_artifact(convert(hf, tmp_path / "ck", parallel=Parallel(tp=2)))
    path = tmp_path / "ck" / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    load_shards(artifact, Parallel(tp=2), 0, "fp32")
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors is damaged: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        load_shards(artifact, Parallel(tp=2), 1, "fp32")
    path.write_bytes(data[:-8])
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors has another size"):
        load_shards(artifact, Parallel(tp=2), 1, "fp32")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors is missing"):
        load_shards(artifact, Parallel(tp=2), 1, "fp32")


def test_fill_copies_and_converts(hf: Path) -> None:
    stream = shards(hf, Parallel(), 0)
    params = {name: torch.full_like(values, torch.nan, dtype=torch.float64) for name, values in stream.items()}
    fill(params, load_shards(open_artifact(hf), Parallel(), 0, "fp32"))
    assert all(torch.equal(params[name], stream[name].double()) for name in stream)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"the weights hold a"),
        ({"a": (2, 2), "b": (1,)}, r"the weights lack b"),
        ({"a": (4,)}, r"a has shape \[2, 2\].*\[4\]"),
    ],
)
def test_fill_leaves_nothing_unread_or_unfilled(params: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        fill({name: torch.zeros(shape) for name, shape in params.items()}, [("a", torch.zeros(2, 2))])


def test_fill_refuses_a_tensor_met_twice() -> None:
    with pytest.raises(ArtifactError, match="twice"):
        fill({"a": torch.zeros(1)}, [("a", torch.zeros(1)), ("a", torch.zeros(1))])


def memory(key: str) -> int:
    """A size of this process, bytes: VmRSS now, VmHWM the largest since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_a_shard_is_in_memory_once(kind: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf", hidden=512, heads=8, kv_heads=8, head_dim=64, ffn=2048, layers=8, vocab=2048)
    if kind == "checkpoint":
        path = convert(path, tmp_path / "ck", parallel=Parallel())
    artifact = open_artifact(path)
    params = {name: torch.ones_like(values) for name, values in load_shards(artifact, Parallel(), 0, "fp32")}
    size = sum(values.nbytes for values in params.values())
    largest = max(values.nbytes for values in params.values())
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the memory high-water mark")
    before = memory("VmRSS")
    fill(params, load_shards(artifact, Parallel(), 0, "fp32"))
    # In place, beside one tensor and the pages of the file that it came from; nothing stays.
    assert memory("VmHWM") - before < 2 * largest + (24 << 20) < size // 2
    assert memory("VmRSS") - before < 24 << 20
