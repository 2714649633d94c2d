"""A deployment's life as a user lives it: serve, status, chat over both doors, down. FakeEngine on real MPI ranks, no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from orchestrator.cli.hosting import cache_size, curl
from orchestrator.cli.main import run
from orchestrator.cli.serve import label
from orchestrator.cli.status import render
from orchestrator.control.host.control_socket import DeploymentStatus, ModelRow, ReplicaRow
from orchestrator.control.launch.subprocesses import alive
from tests.support.gang import short_folder
from tests.support.tiny_models import tiny_gguf, tiny_model
from workers.protocol.messages import Capacity

BOUND_S = 120.0


def trireme(*line: str, run_dir: str) -> SimpleNamespace:
    """Run one command in a process of its own, as a terminal does."""
    command = [sys.executable, "-m", "trireme", *line, "--run-dir", run_dir]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False, stdin=subprocess.DEVNULL)
    return SimpleNamespace(code=ran.returncode, out=ran.stdout, err=ran.stderr)


@pytest.fixture
def run_dir() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:  # short: Unix socket paths end at 107 bytes
        yield folder
        trireme("down", "--now", run_dir=folder)


@pytest.mark.mpi
def test_serve_ask_and_end(run_dir: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    serve = ("serve", str(model), "--engine", "fake", "--launcher", "local", "--port", "0", "-tp", "2", "--max_seq_len", "512", "--detach")
    up = trireme(*serve, run_dir=run_dir)
    assert up.code == 0, up.err
    assert "replica tiny-0: tp=2 pp=1 ready" in up.err and "\n  curl -N http://127.0.0.1:" in up.err and f"logs: {run_dir}/local" in up.err

    shown = trireme("status", "--json", run_dir=run_dir)
    assert shown.code == 0, shown.err
    status = json.loads(shown.out)[0]
    ranks = [pid for _, _, pid in status["models"][0]["replicas"][0]["pids"]]
    assert (status["state"], len(ranks)) == ("READY", 2)
    processes = [status["pid"], *status["routers"].values(), *ranks]
    assert all(map(alive, processes))

    top = trireme("top", "--once", run_dir=run_dir)
    assert top.code == 0 and "1 of 1 replicas ready, 2 ranks" in top.out, top.err
    assert all(str(pid) in top.out for pid in ranks)
    told = trireme("logs", run_dir=run_dir)
    assert told.code == 0 and "hello from 'tiny-0'" in told.out and "tiny-0 rank 0 launched" in told.out, told.err

    asked = ("chat", "Hello", "--temperature", "0", "--max-tokens", "12")
    over_http = trireme(*asked, "--url", status["url"], run_dir=run_dir)
    over_rpc = trireme(*asked, "--rpc", run_dir=run_dir)
    assert over_http.code == over_rpc.code == 0, over_http.err + over_rpc.err
    assert over_http.out == over_rpc.out and len(over_http.out.strip("\n")) >= 10

    logs = {file: file.read_text() for file in (Path(run_dir, "local", name) for name in ("host.log", "up.log"))}
    again = trireme(*serve, run_dir=run_dir)
    assert again.code == 4
    assert all(file.read_text().startswith(text) and text for file, text in logs.items())  # those of the one that runs
    assert "error: the deployment local already runs" in again.err and str(status["pid"]) in again.err

    down = trireme("down", run_dir=run_dir)
    assert down.code == 0 and "local is down" in down.err
    assert not any(map(alive, processes))
    gone = trireme("status", run_dir=run_dir)
    assert gone.code == 2 and "error: no deployment runs" in gone.err


@pytest.mark.mpi
def test_a_chat_template_of_ones_own(run_dir: str, tmp_path: Path) -> None:
    """It replaces the model's, and one that cannot be compiled ends the start, with file and line."""
    model, own = tiny_model(tmp_path / "tiny"), tmp_path / "own.jinja"
    serve = ("serve", str(model), "--engine", "fake", "--launcher", "local", "--port", "0", "--chat-template", str(own), "--detach")
    none = trireme(*serve, run_dir=run_dir)
    assert none.code == 3 and f"chat_template of tiny: {own} is no file" in none.err
    own.write_text("first line\n{{ messages | no_such_filter }}")
    broken = trireme(*serve, run_dir=run_dir)
    assert broken.code == 3 and f"the chat template in {own} cannot be compiled" in broken.err
    assert "why: line 2: No filter named 'no_such_filter'" in broken.err
    own.write_text("<{{ messages[0].content }}>")
    assert trireme(*serve, run_dir=run_dir).code == 0
    url = json.loads(trireme("status", "--json", run_dir=run_dir).out)[0]["url"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(f"{url}/tokenize", json=body, trust_env=False).json()["tokens"] == list(b"<hi>")


def test_a_deployment_that_cannot_start_says_why(run_dir: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny", heads=6)
    for detach in ((), ("--detach",)):
        up = trireme("serve", str(model), "--launcher", "local", "--port", "0", "-tp", "7", *detach, run_dir=run_dir)
        assert up.code == 3
        assert "tp=7 is more than the model's 6 query heads" in up.err and "hint: use --tp-size 6 or less" in up.err


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--device", "cuda"), 4, "device cuda, and there is no GPU to use"),
        (("--dtype", "fp16"), 3, "fp16 is not computed on a CPU"),
        (("--max-model-len", "100000"), 3, "max_seq_len: 100000 is more than the model's context"),
        (("--kv-tokens", "100"), 3, "kv_tokens: 100 cannot hold one request"),
        (("--kv-tokens", "2000000000"), 3, "no room for its cache"),
        (("--tokenizer", "/"), 3, "/ has no tokenizer"),
    ],
)
def test_what_can_never_run_ends_before_anything_is_converted_or_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, told: str
) -> None:
    """Neither a GGUF's conversion nor Ray: one line, and the exit code of its class."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gguf = tiny_gguf(tiny_model(tmp_path / "tiny"), tmp_path / "tiny.gguf")
    with short_folder() as folder:
        where = ("--run-dir", str(folder), "--cache-dir", str(tmp_path / "cache"), "--port", "0", "--launcher", "ray")
        assert run(["serve", str(gguf), *flags, *where]) == code
    error = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in error) == 1 and told in "\n".join(error)
    assert not (tmp_path / "cache" / "converted").exists()
    assert not any(line.startswith("ray ") for line in error)


CAPACITY = Capacity(block_size=16, num_blocks=1024, max_batch_size=16, max_num_tokens=256, max_seq_len=8192, vocab_size=320, tp=2, pp=1)


def one(state: str) -> DeploymentStatus:
    row = ReplicaRow(
        name="a-0", model="a", state=state, age_s=200, tp=2, pp=1, hosts=("h",), pids=((0, "h", 7), (1, "h", 8)), capacity=CAPACITY
    )
    model = ModelRow(
        name="a", state="READY" if state == "READY" else "DEGRADED", age_s=200, wanted=1, ready=int(state == "READY"), tp=(2,), pp=(1,),
        queue=3, tok_s=12.34, nodes=1, replicas=(row,),
    )  # fmt: skip
    return DeploymentStatus(
        name="d", state=model.state,
        age_s=200, pid=5, launcher="local", url="http://127.0.0.1:8000", models=(model,), routers={"router0": 6},
        rpc=(), run_dir="/run/d",
        error="" if state == "READY" else "a-0: rank 1 was killed",
    )  # fmt: skip


def test_status_in_kubectls_manner() -> None:
    header, row = render([one("READY")], "").splitlines()
    assert header.split() == ["NAME", "STATE", "AGE", "REPLICAS", "READY", "TP", "PP", "QUEUE", "TOK/S", "NODES"]
    assert row.split() == ["d/a", "READY", "3m", "1", "1", "2", "1", "3", "12.3", "1"]


def test_wide_status_names_processes_and_places() -> None:
    wide = render([one("READY")], "wide")
    assert "16384" in wide and "7,8" in wide and "router router0: process 6" in wide and "http://127.0.0.1:8000, host process 5" in wide


def test_trouble_is_told_with_its_cause() -> None:
    assert render([one("BACKOFF")], "").endswith("d: a-0: rank 1 was killed")


def test_the_size_of_the_kv_cache_as_people_plan_with_it() -> None:
    assert cache_size(CAPACITY) == "KV cache 16,384 tokens, 2.0 requests of 8,192 tokens at a time"


def test_the_curl_line_is_whole_json() -> None:
    body = curl("http://127.0.0.1:8000", "m").rpartition("-d ")[2].strip("'")
    assert json.loads(body)["model"] == "m"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("/models/a/", "a"),
        ("x/Small.Q4_1.gguf", "Small.Q4_1"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B-GGUF:Q8_0@main", "Qwen/Qwen3-8B-GGUF"),
        ("tests/support", "support"),
        (".", Path.cwd().name),
        ("./", Path.cwd().name),
        ("tests/support/..", "tests"),
        ("", ""),
    ],
)
def test_a_models_own_name(model: str, name: str) -> None:
    assert label(model) == name
