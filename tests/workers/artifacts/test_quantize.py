"""Quantized weights: each format's arithmetic, every layout's parts bitwise the unsharded model's, and folders that say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact, quant_for
from workers.artifacts.checkpoint import MANIFEST, Manifest, open_rank, read_checkpoint
from workers.artifacts.convert import convert
from workers.artifacts.inspect import inspect_path
from workers.artifacts.number_formats import FP8_MAX, to_fp8
from workers.artifacts.safetensors_file import hash_file
from workers.layout.quant_parts import stored_tensors, unit_of
from workers.layout.sharding import shard_tensors
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import Parallel, Quant, QuantName, quant_of

torch = pytest.importorskip("torch")
import msgspec  # noqa: E402

from tests.support.packed_weights import random_parts  # noqa: E402
from workers.kernels.linear import dequantize, emulate_fp8, product  # noqa: E402
from workers.runner.weights import fill, load_shards  # noqa: E402

FORMS: tuple[QuantName, ...] = ("int8", "int4", "fp8")
QUANTS = [quant_of("int8"), quant_of("int4", 32), quant_of("int4", 64), quant_of("fp8")]
#: Heads, key/value heads and FFN groups that few tps divide.
LAYOUTS = [Parallel(), Parallel(tp=2, pp=2), Parallel(tp=3), Parallel(tp=5, pp=3)]
Weights = dict[str, "torch.Tensor"]


def label(quant: Quant) -> str:
    return f"{quant.weights}{quant.group_size or ''}"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Six query and three key/value heads of 64; 448 FFN columns are 7 groups of 64.
    return tiny_model(tmp_path_factory.mktemp("hf"), hidden=192, heads=6, kv_heads=3, head_dim=64, ffn=448, layers=3, vocab=321)


def loaded(path: Path, parallel: Parallel, rank: int, quant: Quant | None = None) -> Weights:
    return dict(load_shards(open_artifact(path), parallel, rank, "fp32", quant))


def grouped(weights: Weights) -> dict[str, Weights]:
    """Parts by tensor: name without the last word → suffix → values."""
    found: dict[str, Weights] = {}
    for name, values in weights.items():
        stem, suffix = name.rsplit(".", 1)
        found.setdefault(stem, {})[suffix] = values
    return found


def plain(weights: Weights, form: QuantName) -> Weights:
    """fp32 weights that the parts mean, by checkpoint name."""
    return {
        f"{stem}.weight": dequantize(form, parts) if len(parts) > 1 else parts["weight"]
        for stem, parts in grouped(weights).items()
        if "weight" in parts
    }


def test_fp8_rounding_is_torchs() -> None:
    # Every sign, exponent and top mantissa bit, just below, at and just above each tie, as far as e4m3 reaches.
    high, low = np.meshgrid(np.arange(1 << 16, dtype=np.uint32) << 16, np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32))
    values = (high | low).reshape(-1).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) <= FP8_MAX)]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8)
    assert np.array_equal(to_fp8(values), expected.numpy())


@pytest.mark.parametrize("quant", QUANTS, ids=label)
def test_no_weight_is_further_from_its_own_than_half_a_step(quant: Quant, hf: Path) -> None:
    form = quant.weights
    assert form is not None
    expected, parts = loaded(hf, Parallel(), 0), loaded(hf, Parallel(), 0, quant)
    for stem, found in grouped(parts).items():
        if len(found) == 1:
            assert torch.equal(found["weight"], expected[f"{stem}.weight"]), "embedding and norms stay as they are"
            continue
        weight = expected[f"{stem}.weight"]
        distance = (dequantize(form, found) - weight).abs()
        if form == "int4":
            step = found["weights_scaling_factor"].float().repeat_interleave(quant.group_size or 0, 1)
            # Scale and zero are rounded to bf16: a group's outermost weights may lie that much outside its grid.
            assert (distance <= step * (0.5 + 16 * 2**-9)).all()
        elif form == "int8":
            assert (distance <= found["per_channel_scale"][:, None] * 0.5001).all()
        else:
            # Three mantissa bits: half a step is a sixteenth, and 2**-10 of the scale below the smallest normal number.
            assert (distance <= torch.maximum(weight.abs() / 16, found["per_channel_scale"][:, None] * 2**-10) * 1.0001).all()
        assert found["weight"].dtype == {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[form]


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_one_sided_weights(form: QuantName, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "hf", hidden=64, heads=1, kv_heads=1, head_dim=64, ffn=64, layers=1)
    weights = load_file(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name][:3] = 0
    weights[name][3] = np.linspace(0.9, 1.0, 64)
    weights[name][4] = -1e-42
    save_file(weights, str(folder / "model.safetensors"))
    found = plain(loaded(folder, Parallel(), 0, quant_of(form)), form)["transformer.layers.0.mlp.proj.weight"]
    assert not found[:3].any() and found[4].abs().max() <= 1e-42
    assert (found[3] - torch.from_numpy(weights[name][3])).abs().max() <= 0.51 / {"int8": 127, "int4": 15, "fp8": 8}[form]
    weights[name][0, 0] = np.nan
    save_file(weights, str(folder / "model.safetensors"))
    with pytest.raises(ArtifactError, match=r"mlp\.down_proj\.weight holds NaN"):
        loaded(folder, Parallel(), 0, quant_of(form))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tp{p.tp}pp{p.pp}")
@pytest.mark.parametrize("quant", QUANTS, ids=label)
def test_every_layouts_parts_are_slices_of_the_whole_models(quant: Quant, parallel: Parallel, hf: Path, tmp_path: Path) -> None:
    form = quant.weights
    assert form is not None
    model = open_artifact(hf).model
    single = convert(hf, tmp_path / "single", parallel=Parallel(), quant=quant)
    own = convert(hf, tmp_path / "own", parallel=parallel, quant=quant)
    again = convert(own, tmp_path / "again", parallel=Parallel(tp=2))
    back = convert(again, tmp_path / "back", parallel=parallel)
    assert (back / MANIFEST).read_bytes() == (own / MANIFEST).read_bytes()
    whole = plain(loaded(single, Parallel(), 0), form)
    for rank in range(parallel.world):
        expected = loaded(own, parallel, rank)
        for source, wanted in ((hf, quant), (single, None), (tiny_gguf(hf, tmp_path / "tiny.gguf"), quant)):
            found = loaded(source, parallel, rank, wanted)
            assert list(found) == list(expected)
            assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected), source
        mine = plain(expected, form)
        for stored in shard_tensors(model, parallel, rank, unit=unit_of(quant)):
            for piece, place in stored.places():
                if not piece.tensor.name.startswith("model.layers.") or len(stored.shape) != 2:
                    continue
                all_of_it = whole_tensor(whole, piece.tensor.name)
                cut = all_of_it.narrow(piece.tensor.axis, piece.span.start, piece.span.size)
                assert torch.equal(mine[stored.name].narrow(piece.tensor.axis, place.start, place.size), cut)


def whole_tensor(weights: Weights, name: str) -> torch.Tensor:
    """A Hugging Face tensor of the fixture's model out of its tp=1 pp=1 checkpoint."""
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem = f"transformer.layers.{layer}."
    module = rest.split(".")[1]
    if module in ("q_proj", "k_proj", "v_proj"):
        return weights[f"{stem}attention.qkv.weight"].split((384, 192, 192))["qkv".index(module[0])]
    names = {"o_proj": "attention.dense", "gate_proj": "mlp.fc", "up_proj": "mlp.gate", "down_proj": "mlp.proj"}
    return weights[f"{stem}{names[module]}.weight"]


