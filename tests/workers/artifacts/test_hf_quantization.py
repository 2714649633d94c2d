"""Weights that other tools quantized: every form means what its definition says, for every layout; what is not read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.examples import examples
from tests.support.quantized_folders import TOOLS, numpy_of, pack, quantized_folder
from tests.support.tiny_models import tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.convert import convert
from workers.artifacts.hf_quantization import read_scheme
from workers.artifacts.inspect import inspect_path
from workers.artifacts.number_formats import from_fp8
from workers.artifacts.stored_forms import _AWQ_ORDER, _unpack
from workers.layout.quant_parts import parts_of
from workers.layout.sharding import Span
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import PLAIN, Parallel, quant_of
from workers.runner.weights import load_shards

UP = "model.layers.1.mlp.up_proj."
NATIVE = {
    "fp8 tensor": "fp8",
    "fbgemm fp8": "fp8",
    "modelopt fp8": "fp8",
    "ct fp8 tensor": "fp8",
    "ct fp8 rows": "fp8",
    "ct int8 rows": "int8",
}


def model(folder: Path) -> Path:
    """A model whose inputs are whole groups of 16, and whose MLP a multiple of what FP8 wants."""
    return tiny_model(folder, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, tied=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_form_means_its_plain_weights(tool: str, tmp_path: Path) -> None:
    quantized, dequantized = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS[tool])
    artifact, plain = open_artifact(quantized), open_artifact(dequantized)
    assert artifact.quant == (quant_of(NATIVE[tool]) if tool in NATIVE else PLAIN)
    assert bool(artifact.dequantized) == (tool not in NATIVE)
    for parallel in (Parallel(), Parallel(tp=2, pp=2), Parallel(tp=3)):
        for rank in range(parallel.world):
            meant = dict(load_shards(plain, parallel, rank, "fp32"))
            found = dict(load_shards(artifact, parallel, rank, "fp32"))
            for name, tensor in meant.items():
                torch.testing.assert_close(computed(found, name), tensor, rtol=1e-6, atol=0)


def computed(found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight that an engine computes with: element times the scale of its row."""
    scale = found.get(f"{name.removesuffix('weight')}per_channel_scale")
    return found[name] if scale is None else found[name].float() * scale[:, None]


@settings(max_examples=examples(30), deadline=None)
@given(st.data())
def test_any_part_of_a_tensor_is_a_part_of_the_whole(data: st.DataObject) -> None:
    tool = TOOLS[data.draw(st.sampled_from(sorted(TOOLS)))]
    scheme = read_scheme(Path("/nowhere"), {"quantization_config": tool.config})
    assert scheme is not None
    form = scheme.form_of("model.layers.0.mlp.up_proj")
    assert form is not None
    layer = tool.write(torch.Generator().manual_seed(1), 48, 64)
    formats = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    rows, columns = (Span(*sorted(data.draw(st.tuples(*2 * [st.integers(0, size)]).filter(lambda p: p[0] != p[1])))) for size in (48, 64))
    values = form.values(lambda name: (numpy_of(layer.tensors[name]), formats.get(layer.tensors[name].dtype, "int32")), rows, columns)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, layer.values[rows.start : rows.stop, columns.start : columns.stop].numpy(), rtol=3e-7, atol=0)


@settings(max_examples=examples(20), deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), axis=st.sampled_from([0, 1]), seed=st.integers(0, 99))
def test_words_are_read_as_they_are_packed(bits: int, axis: int, seed: int) -> None:
    integers = torch.randint(0, 1 << bits, (40, 24), generator=torch.Generator().manual_seed(seed))
    words = pack(integers, bits, axis).numpy()
    assert np.array_equal(_unpack(words, bits, Span(3, 21), axis=axis), integers.numpy()[:, 3:21] if axis == 1 else integers.numpy()[3:21])
    awq = pack(integers & 15, 4, 1, (0, 2, 4, 6, 1, 3, 5, 7)).numpy()
    assert np.array_equal(_unpack(awq, 4, Span(5, 19), axis=1, order=_AWQ_ORDER), (integers & 15).numpy()[:, 5:19])


