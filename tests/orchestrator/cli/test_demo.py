"""The demo: the whole run on FakeEngine, and its proof that nothing is left, from which no process can hide."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.running import seeming_deployment
from tests.support.tiny_models import tiny_model

DEPLOYMENT = """
name: demo
http: {{port: 0}}
launcher: local
models:
  - name: tiny
    path: {model}
    engine: fake
    max_seq_len: 512
    replicas: [{{name: tp2, tp_size: 2}}, {{name: pp2, pp_size: 2}}]
"""


def test_a_daemon_does_not_escape() -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "from orchestrator.cli import demo\n"
        "from orchestrator.control.launch.subprocesses import adopt_orphans\n"
        "demo.GONE_S = 0.5\n"
        "adopt_orphans()\n"
        "print(demo.survivors())\n"
        "subprocess.run(['sh', '-c', 'setsid sleep 60 >/dev/null 2>&1 &'], check=True)\n"
        "left = demo.survivors()\n"
        "print(left)\n"
        "os.kill(int(left[0].split()[0]), signal.SIGKILL)\n"
        "print(demo.survivors())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    before, escaped, after = ran.stdout.splitlines()
    assert (before, after) == ("[]", "[]")
    assert "sleep" in escaped


@pytest.mark.mpi
def test_the_whole_demo(tmp_path: Path) -> None:
    """Beside a deployment of the same name, which has to stay."""
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT.format(model=tiny_model(tmp_path / "tiny")))
    command = [sys.executable, "-m", "trireme", "demo", str(file), "--no-isolate"]
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:  # short: Unix socket paths end at 107 bytes
        env = {**os.environ, "TRIREME_RUN_DIR": folder}
        with seeming_deployment(Path(folder), "demo"):
            ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    http, rpc, *status = ran.stdout.splitlines()
    assert http == rpc and len(http) == 32
    assert "demo/tp2" in ran.stdout and "demo/pp2" in ran.stdout and status[0].startswith("NAME ")
    assert "everything is shut down; no process is left" in ran.stderr
