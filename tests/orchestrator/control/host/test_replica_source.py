"""What a deployment's own replicas are made from: the model's files and the hardware, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.deployment_file import load
from orchestrator.control.host.deployment_plan import ServedModel
from orchestrator.control.host.notices import Notice
from orchestrator.control.host.replica_source import OwnReplicas
from orchestrator.control.launch import node_hardware
from orchestrator.planner.automatic import ClusterHardware
from tests.support.hardware import EIGHT_LARGE, NO_GPU, ONE_SMALL
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.artifacts.convert import silent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny", head_dim=16)


def resolved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hardware: ClusterHardware, *models: dict[str, Any], **deployment: Any
) -> tuple[list[ServedModel], list[Notice]]:
    looks: list[bool] = []

    def look(_: object, *, gpus: bool) -> object:
        looks.append(gpus)
        return hardware.nodes[0]

    monkeypatch.setattr(node_hardware, "look", look)
    said: list[Notice] = []
    tree = {"launcher": "local", "run_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "models": list(models), **deployment}
    config = load(tree).config
    source = OwnReplicas(config, said.append)
    source.check()
    found = source.resolve(config.models, silent)
    assert source.hardware.nodes
    assert looks == [any(gang.settings.device != "cpu" for each in config.models for gang in each.gangs())]
    return found, said


def test_a_gpu_host_serves_on_its_gpus_and_says_so(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (served,), said = resolved(tmp_path, monkeypatch, EIGHT_LARGE, {"name": "m", "path": str(model), "replicas": 2})
    assert [(gang.engine.device, gang.engine.dtype, gang.engine.max_num_tokens) for gang in served.gangs] == [("cuda", "bf16", 8192)] * 2
    (notice,) = said  # one line for all that got the same
    assert (notice.kind, notice.subject) == ("settings", "m-0, m-1")
    assert "device cuda (8 x NVIDIA Test GPU), dtype bf16 (" in notice.text and "tokens of KV cache" in notice.text


def test_a_host_without_gpus_serves_as_ever(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (served,), said = resolved(tmp_path, monkeypatch, NO_GPU, {"name": "m", "path": str(model)})
    (gang,) = served.gangs
    assert (gang.engine.device, gang.engine.dtype, gang.engine.max_batch_size, gang.engine.max_num_tokens) == ("cpu", "fp32", 64, 256)
    assert gang.artifact == str(model) and "KV cache" not in said[0].text


def test_nothing_is_said_where_all_is_asked_for(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"device": "cpu", "dtype": "fp32", "max_batch_size": 4, "max_num_tokens": 64, "tp_size": 2}
    (served,), said = resolved(tmp_path, monkeypatch, ONE_SMALL, {"name": "m", "path": str(model)} | given)
    assert said == [] and served.gangs[0].parallel.tp == 2


def test_ray_of_our_own_may_be_given_fewer_gpus(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = {"launcher": "ray", "ray": {"num_gpus": 1}}
    (served,), said = resolved(tmp_path, monkeypatch, EIGHT_LARGE, {"name": "m", "path": str(model)}, **more)
    assert served.gangs[0].engine.device == "cuda" and "1 x NVIDIA Test GPU" in said[0].text
    (served,), _ = resolved(tmp_path, monkeypatch, EIGHT_LARGE, {"name": "m", "path": str(model)}, launcher="ray", ray={"num_gpus": 0})
    assert served.gangs[0].engine.device == "cpu"


def test_another_tokenizer_is_the_routers_and_the_ranks(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_tokenizer(tmp_path / "other")
    (served,), _ = resolved(tmp_path, monkeypatch, NO_GPU, {"name": "m", "path": str(model), "tokenizer": str(other)})
    assert served.tokenizer == str(other)
    (served,), _ = resolved(tmp_path, monkeypatch, NO_GPU, {"name": "m", "path": str(model)})
    assert served.tokenizer == str(model)