def test_every_fp8_number() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(from_fp8(bits.numpy()), bits.view(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize(
    "tool", ["ct int4", "ct int4 zeros", "ct int8 packed rows", "ct int8 rows", "ct int8 zeros", "ct fp8 rows", "ct fp8 tensor"]
)
def test_compressed_tensors_itself_reads_the_same(tool: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    config = TOOLS[tool].config
    keys = {key: value for key, value in config["config_groups"]["group_0"]["weights"].items() if key != "input_activations"}
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=schemes.QuantizationArgs(**keys))
    layer = TOOLS[tool].write(torch.Generator().manual_seed(2), 48, 64)
    read = compressors.BaseCompressor.get_value_from_registry(config["format"]).decompress(
        {**layer.tensors, "weight_scale": layer.tensors["weight_scale"].float()}, scheme
    )
    torch.testing.assert_close(read["weight"].double(), layer.values, rtol=1e-6, atol=1e-7)


def test_layers_that_stay_plain_are_found_by_their_files(tmp_path: Path) -> None:
    quantized, dequantized = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["ct fp8 rows"], keep=("layers.0.", "down_proj"))
    artifact = open_artifact(quantized)
    assert artifact.quant == PLAIN and artifact.dequantized == "compressed-tensors (fp8, a scale a row)"
    meant = dict(load_shards(open_artifact(dequantized), Parallel(), 0, "fp32"))
    for name, tensor in load_shards(artifact, Parallel(), 0, "fp32"):
        torch.testing.assert_close(tensor, meant[name], rtol=1e-6, atol=0)


def test_a_head_may_be_quantized_too(tmp_path: Path) -> None:
    quantized, dequantized = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["ct int8 rows"])
    layer = TOOLS["ct int8 rows"].write(torch.Generator().manual_seed(5), 320, 64)
    for folder, tensors in (
        (quantized, {f"lm_head.{k}": v for k, v in layer.tensors.items()}),
        (dequantized, {"lm_head.weight": layer.values.float()}),
    ):
        path = folder / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if k != "lm_head.weight"} | tensors, path)
    found, meant = (dict(load_shards(open_artifact(folder), Parallel(), 0, "fp32")) for folder in (quantized, dequantized))
    torch.testing.assert_close(found["lm_head.weight"], meant["lm_head.weight"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tool", ["awq", "ct fp8 rows", "fp8 blocks"])
def test_a_quantized_folder_becomes_a_checkpoint(tool: str, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS[tool])
    target = convert(quantized, tmp_path / "out", parallel=Parallel(tp=2))
    artifact, source = open_artifact(target), open_artifact(quantized)
    assert artifact.quant.weights == source.quant.weights
    for rank in range(2):
        wanted = dict(load_shards(source, Parallel(tp=2), rank, source.dtype))
        for name, tensor in load_shards(artifact, Parallel(tp=2), rank, artifact.dtype):
            assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


def test_dequantized_weights_may_be_quantized_anew(tmp_path: Path) -> None:
    quantized, dequantized = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["gptq"])
    quant = quant_of("int8")
    found = dict(load_shards(open_artifact(quantized), Parallel(), 0, "fp32", quant))
    meant = dict(load_shards(open_artifact(dequantized), Parallel(), 0, "fp32", quant))
    assert len(parts_of(quant, "fp32")) == 2
    for name, tensor in meant.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1)  # an integer may round to its neighbour


def test_inspect_says_what_is_dequantized(tmp_path: Path) -> None:
    quantized, _ = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["awq"])
    found = inspect_path(quantized, Parallel(tp=2))
    assert found.runs and found.dequantized == "awq (4 bits, groups of 16)" and found.quant == PLAIN


