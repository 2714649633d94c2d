"""``python -m workers`` before and after its life: arguments, files, agreement of errors, exit codes, state file, log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.support.gang import wait_for
from workers.__main__ import parse, read_keys
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import PortableSpec, RouterAddress
from workers.serving.state_file import StateFile, read_state

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False)


def test_flags_make_a_spec() -> None:
    flags = "--model /m/tiny --engine portable --tp_size 2 --pp-size=3 --dtype bf16 --max_batch_size 8 --prefix-cache false --name r1"
    spec = parse([*flags.split(), "--router", "tcp://h:1,KEY=a_b", "--router", "ipc:///x_y", "--epoch", "9"]).spec
    assert spec is not None
    assert (spec.name, spec.model, spec.artifact, spec.epoch, spec.parallel.world) == ("r1", "tiny", "/m/tiny", 9, 6)
    assert (type(spec.engine), spec.engine.dtype, spec.engine.max_batch_size, spec.engine.prefix_cache) == (PortableSpec, "bf16", 8, False)
    assert spec.routers == (RouterAddress(endpoint="tcp://h:1", server_key="KEY=a_b"), RouterAddress(endpoint="ipc:///x_y"))
    minted = [parse(["--engine", "fake"]).spec for _ in range(2)]
    assert minted[0] is not None and minted[1] is not None and 0 < minted[0].epoch != minted[1].epoch


def test_a_spec_file_is_read_alone(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"name": "r", "model": "m", "artifact": "a", "epoch": 3, "parallel": {"tp": 2}}))
    spec = parse(["--spec", str(file), "--debug"]).spec
    assert spec is not None and spec.parallel.tp == 2
    with pytest.raises(ConfigError, match="alone"):
        parse(["--spec", str(file), "--tp-size", "2"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model is given"),
        (["--engine", "fake", "--tp-size", "0"], "tp and pp must be at least 1"),
        (["--engine", "fake", "--tp-size", "two"], "cannot be a replica's spec"),
        (["--engine", "vulcan", "--model", "x"], "cannot be a replica's spec"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--spec", "/nowhere.json"], "cannot read /nowhere.json"),
    ],
)
def test_what_cannot_mean_anything_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "r", "model": "m", "artifact": "a", "wrong": 1}', '{"name": "a/b", "model": "m", "artifact": "a"}']
)
def test_a_bad_spec_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "spec.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        parse(["--spec", str(file)])


def test_key_files_are_private_and_never_quoted(tmp_path: Path) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    file = tmp_path / "key.json"
    file.write_text(json.dumps({"public": public, "secret": secret}))
    file.chmod(0o600)
    keys = read_keys(str(file))
    assert keys is not None and keys.secret == secret and secret not in repr(keys)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        read_keys(str(file))
    file.chmod(0o600)
    for text in ("{", json.dumps({"public": public, "secret": "hunter2"}), json.dumps({"public": public}), '{"public": "\\ud800"}'):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_keys(str(file))
        assert "hunter2" not in caught.value.lines()
    assert read_keys("") is None


def test_exit_codes_and_error_lines(tmp_path: Path) -> None:
    bad = run("--engine", "fake", "--tp-size", "0")
    assert bad.returncode == 3 and bad.stderr.startswith("error: tp and pp must be at least 1")
    alone = run("--engine", "fake", "--tp-size", "2")
    assert alone.returncode == 4 and "hint: mpiexec -n 2 python -m workers" in alone.stderr
    helped = run("--help")
    assert helped.returncode == 0 and "--tp-size" in helped.stdout
    unsafe = run("--engine", "fake", "--run-dir", str(tmp_path), "--router", "tcp://127.0.0.1:1")
    assert unsafe.returncode == 3 and "no CURVE for tcp://127.0.0.1:1" in unsafe.stderr
    state = read_state(str(tmp_path))
    assert state is not None and state.phase == "failed" and state.error is not None
    assert (state.error.code, state.error.exit_code) == ("config_error", 3)
    assert "no CURVE" in (tmp_path / "rank0.log").read_text()


def test_without_mpi_the_environment_is_at_fault(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI library was found')")
    """Of a replica that needs it; others start (`test_a_gang_that_needs_no_mpi`), or fail for a reason of their own."""
    ran = run("--model", "m", "--tp-size", "2", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 4
    assert ran.stderr.splitlines()[:2] == ["error: MPI is not available", "why: no MPI library was found"]
    ran = run("--engine", "portable", "--model", str(tmp_path / "nothing"), PYTHONPATH=str(tmp_path))
    assert ran.returncode == 3 and "MPI" not in ran.stderr
    assert run("--help", PYTHONPATH=str(tmp_path)).returncode == 0


def test_a_rank_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workers", "--engine", "fake", "--run-dir", str(tmp_path)]
    script = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        wait_for(lambda: (state := read_state(str(tmp_path))) and state.phase == "ready")
        state = read_state(str(tmp_path))
        assert state is not None
        pid = state.pids[0][2]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    wait_for(lambda: not Path("/proc", str(pid)).exists(), 5, "the rank's end")


def test_nothing_heavy_is_imported_before_the_threads_are_set() -> None:
    code = "import sys, workers.__main__; print(*{'torch', 'numpy', 'mpi4py', 'workers.engines.portable'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == []


def test_the_state_file_is_whole_private_and_only_a_warning_once_serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    state = StateFile(str(folder), name="r", epoch=5, pids=[(0, "h", 1)])
    state.enter("loading")
    assert (folder / "state.json").stat().st_mode & 0o777 == 0o600 and os.listdir(folder) == ["state.json"]
    (folder / "state.json").unlink()
    folder.rmdir()
    with pytest.raises(EnvironmentFault, match="cannot write"):
        state.enter("ready")
    state = StateFile(str(folder), name="r", epoch=5, pids=[])
    folder.mkdir()
    state.enter("ready")
    (folder / "state.json").unlink()
    folder.rmdir()
    state.enter("draining")
    assert "phase draining goes unreported" in caplog.text
    folder.mkdir()
    state.enter("failed", error=ArtifactError("rank1.safetensors is corrupt", "sha256 differs", "convert again"))
    read = read_state(str(folder))
    assert read is not None and read.error is not None and read.error.exit_code == 3
    again = read.error.error()
    assert isinstance(again, ArtifactError) and again.lines().splitlines()[1:] == ["why: sha256 differs", "hint: convert again"]
    assert read_state(str(tmp_path)) is None
    (folder / "state.json").write_bytes(msgspec.json.encode({"phase": "ready"}))
    with pytest.raises(EnvironmentFault, match="cannot read"):
        read_state(str(folder))
