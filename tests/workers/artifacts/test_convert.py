"""Conversion: any source to any layout and back is the same model; an interrupted one leaves nothing that looks whole."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_models import IM_END, tiny_gguf, tiny_model
from workers.artifacts import convert as conversion
from workers.artifacts.artifact import open_artifact, open_source
from workers.artifacts.convert import convert
from workers.artifacts.inspect import inspect_path
from workers.artifacts.safetensors_file import SafetensorsFile
from workers.layout.sharding import Span, whole_tensors
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import Parallel


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 321 rows: no tp but 1 and 3 divides the vocabulary.
    return tiny_model(tmp_path_factory.mktemp("hf"), vocab=321, files=2)


def weights(path: Path) -> dict[str, bytes]:
    """sha256 of every whole tensor in fp32 by its Hugging Face name."""
    artifact = open_artifact(path)
    source = open_source(artifact)
    assert artifact.dtype == "fp32"
    return {
        name: hashlib.sha256(np.ascontiguousarray(source.read(tensor, Span(0, tensor.shape[tensor.axis])).values)).digest()
        for name, tensor in whole_tensors(artifact.model).items()
    }


@pytest.mark.parametrize("parallel", [(1, 1), (2, 2), (3, 1), (4, 3), (6, 4), (1, 4)], ids=str)
def test_to_any_layout_and_back(hf: Path, parallel: tuple[int, int], tmp_path: Path) -> None:
    tp, pp = parallel
    there = convert(hf, tmp_path / "there", parallel=Parallel(tp=tp, pp=pp))
    assert weights(there) == weights(hf)
    assert inspect_path(there, verify_files=True).verified
    across = convert(there, tmp_path / "across", parallel=Parallel(tp=2, pp=3))
    assert weights(convert(across, tmp_path / "back", parallel=Parallel())) == weights(hf)
    back = open_artifact(tmp_path / "back")
    assert (back.model, back.eos_ids) == (open_artifact(hf).model, open_artifact(hf).eos_ids)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family(architecture: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf", architecture=architecture, tied=tied, vocab=320)
    there = convert(source, tmp_path / "there", parallel=Parallel(tp=4, pp=2))
    assert weights(there) == weights(source)


def test_every_file_of_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf")
    extra = ["chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json"]
    extra += ["additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    (source / "additional_chat_templates").mkdir()
    for name in [*extra, "additional_chat_templates/notes.txt", "README.md"]:
        (source / name).write_text("{}" if name.endswith(".json") else name)
    there = convert(source, tmp_path / "there", parallel=Parallel(tp=2))
    for name in [*extra, "tokenizer.json", "tokenizer_config.json"]:
        assert (there / name).read_bytes() == (source / name).read_bytes()
    assert not (there / "README.md").exists() and not (there / "additional_chat_templates/notes.txt").exists()
    assert inspect_path(there, verify_files=True).verified
    back = convert(there, tmp_path / "back", parallel=Parallel())
    assert (back / extra[-1]).read_text() == extra[-1]
    (back / extra[-1]).write_text("another")
    with pytest.raises(ArtifactError, match=r"rag\.jinja"):
        inspect_path(back, verify_files=True)


def test_gguf_becomes_a_checkpoint_with_a_tokenizer(tmp_path: Path) -> None:
    source = tiny_gguf(tiny_model(tmp_path / "hf"), tmp_path / "tiny.gguf")
    target = convert(source, tmp_path / "ck", parallel=Parallel(tp=2))
    assert weights(target) == weights(tmp_path / "hf")
    artifact = open_artifact(target)
    assert artifact.tokenizer_dir == target
    assert artifact.eos_ids[0] == IM_END


def test_number_formats(hf: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    original = SafetensorsFile(convert(hf, tmp_path / "fp32", parallel=Parallel()) / "rank0.safetensors")
    bf16 = SafetensorsFile(convert(hf, tmp_path / "bf16", parallel=Parallel(), dtype="bf16") / "rank0.safetensors")
    for name in original.entries:
        expected = torch.from_numpy(original.view(name)[0].copy()).to(torch.bfloat16)
        assert torch.equal(torch.from_numpy(bf16.view(name)[0].view(np.int16).copy()).view(torch.bfloat16), expected), name
    assert open_artifact(convert(tmp_path / "bf16", tmp_path / "keep", parallel=Parallel(pp=2))).dtype == "bf16"


def test_same_input_same_bytes(hf: Path, tmp_path: Path) -> None:
    first, second = (convert(hf, tmp_path / name, parallel=Parallel(tp=2)) for name in ("a", "b"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_padding_rows_are_zero(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2))
    rows, _ = SafetensorsFile(target / "rank1.safetensors").view("transformer.vocab_embedding.weight")
    assert rows.shape == (161, 48)
    assert not rows[160].any() and rows[159].any()


def test_for_tensorrt_llm(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(hf, tmp_path / "ck", parallel=Parallel(tp=2), for_trtllm=True)
    assert caught.value.what.startswith("TensorRT-LLM needs tp to divide 3 KV heads, got tp=2 (model ")
    assert caught.value.hint == "use --tp-size 1, 3 or 6, or the portable engine"
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=3), for_trtllm=True)
    file = SafetensorsFile(target / "rank2.safetensors")
    # Tied, but TensorRT-LLM wants a head of its own.
    assert np.array_equal(file.view("lm_head.weight")[0], file.view("transformer.vocab_embedding.weight")[0])
    assert weights(target) == weights(hf)
    assert not inspect_path(hf, Parallel(tp=3)).trtllm and inspect_path(hf, Parallel(tp=2)).trtllm


def test_layouts_that_cannot_be_leave_nothing(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tp=7 is more than the model's 6 query heads"):
        convert(hf, tmp_path / "ck", parallel=Parallel(tp=7))
    assert not list(tmp_path.iterdir())


def test_other_folders_are_never_overwritten(hf: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("three years of work")
    with pytest.raises(ArtifactError, match="is not a checkpoint"):
        convert(hf, tmp_path, parallel=Parallel())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_is_replaced_even_by_itself(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=3))
    convert(target, target, parallel=Parallel(tp=2))
    assert not (target / "rank2.safetensors").exists()
    assert weights(target) == weights(hf)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_an_error_midway_keeps_the_old_and_removes_the_new(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel())
    before = weights(target)

    def fail(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFault, match="ck cannot be written: No space left"):
        convert(hf, target, parallel=Parallel(tp=2), progress=fail)
    assert weights(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_room_is_checked_before_writing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFault, match="not enough room"):
        convert(hf, tmp_path / "ck", parallel=Parallel())
    assert not list(tmp_path.iterdir())


HALF = """
import sys, time
from workers.artifacts.convert import convert
from workers.protocol.specs import Parallel
def stop(phase, done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], parallel=Parallel(tp=2, pp=2), progress=stop)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "ck"
    with subprocess.Popen([sys.executable, "-c", HALF, str(hf), str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not target.exists()
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / ".ck.partial")
    convert(hf, target, parallel=Parallel(tp=2, pp=2))
    assert weights(target) == weights(hf)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_conversions_of_one_target_wait_for_each_other(hf: Path, tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()
    errors: list[BaseException] = []

    def count(phase: str, done: int, total: int) -> None:
        nonlocal inside, most
        with guard:
            inside += (done == 0) - (done == total)
            most = max(most, inside)

    def work() -> None:
        try:
            convert(hf, tmp_path / "ck", parallel=Parallel(tp=2), progress=count)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and most == 1
    assert weights(tmp_path / "ck") == weights(hf)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_progress_ends_at_the_total(hf: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2, pp=2), progress=lambda *step: seen.append(step))
    assert seen[0][1] == 0 and seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert sum(inspect_path(target).rank_bytes) == seen[-1][2]


def names_of(target: Path, rank: int) -> list[str]:
    return list(SafetensorsFile(target / f"rank{rank}.safetensors").entries)


def test_inspection_says_what_runs(hf: Path, tmp_path: Path) -> None:
    target = convert(hf, tmp_path / "ck", parallel=Parallel(tp=2))
    found = inspect_path(target)
    assert (found.kind, found.parallel, found.runs, found.tokenizer) == ("checkpoint", Parallel(tp=2), True, True)
    for rank, size in enumerate(found.rank_bytes):
        assert size == sum(SafetensorsFile(target / f"rank{rank}.safetensors").view(name)[0].nbytes for name in names_of(target, rank))
    other = inspect_path(target, Parallel(tp=3))
    assert not other.runs and other.reason == "stored for tp=2 pp=1, asked for tp=3 pp=1: convert it to that layout"
    impossible = inspect_path(hf, Parallel(tp=7))
    assert not impossible.runs and "6 query heads" in impossible.reason and not impossible.rank_bytes
    assert inspect_path(hf, Parallel(tp=3, pp=2)).runs