def refused(**config: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_scheme(Path("m"), {"quantization_config": config})
    return f"{caught.value.what}: {caught.value.why}"


def test_what_would_be_read_wrongly_is_refused_by_name() -> None:
    compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

    def group(**changes: Any) -> dict[str, Any]:
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changes}}}

    assert "'bitsandbytes' are not supported: known: awq, compressed-tensors" in refused(quant_method="bitsandbytes", load_in_4bit=True)
    assert "gptq weights with desc_act" in refused(quant_method="gptq", bits=4, group_size=128, desc_act=True)
    assert "gptq weights with 3 bits" in refused(quant_method="gptq", bits=3, group_size=128)
    assert "checkpoint_format 'marlin'" in refused(quant_method="gptq", bits=4, checkpoint_format="marlin")
    assert "group_size 0" in refused(quant_method="gptq", bits=4, group_size=0)
    assert "awq weights with version 'gemv'" in refused(quant_method="awq", bits=4, version="gemv")
    assert "awq weights with 8 bits" in refused(quant_method="awq", w_bit=8)
    assert "fmt 'e5m2'" in refused(quant_method="fp8", fmt="e5m2")
    assert "actorder 'group'" in refused(**compressed, **group(actorder="group"))
    assert "'tensor_group'" in refused(**compressed, **group(strategy="tensor_group"))
    assert "the format 'nvfp4-pack-quantized'" in refused(**compressed | {"format": "nvfp4-pack-quantized"}, **group(type="float"))
    assert "the sparse format '2of4'" in refused(**compressed, **group(), sparsity_config={"format": "2of4"})
    assert "does not make sense" in refused(quant_method="gptq", bits="four")
    assert "does not make sense" in refused(**compressed, config_groups={"group_0": {"targets": "Linear"}})


def test_layers_of_different_forms(tmp_path: Path) -> None:
    groups = {
        "a": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "format": "int-quantized"},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}},
    }
    scheme = read_scheme(
        tmp_path, {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}}
    )
    assert scheme is not None
    forms = [scheme.form_of(f"model.layers.3.{name}") for name in ("mlp.up_proj", "self_attn.q_proj")]
    assert [form and form.words for form in forms] == ["int8, a scale a row", "4 bits, groups of 16"]


@pytest.mark.parametrize(("tool", "spoil", "said"), [
    ("awq", lambda w: w.pop(UP + "qzeros"), f"lacks the tensor {UP}qzeros"),
    ("awq", lambda w: w.update({UP + "scales": torch.ones(3, 96)}), "up_proj.scales has shape"),
    ("gptq", lambda w: w.update({UP + "g_idx": torch.arange(64).flip(0).to(torch.int32)}), "desc_act"),
    ("ct fp8 rows", lambda w: w.update({UP + "weight_scale": torch.ones(96, 1, dtype=torch.int8)}), "weight_scale is I8"),
    ("fp8 blocks", lambda w: w.update({UP + "other": torch.ones(3)}), "holds a tensor that the model does not have"),
])  # fmt: skip
def test_damaged_folders_are_refused(tool: str, spoil: Any, said: str, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS[tool])
    weights = load_file(quantized / "model.safetensors")
    spoil(weights)
    save_file(weights, quantized / "model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        open_source(open_artifact(quantized))


def test_a_group_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    quantized, _ = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["awq"])
    path = quantized / "config.json"
    path.write_text(path.read_text().replace('"group_size": 16', '"group_size": 48'))
    with pytest.raises(ArtifactError, match="does not fit its form"):
        open_source(open_artifact(quantized))


def test_modelopt_beside_the_config(tmp_path: Path) -> None:
    quantized, _ = quantized_folder(model(tmp_path / "plain"), tmp_path, TOOLS["modelopt fp8"])
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "hf_quant_config.json").write_text(
        json.dumps({"quantization": config.pop("quantization_config") | {"quant_method": None}})
    )
    (quantized / "config.json").write_text(json.dumps(config))
    assert open_artifact(quantized).quant == quant_of("fp8")
    open_source(open_artifact(quantized))
