"""`trireme inspect` says "runs" only of what a deployment would serve: weights, tokenizer and chat template are looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run
from tests.support.tiny_models import tiny_gguf, tiny_model


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_decoder(folder: Path) -> None:
    edit(folder / "tokenizer.json", decoder=None)


def broken_template(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="{% for m in messages %}")


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def deep_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"a": ' * 100_000)


def pointer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))


def marlin(folder: Path) -> None:
    (folder / "quant_config.json").write_text(json.dumps({"w_bit": 4, "version": "marlin"}))


def hot(folder: Path) -> None:
    edit(folder / "generation_config.json", temperature="hot")


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_tokenizer, "has no tokenizer: routers need tokenizer.json"),
        (no_decoder, "the tokenizer's decoder"),
        (broken_template, "tokenizer_config.json cannot be compiled: line 1"),
        (damaged_tokenizer, "the tokenizer in"),
        (pointer, "is a Git LFS pointer"),
        (deep_config, "tokenizer_config.json does not make sense"),
        (pointer_config, "tokenizer_config.json is a Git LFS pointer"),
        (modelopt, "quantized with NVFP4: only TensorRT-LLM reads these weights"),
        (marlin, "awq weights with version 'marlin' are not supported"),
        (hot, "generation_config.json: temperature must be a number"),
        (missing_shard, "model-00002-of-00002.safetensors is missing"),
    ],
)
def test_what_would_not_be_served_does_not_run(
    spoil: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model(tmp_path / "model", layers=1, files=2)
    assert run(["inspect", str(folder)]) == 0
    assert "runs" in capsys.readouterr().out
    spoil(folder)
    assert run(["inspect", str(folder)]) == 3
    shown = capsys.readouterr()
    assert said in shown.err and "runs\n" not in shown.out and "Traceback" not in shown.err


def test_nan_and_infinity_harm_nothing(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, layers=1)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("{", '{"a": NaN, "b": -Infinity,', 1))
    assert run(["inspect", str(folder)]) == 0


def test_a_gguf_whose_tokenizer_is_not_read_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf(tiny_model(tmp_path / "model", layers=1), tmp_path / "tiny.gguf")
    assert run(["inspect", str(path)]) == 0
    # Of equal length, so that the rest of the header stays where it is.
    path.write_bytes(path.read_bytes().replace(b"smollm", b"absent"))
    capsys.readouterr()
    assert run(["inspect", str(path), "-o", "json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["runs"] is False
    assert "pre-tokenizer 'absent' is not supported" in shown.err
