"""`trireme update` under constant load over both doors: every request is answered, to the token, and what cannot change is named."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, ReplicaRow
from tests.e2e.load import ASKERS, Load
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from tests.support.tiny_models import tiny_model


def run(*line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trireme", *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


def update(load: Load, file: Path) -> tuple[int, str, str]:
    """Exit code and words of `trireme update`, under load."""
    done = asyncio.run(load.during(lambda: run("update", str(file))))
    return done.returncode, done.stdout, done.stderr


def change(file: Path, **changes: Any) -> None:
    """Rewrite the file: keys of its model, or with ``deployment`` of the whole."""
    tree = yaml.safe_load(file.read_text())
    tree |= changes.pop("deployment", {})
    tree["models"][0] |= changes
    file.write_text(yaml.safe_dump(tree))


def rows(status: DeploymentStatus) -> dict[str, ReplicaRow]:
    return {row.name: row for model in status.models for row in model.replicas}


@pytest.fixture(scope="module")
def up() -> Iterator[tuple[ControlClient, DeploymentStatus, Path]]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:
        deployment = {"drain_grace_s": 0.5, "admission": {"replica_limit": 2}}
        file = write_config(Path(folder), deployment=deployment, cpus_per_rank=0.25, max_batch_size=24)
        with deployed(file) as (control, status):
            yield control, status, file


def test_nothing_fails_while_all_replicas_are_replaced(up: tuple[ControlClient, DeploymentStatus, Path]) -> None:
    control, status, file = up
    before = rows(wait_for_state(control, "READY", 60))
    change(file, max_batch_size=32)
    plan = run("update", str(file), "--dry-run")
    moves = ["start the spare left-spare", "replace left", "replace right", "end the spare left-spare"]
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.splitlines() == [f"{index}. {move}" for index, move in enumerate(moves, 1)]
    assert rows(control.status()).keys() == before.keys() and control.status().update is None

    load = Load(status.url, status.rpc)
    code, out, err = update(load, file)
    assert code == 0 and out == "", err
    told = err.splitlines()
    assert [line.rpartition(": ")[0] for line in told[:-1]] == moves and told[-1].startswith("e2e is updated, ")
    after = rows(wait_for_state(control, "READY", 60))
    assert all(after[name].epoch > before[name].epoch for name in before)
    assert all(row.capacity is not None and row.capacity.max_batch_size == 32 for row in after.values())
    assert load.answered >= 4 * ASKERS, "the load was none"
    counts = httpx.get(f"{status.url}/status", trust_env=False).json()["counts"]
    assert counts["resubmitted"] > 0, "nothing was handed over in the middle: the grace was too long to prove it"
    assert counts["failed"] == counts["gaps"] == 0
    again = run("update", str(file))
    assert again.returncode == 0 and "runs this already" in again.stderr


def test_replicas_come_change_and_go(up: tuple[ControlClient, DeploymentStatus, Path]) -> None:
    """Without room for a spare: one is away at a time."""
    control, status, file = up
    before = rows(wait_for_state(control, "READY", 60))
    change(file, replicas=[{"name": "left", "tp_size": 1}, {"name": "new", "tp_size": 1}], cpus_per_rank=1)
    load = Load(status.url, status.rpc)
    code, _, err = update(load, file)
    assert code == 0, err
    assert [line.rpartition(": ")[0] for line in err.splitlines()[:-1]] == ["start new", "replace left", "end right"]
    after = rows(wait_for_state(control, "READY", 60))
    assert after.keys() == {"left", "new"} and after["left"].tp == 1 and after["left"].epoch > before["left"].epoch
    assert load.answered >= 2 * ASKERS, "the load was none"


def test_what_does_not_start_is_taken_back(up: tuple[ControlClient, DeploymentStatus, Path]) -> None:
    """TensorRT-LLM is not here: the first new replica ends twice, and the old one comes back in its place."""
    control, status, file = up
    tiny_model(file.parent / "tokenizer")
    before = rows(wait_for_state(control, "READY", 60))
    kept = file.read_text()
    change(file, engine="trtllm")
    load = Load(status.url, status.rpc)
    try:
        code, _, err = update(load, file)
    finally:
        file.write_text(kept)
    assert code == 5, err
    assert "warning: taken back: replica left does not start: " in err and "error: the update was taken back" in err
    after = rows(wait_for_state(control, "READY", 60))
    assert after["left"].epoch > before["left"].epoch and after["left"].capacity == before["left"].capacity
    assert after["new"].epoch == before["new"].epoch, "the other one was touched"
    again = run("update", str(file), "--dry-run")
    assert again.returncode == 0 and "runs this already" in again.stderr, again.stdout


def test_what_cannot_change_in_place_is_named(up: tuple[ControlClient, DeploymentStatus, Path], tmp_path: Path) -> None:
    control, _, file = up
    before = rows(control.status())
    kept = file.read_text()
    try:
        change(file, deployment={"http": {"host": "127.0.0.1", "port": 9}, "routers": 3}, aliases=["other"], max_batch_size=8)
        refused = run("update", str(file))
        assert refused.returncode == 3
        assert "http.port (0 runs, 9 is wanted)" in refused.stderr and "routers (1 runs, 3 is wanted)" in refused.stderr
        assert f"aliases of {MODEL}" in refused.stderr and "max_batch_size" not in refused.stderr
    finally:
        file.write_text(kept)
    other = write_config(tmp_path, deployment={"run_dir": str(file.parent / "run")})
    shutil.copytree(file.parent / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)  # it differs in what follows alone
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    refused = run("update", str(other))
    assert refused.returncode == 3 and "tokenizer.json" in refused.stderr
    nowhere = run("update", str(other), "--name", "nobody")
    assert nowhere.returncode == 2 and "does not run" in nowhere.stderr
    assert {name: row.epoch for name, row in rows(control.status()).items()} == {name: row.epoch for name, row in before.items()}