def test_a_group_never_straddles_ranks(tmp_path: Path) -> None:
    # Heads of 32: a cut after an odd number of them is inside a group of 64. The FFN is distributed in groups, so it never is.
    folder = tiny_model(tmp_path / "hf", hidden=128, heads=6, kv_heads=3, head_dim=32, ffn=320, layers=1)
    model, target = open_artifact(folder).model, tmp_path / "ck"
    with pytest.raises(ConfigError, match=r"inputs 0\.\.32 of model\.layers\.0\.self_attn\.o_proj\.weight are no whole groups of 64"):
        convert(folder, target, parallel=Parallel(tp=5), quant=quant_of("int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    for quant in (quant_of("int4"), quant_of("fp8")):
        shares = [shard for rank in range(3) for shard in shard_tensors(model, Parallel(tp=3), rank, unit=unit_of(quant))]
        cuts = [shard.pieces[0].span for shard in shares if shard.name.endswith("mlp.proj.weight")]
        assert [cut.stop for cut in cuts[:-1]] == [cut.start for cut in cuts[1:]] and cuts[-1].stop == 320
        assert all(cut.start % unit_of(quant) == 0 for cut in cuts)
    with pytest.raises(ConfigError, match=r"has 192 inputs, not a multiple of 128"):
        stored_tensors(model, Parallel(), 0, dtype="fp32", quant=quant_of("int4", 128))
    with pytest.raises(ConfigError, match="more than the model's FFN"):
        stored_tensors(model, Parallel(tp=6), 0, dtype="fp32", quant=quant_of("int4", 64))


@pytest.mark.parametrize("quant", QUANTS[:2] + QUANTS[3:], ids=label)
def test_the_folder_says_what_it_is(quant: Quant, hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2), dtype="bf16", quant=quant)
    keys = json.loads((target / "config.json").read_text())["quantization"]
    assert keys["quant_algo"] == {"int8": "W8A16", "int4": "W4A16", "fp8": "FP8_PER_CHANNEL_PER_TOKEN"}[str(quant.weights)]
    assert keys.get("group_size") == quant.group_size and keys["has_zero_point"] is (quant.weights == "int4")
    artifact = open_artifact(target)
    assert (artifact.quant, artifact.dtype, quant_for(artifact, None)) == (quant, "bf16", quant)
    found = inspect_path(target, verify_files=True)
    assert found.quant == quant and found.runs and found.verified
    for rank, size in enumerate(found.rank_bytes):
        stored = load_bytes(target / f"rank{rank}.safetensors")
        assert size == sum(stored.values()) < 0.7 * inspect_path(hf, Parallel(tp=2)).rank_bytes[rank]
    again = convert(hf, tmp_path / "again", parallel=Parallel(tp=2), dtype="bf16", quant=quant)
    assert (again / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes()


def load_bytes(path: Path) -> dict[str, int]:
    header = path.read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}


def test_what_is_quantized_stays_so(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(), quant=quant_of("int8"))
    with pytest.raises(ArtifactError, match="quantized with W8A16 already"):
        convert(target, tmp_path / "other", parallel=Parallel(), quant=quant_of("int4"))
    with pytest.raises(ArtifactError, match="quantized with W8A16 already"):
        loaded(target, Parallel(), 0, quant_of("fp8"))
    with pytest.raises(ConfigError, match="--for-trtllm does not go with W8A16"):
        convert(hf, tmp_path / "trt", parallel=Parallel(), quant=quant_of("int8"), for_trtllm=True)
    assert "interleaves" in inspect_path(target).trtllm
    assert open_artifact(convert(hf, tmp_path / "trt", parallel=Parallel(), quant=quant_of("fp8"), for_trtllm=True)).quant.weights == "fp8"


def test_formats_of_others_are_refused(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(), quant=quant_of("int8"))
    config = json.loads((target / "config.json").read_text())
    config["quantization"] |= {"quant_algo": "W4A16_AWQ", "group_size": 128, "pre_quant_scale": True}
    rewrite(target, "config.json", json.dumps(config).encode())
    assert open_artifact(target).foreign
    with pytest.raises(ArtifactError, match="quantized with W4A16_AWQ"):
        loaded(target, Parallel(), 0)
    found = inspect_path(target)
    assert not found.runs and "only TensorRT-LLM" in found.reason


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and its row in the manifest: what another program, not a fault, would leave."""
    (folder / name).write_bytes(data)
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    files = manifest.files | {name: hash_file(folder / name)}
    (folder / MANIFEST).write_bytes(msgspec.json.encode(Manifest(format=manifest.format, files=files)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.layers.0.mlp.fc.zero"), r"lacks transformer\.layers\.0\.mlp\.fc\.zero"),
        (lambda w: w.update({"transformer.layers.0.mlp.fc.bias": np.zeros(2, np.float32)}), r"unknown tensor transformer\.layers\.0"),
        (lambda w: w.update({"transformer.layers.1.mlp.proj.weight": np.zeros((192, 224), np.int8)}), r"mlp\.proj\.weight is I8"),
    ],
)  # fmt: skip
def test_a_missing_scale_an_extra_tensor_and_another_format_are_errors(change: object, message: str, hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(), dtype="fp16", quant=quant_of("int4"))
    read = load_raw(target / "rank0.safetensors")
    change(read)  # type: ignore[operator]
    save_raw(tmp_path / "new", read)
    rewrite(target, "rank0.safetensors", (tmp_path / "new").read_bytes())
    with pytest.raises(ArtifactError, match=message):
        open_rank(read_checkpoint(target), 0)
    with pytest.raises(ArtifactError, match=message):
        dict(load_shards(open_artifact(target), Parallel(), 0, "fp32"))


def load_raw(path: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load

    return {name: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for name, t in load(path).items()}


def save_raw(path: Path, values: dict[str, np.ndarray]) -> None:
    from safetensors.torch import save_file as save

    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in values.items()}
    save({name: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for name, t in tensors.items()}, path)


def test_fill_converts_no_quantized_format() -> None:
    with pytest.raises(ArtifactError, match=r"a is torch\.float32.*expects torch\.int8"):
        fill({"a": torch.zeros(2, dtype=torch.int8)}, [("a", torch.zeros(2))])
    with pytest.raises(ArtifactError, match=r"a is torch\.float8_e4m3fn"):
        fill({"a": torch.zeros(2)}, [("a", torch.zeros(2, dtype=torch.float8_e4m3fn))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", QUANTS, ids=label)
def test_products_are_those_of_the_plain_weights(quant: Quant, dtype: torch.dtype) -> None:
    form = quant.weights
    assert form is not None
    for seed, (rows, outs, ins, biased) in enumerate([(1, 48, 64, True), (5, 33, 192, False), (70, 1000, 448, True)]):
        parts = random_parts(quant, outs, ins, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, ins, generator=generator).to(dtype)
        bias = torch.randn(outs, generator=generator).to(dtype) if biased else None
        found = product(form, parts, bias, dtype)(x)
        entering = emulate_fp8(x) if form == "fp8" else x.bfloat16()
        expected = entering.double() @ dequantize(form, parts).double().T
        expected = expected if bias is None else expected + bias.double()
        assert found.dtype == dtype and found.shape == expected.shape
        bound = 1e-6 if form == "fp8" and dtype == torch.float32 else 5e-3
        assert (found.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integer_weights_are_kept_exactly_and_sharded_sums_are_whole_ones(form: QuantName, tmp_path: Path) -> None:
    """Rows whose grid is the integers themselves: quantization loses nothing, and every layout's products match to the bit."""
    folder = tiny_model(tmp_path / "hf", hidden=128, heads=4, kv_heads=2, head_dim=64, ffn=320, layers=1, integers=True)
    weights = load_file(str(folder / "model.safetensors"))
    low, high = (-127, 127) if form == "int8" else (-8, 7)
    generator = np.random.default_rng(1)
    for name, values in weights.items():
        if "_proj" in name:
            drawn = generator.integers(low, high + 1, values.shape)
            # Both ends are met in every group, so that the grid is the integers' own.
            drawn[:, ::32], drawn[:, 1::32] = low, high
            weights[name] = drawn.astype(np.float32)
    save_file(weights, str(folder / "model.safetensors"))
    quant = quant_of(form, 32 if form == "int4" else None)
    for tp in (1, 2, 3):
        parallel = Parallel(tp=tp)
        sums, hidden = torch.zeros(3, 128), torch.zeros(3, 320)
        # Sums of two weights are integers that bf16, in which products answer, still tells apart.
        hidden.scatter_(1, torch.from_numpy(generator.integers(0, 160, (3, 1)) + np.array([[0, 160]])), 1.0)
        for rank in range(tp):
            parts = grouped(loaded(folder, parallel, rank, quant))["transformer.layers.0.mlp.proj"]
            shard = next(s for s in shard_tensors(open_artifact(folder).model, parallel, rank, unit=unit_of(quant)) if "mlp.proj" in s.name)
            span = shard.pieces[0].span
            assert torch.equal(
                dequantize(form, parts), torch.from_numpy(weights["model.layers.0.mlp.down_proj.weight"])[:, span.start : span.stop]
            )
            sums += product(form, parts, None, torch.float32)(hidden[:, span.start : span.stop].contiguous())
        assert torch.equal(sums, hidden @ torch.from_numpy(weights["model.layers.0.mlp.down_proj.weight"]).T)
