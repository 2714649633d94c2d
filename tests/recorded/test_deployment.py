"""A whole deployment on FakeEngine, started and ended by ``trireme``: its status, and the files that it keeps.

``status.json``: ``trireme status -o json``. ``files.txt``: the run folder and its modes, while it serves (without logs) and after ``down``.
``router_spec.json`` and ``replica_spec.json``: what the processes were told. ``terminal.txt``: what the commands said. Times, process ids,
epochs, ports and keys are masked. Record again: ``python -m tests.recorded.record deployment``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.recorded import lines
from tests.recorded.recording import as_json, as_text, check, check_names, without
from tests.support.gang import short_folder
from tests.support.tiny_models import tiny_model

AREA = "deployment"
NAMES = ["status.json", "files.txt", "router_spec.json", "router_state.json", "replica_spec.json", "replica_state.json", "terminal.txt"]
#: New in every run.
NEW_EACH_TIME = ("age_s", "pid", "epoch", "since", "tok_s", "server_key", "revision", "created")
SERVE = ("--engine", "fake", "--launcher", "local", "--port", "0", "--max-seq-len", "512", "--name", "small", "--detach")

pytestmark = pytest.mark.mpi


def trireme(folder: Path, *line: str) -> lines.Ran:
    ran = lines.run_module("trireme", *line, "--run-dir", str(folder / "runs"), folder=folder)
    assert ran.code == 0, ran.err
    return ran


def recordings() -> dict[str, str]:
    with short_folder() as folder:
        home = folder / "runs" / "small"
        model = tiny_model(folder / "tiny")
        try:
            up = trireme(folder, "serve", str(model), *SERVE)
            # Asked first: what the routers count reaches the host half a second later.
            status = trireme(folder, "status", "-o", "json")
            asked = trireme(folder, "generate", "hi", "--rpc", "--name", "small", "--max-tokens", "8")
            serving = files(home, logs=False)
            parts = {
                "router_spec.json": home / "routers" / "router0.json",
                "router_state.json": home / "routers" / "router0.state.json",
                "replica_spec.json": next(home.glob("replicas/*/*/spec.json")),
                "replica_state.json": next(home.glob("replicas/*/*/state.json")),
            }
            found = {name: shown(path.read_text(), folder) for name, path in parts.items()}
            url = json.loads(status.out)[0]["url"]
            down = trireme(folder, "down")
        finally:
            lines.run_module("trireme", "down", "--now", "--run-dir", str(folder / "runs"), folder=folder)
        after = files(home, logs=True)
    said = f"$ trireme serve\n{up.err}\n$ trireme generate\n{asked.out}\n$ trireme down\n{down.err}".replace(str(folder), "<folder>")
    said = re.sub(r"\b[0-9]+\.[0-9] s\b", "<time> s", said.replace(url, "<url>"))
    return found | {
        "status.json": shown(status.out, folder),
        "files.txt": as_text(f"# while it serves\n{serving}\n\n# after down\n{after}"),
        "terminal.txt": as_text(said),
    }


def files(home: Path, *, logs: bool) -> str:
    """Mode and name of everything; a folder that is named by its epoch is shown so."""
    rows = [
        f"{path.stat().st_mode & 0o777:04o} {re.sub(r'/[0-9]{10,}', '/<epoch>', str(path.relative_to(home)))}{'/' if path.is_dir() else ''}"
        for path in sorted(home.rglob("*"))
        if logs or path.suffix != ".log"
    ]
    return "\n".join(rows)


def shown(text: str, folder: Path) -> str:
    text = re.sub(r"127\.0\.0\.1:[0-9]+", "127.0.0.1:<port>", text.replace(str(folder), "<folder>"))
    return as_json(hidden(without(json.loads(re.sub(r"/[0-9]{10,}", "/<epoch>", text)), NEW_EACH_TIME)))


def hidden(value: Any) -> Any:
    """Process ids, which are values of ``routers`` and parts of ``pids``, and there the name of this host."""
    if isinstance(value, dict):
        found = {key: hidden(inner) for key, inner in value.items()}
        if isinstance(pids := found.get("pids"), list):
            found["pids"] = [[rank, "<host>", "<pid>"] for rank, _, _ in pids]
        if isinstance(routers := found.get("routers"), dict):
            found["routers"] = dict.fromkeys(routers, "<pid>")
        return found
    return [hidden(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_the_deployment_is_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_nothing_else_is_recorded() -> None:
    check_names(AREA, NAMES)
