"""A whole deployment for tests: ``trireme up`` on the fake engine, two replicas of two ranks each, HTTP API and RPC server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus, connect
from tests.support.tiny_models import tiny_tokenizer

MODEL = "fake"


def write_config(folder: Path, *, deployment: dict[str, object] | None = None, **changes: object) -> Path:
    """A deployment file in ``folder``; ``changes`` go over the model's keys, ``deployment`` over the deployment's."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    tiny_tokenizer(tokenizer)
    model = {
        "name": MODEL,
        "path": str(tokenizer),
        "engine": "fake",
        "fake_step_ms": 20,
        "max_seq_len": 2048,
        "kv_tokens": 32768,
        "max_batch_size": 16,
        "replicas": [{"name": "left", "tp_size": 2}, {"name": "right", "tp_size": 2}],
    }
    file = folder / "deployment.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "e2e",
                "launcher": "local",
                "http": {"host": "127.0.0.1", "port": 0},
                "run_dir": str(folder / "run"),
                "models": [model | changes],
            }
            | (deployment or {})
        )
    )
    return file


def wait_for_state(control: ControlClient, state: str, bound_s: float, host: subprocess.Popen[bytes] | None = None) -> DeploymentStatus:
    """The first status with ``state``; fails after ``bound_s``, or when ``host`` ends."""
    deadline = time.monotonic() + bound_s
    last = "no answer"
    while time.monotonic() < deadline and (host is None or host.poll() is None):
        try:
            status = control.status()
        except Exception as error:
            last = str(error)
        else:
            if status.state == state:
                return status
            last = f"{status.state}: {status.error}"
        time.sleep(0.05)
    raise AssertionError(f"not {state} within {bound_s} s: {last}")


@contextmanager
def deployed(
    file: Path,
    *,
    module: str = "trireme",
    name: str = "e2e",
    folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
    path: Sequence[Path] = (),
    ready_s: float = 120.0,
) -> Iterator[tuple[ControlClient, DeploymentStatus]]:
    """``trireme up file`` until READY; SIGTERM at the end must exit 0. ``module``: what stands for the command.

    ``folder``: holds the log and the run folder, the file's own where not given. ``settings``: of the environment, without TRIREME_.
    ``path``: folders of modules that stand for installed ones. ``ready_s``: bound of the start.
    """
    folder = folder or file.parent
    log = folder / file.with_suffix(".log").name
    overrides = {"TRIREME_RUN_DIR": str(folder / "run")} | {f"TRIREME_{key}": value for key, value in (settings or {}).items()}
    env = os.environ | overrides | {"NO_COLOR": "1", "PYTHONPATH": ":".join(map(str, [Path(__file__).resolve().parents[2], *path]))}
    with open(log, "wb") as output:
        host = subprocess.Popen([sys.executable, "-m", module, "up", str(file)], stdout=output, stderr=output, env=env)
    control = connect(name, folder / "run")
    try:
        yield control, wait_for_state(control, "READY", ready_s, host)
    except BaseException:
        print(log.read_text())
        host.send_signal(signal.SIGTERM)
        try:
            host.wait(30)
        except subprocess.TimeoutExpired:
            host.kill()
        raise
    host.send_signal(signal.SIGTERM)
    try:
        code = host.wait(60)
    except subprocess.TimeoutExpired:
        host.kill()
        raise
    assert code == 0, log.read_text()
