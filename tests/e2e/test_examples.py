"""Every file of examples/ runs against a deployment, as its README says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.control.host.control_socket import DeploymentStatus
from tests.support.deployment import MODEL, deployed, write_config
from tests.support.source_tree import ROOT

EXAMPLES = ROOT / "examples"
#: What each example prints, at least; where a dictionary is empty the answer's text is the fake engine's own.
PRINTS = {
    "chat.py": ("[length: ", " tokens in, 64 out]"),
    "many.py": ("40 answers",),
    "deadline.py": (
        "too late:", "| request ", "cancelled after 5 tokens", "a model that is not served:", "a wrong parameter: temperature",
    ),
    "openai_client.py": (" tokens in, 32 out]",),
    "structured.py": ("'people': ", "probability "),
}  # fmt: skip
FLAGS = {"many.py": ["--count", "40", "--at-once", "16"]}


@pytest.fixture(scope="module")
def status(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeploymentStatus]:
    file = write_config(tmp_path_factory.mktemp("ex"), replicas=[{"name": "only", "tp_size": 1}])
    with deployed(file) as (_, status):
        yield status


def test_every_example_is_run() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == {*PRINTS, "where.py"}


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_an_example_runs(name: str, status: DeploymentStatus) -> None:
    command = [
        sys.executable,
        EXAMPLES / name,
        "--router",
        status.rpc[0].endpoint,
        "--url",
        status.url,
        "--model",
        MODEL,
        *FLAGS.get(name, []),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(ROOT))}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout
