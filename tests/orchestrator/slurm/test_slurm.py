"""Slurm jobs without Slurm: the script rendered and run by a real bash, the pre-flight's verdicts, the roll call, when a job lets go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from orchestrator.cli.main import run as trireme
from orchestrator.slurm import endpoint as endpoints
from orchestrator.slurm.__main__ import offered, parse
from orchestrator.slurm.endpoint import Endpoint, reachable
from orchestrator.slurm.handover import HandoverFacts, drain_reason, least_lead
from orchestrator.slurm.job_env import read_place
from orchestrator.slurm.job_preflight import JobNodeFacts, judge
from orchestrator.slurm.job_script import TEMPLATE, SlurmJob, limit_seconds, render, submit
from orchestrator.slurm.roll_call import PeerLost, RollCall, RollCallConnection, RollCallMessage, call
from workers.protocol.errors import EnvironmentFault, Rejected

BOUND_S = 120.0
STEP = {
    "SLURM_JOB_ID": "42", "SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURMD_NODENAME": "n7", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5",
    "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip


def until(what: str, condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {bound_s} s: {what}"
        time.sleep(0.02)


# --- the script


def test_blanks_are_filled_and_everything_is_quoted() -> None:
    job = SlurmJob(
        name="chat", jobs="/data/o'brien $(touch x)", account="proj", partition="gpu", time="1-00:00:00", nodes=2, gpus_per_node=4,
        container="docker://img with space", container_mounts="/models:/models", array="0-3", options=("--comment=two \"words\"",),
    )  # fmt: skip
    text = render(job, TEMPLATE.read_text())
    assert "{{" not in text and "jobs='/data/o'\"'\"'brien $(touch x)'" in text
    for line in ("--account=proj", "--partition=gpu", "--time=1-00:00:00", "--nodes=2", "--gpus-per-node=4", "--array=0-3",
                 "--signal=B:USR1@600", "--requeue", '"--comment=two \\"words\\""'):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    assert "eval" not in text and "sleep" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False, timeout=BOUND_S).returncode == 0


def test_the_template_has_no_second_copy() -> None:
    assert TEMPLATE.resolve() == Path(__file__).resolve().parents[3] / "deploy" / "slurm" / "serve.sbatch"


def test_without_a_handover_slurm_signals_term() -> None:
    text = render(SlurmJob(name="a", jobs="/j", time="10", handover=False), TEMPLATE.read_text())
    assert "#SBATCH --signal=B:TERM@300\n" in text and "\nlead=0\n" in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 180), ("3:30", 210), ("1:00:00", 3600), ("2-12", 216000), ("1-01:01:01", 90061), ("", None), ("UNLIMITED", None)],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize(
    "change",
    [{"name": "Bad Name"}, {"name": "x" * 29}, {"nodes": 0}, {"account": "a b"}, {"time": "soon"}, {"time": "3", "lead_s": 130},
     {"options": ("qos",)}, {"options": ("--a\n#SBATCH --b",)}, {"partition": "p;rm"}],
)  # fmt: skip
def test_what_slurm_cannot_be_told_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(Rejected):
        SlurmJob(**({"name": "a", "jobs": "/j"} | change))  # type: ignore[arg-type]


#: Stands for srun: says what it was called with, then ends with 7 when it is ordered to drain.
SRUN = """#!/bin/bash
[ "$1" = --mpi=list ] && { echo 'srun: MPI types are...'; echo 'srun: pmix'; exit; }
printf '%s\\0' "$@" >"$FAKE/argv.new" && mv "$FAKE/argv.new" "$FAKE/argv"
until [ -e "$START/drain" ]; do sleep 0.05; done
exit 7
"""
SBATCH = '#!/bin/bash\nprintf "%s\\n" "$*" >>"$FAKE/submitted"\necho "43;cluster"\n'


@contextmanager
def script(folder: Path, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The rendered script under a real bash, with programs of its own in srun's and sbatch's place; and this start's folder."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("sbatch", SBATCH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = SlurmJob(name="chat", jobs=str(folder / "jobs and more"), time="30", python="py thon")
    file = folder / "script"
    file.write_text(render(job, TEMPLATE.read_text()))
    start = Path(job.jobs, "chat-42", f"start-{env.get('SLURM_RESTART_COUNT', '0')}")
    told = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "FAKE": str(folder), "START": str(start)}
    process = subprocess.Popen(["bash", str(file), "4"], env=os.environ | told | env | {"PATH": f"{programs}:{os.environ['PATH']}"})
    try:
        until("srun was called", (folder / "argv").exists)
        yield process, start
    finally:
        start.mkdir(parents=True, exist_ok=True)
        (start / "drain").touch()
        process.wait(BOUND_S)


def test_a_signal_submits_one_successor_and_term_drains(tmp_path: Path) -> None:
    with script(tmp_path, SLURM_ARRAY_TASK_ID="5") as (process, start):
        argv = (tmp_path / "argv").read_text().split("\0")[:-1]
        spec = parse(argv[argv.index("orchestrator.slurm") + 1 :])
        assert argv[argv.index("-m") - 1] == "py thon" and "--ntasks=2" in argv
        assert (spec.name, spec.generation, spec.offered, spec.lead_s) == ("chat", 4, ("pmix",), 600.0)
        token = start / "token"
        assert len(token.read_bytes()) == 64 and token.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            until("the limit is told", (start / "limit").exists)
            (start / "limit").unlink()
        assert (start.parent / "successor" / "job").read_text().strip() == "43;cluster"
        assert (tmp_path / "submitted").read_text().splitlines() == [f"--parsable --array=5 {start.parent.parent / 'chat.sbatch'} 5"]
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 7, "the step's exit code is the job's"


def test_a_requeued_job_has_a_folder_of_its_own_for_each_start(tmp_path: Path) -> None:
    with script(tmp_path, SLURM_RESTART_COUNT="2") as (_, start):
        assert start.name == "start-2" and (start / "token").exists() and not (start.parent / "start-0").exists()


def test_a_dry_run_prints_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: dry\nmodels: [{name: m}]\n")
    dry = ["submit", "slurm", str(file), "--nodes", "3", "--array", "4", "--dry-run", "--job-dir"]
    assert trireme([*dry, "/nowhere/jobs", "--time", "2:00:00"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash") and "#SBATCH --array=0-3\n" in out and "#SBATCH --nodes=3\n" in out
    assert trireme([*dry, "/nowhere/jobs", "--time", "1"]) == 3
    assert "drain_grace_s" in capsys.readouterr().err
    assert trireme([*dry, "/nowhere" + "/deep" * 20]) == 3
    assert "choose a shorter --job-dir" in capsys.readouterr().err
    file.write_text("name: dry\nlauncher: local\nmodels: [{name: m}]\n")
    assert trireme([*dry, "/nowhere/jobs"]) == 3
    assert "launcher: local on 3 nodes" in capsys.readouterr().err


def test_submitting_writes_what_the_job_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    job = SlurmJob(name="chat", jobs=str(tmp_path / "jobs"))
    program.write_text('#!/bin/bash\n[ "$1" = --parsable ] && [ -s "$2" ] && echo "77;cluster"\n')
    program.chmod(0o755)
    assert submit(job, b"name: chat\n") == "77"
    assert job.file.read_bytes() == b"name: chat\n" and job.script.read_text() == render(job, TEMPLATE.read_text())
    assert job.script.stat().st_mode & 0o777 == 0o600
    program.write_text("#!/bin/bash\necho 'sbatch: error: Batch job submission failed: Invalid account' >&2\nexit 1\n")
    with pytest.raises(EnvironmentFault, match="Slurm refused the job: sbatch: error: Batch job submission failed: Invalid account"):
        submit(job, b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="there is no Slurm here"):
        submit(job, b"")


# --- where a process stands


def test_place() -> None:
    place = read_place(STEP)
    assert (place.job, place.start, place.index, place.nodes, place.gpus) == (42, 0, 1, 3, 4)
    other = read_place(STEP | {"SLURM_JOB_ID": "43"})
    assert len({place.ray_port, place.roll_port, other.ray_port, other.roll_port}) == 4
    assert place.start_folder("/j", "chat") == Path("/j/chat-42/start-0")
    for broken in ({"SLURM_JOB_ID": "x"}, {"SLURM_PROCID": ""}):
        with pytest.raises(EnvironmentFault, match="not a step of a Slurm job"):
            read_place(STEP | broken)


def test_offered_by_srun() -> None:
    listing = "MPI plugin types are...\n\tnone\n\tpmi2\n\tcray_shasta\n\tpmix\nspecific pmix plugin versions available: pmix_v4\n"
    assert offered(listing) == ("pmi2", "cray_shasta", "pmix")


@pytest.mark.parametrize(
    ("url", "seen"),
    [("http://0.0.0.0:8000", "http://10.1.1.1:8000"), ("http://[::]:8000", "http://10.1.1.1:8000"), ("http://h:1", "http://h:1"), ("", "")],
)
def test_an_address_that_others_can_use(url: str, seen: str) -> None:
    assert reachable(url, "10.1.1.1") == seen


def test_the_endpoint_file(tmp_path: Path) -> None:
    told = Endpoint(
        state="ready", deployment="chat-42", job=42, start=0, generation=1, node="n1", url="http://h:1", rpc=(), models=("m",), key_file="",
        folder="/j/chat-42", time=1.0,
    )  # fmt: skip
    path = endpoints.pointer(str(tmp_path), "chat", "3")
    assert endpoints.read(path) is None and path.name == "chat-task3.json"
    endpoints.write(path, told)
    assert endpoints.read(path) == told and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:40])
    assert endpoints.read(path) is None


# --- the hand-over

FACTS = HandoverFacts(now=100.0, drain_ordered=False, limit_since=None, successor_ready=False, lead_s=120.0, grace_s=30.0)


def test_when_a_job_drains() -> None:
    def why(**change: object) -> str:
        return drain_reason(msgspec.structs.replace(FACTS, **change))

    assert why() == ""
    assert why(drain_ordered=True) == "ordered to drain"
    assert why(limit_since=99.0) == "", "it serves until the successor is ready"
    assert why(limit_since=99.0, successor_ready=True) == "the successor is ready"
    assert why(limit_since=99.0, lead_s=0.0) == "the time limit is near"
    latest = 100.0 - 120.0 + least_lead(30.0)
    assert why(limit_since=latest + 1.0) == "" and "not ready" in why(limit_since=latest)


# --- pre-flight

GOOD = JobNodeFacts(node="a", mpi="mpich", versions={"python": "3.11.7", "ray": "2.60.0", "trireme-llm": "0.1.0"})


@pytest.mark.parametrize(
    ("what", "state", "change", "words"),
    [
        ("mpi", "fail", {"mpi": "", "mpi_fault": "no MPI found"}, "b: no MPI found"),
        ("mpi", "fail", {"mpi": "openmpi"}, "a mpich, b openmpi"),
        ("gpus", "fail", {"gpus": 1, "allotted": 2}, "b 1 of 2"),
        ("gpus", "warn", {"gpus": None, "allotted": 2}, "nothing on b tells"),
        ("files", "fail", {"unseen": ("/x/probe",)}, "b: /x/probe"),
        ("ports", "fail", {"taken": (20000,)}, "b 20000"),
        ("clocks", "warn", {"skew_s": -3.0}, "b is off by -3.0 s"),
        ("clocks", "fail", {"skew_s": 90.0}, "b is off by +90.0 s"),
        ("versions", "fail", {"versions": GOOD.versions | {"ray": "2.59.0"}}, "b 2.59.0"),
        ("nccl", "fail", {"allotted": 1, "gpus": 1, "versions": GOOD.versions | {"nvidia-nccl-cu12": "2.27"}}, "nodes differ"),
        ("names", "warn", {"name_s": None}, "b: its own host name"),
        ("/dev/shm", "warn", {"shm": 64 << 20}, "1 GiB on b"),
    ],
)
def test_verdicts(what: str, state: str, change: dict[str, object], words: str) -> None:
    bad = msgspec.structs.replace(GOOD, node="b", **change)
    verdicts = {one.what: one for one in judge([GOOD, bad], offered=("pmix",), wants_gpus=False, wants_ray=True)}
    assert verdicts[what].state == state and words in verdicts[what].found and verdicts[what].hint
    good = {one.what: one for one in judge([GOOD, GOOD], offered=("pmix",), wants_gpus=False, wants_ray=True)}
    assert good[what].state == "ok", good[what]


def test_a_model_on_cuda_needs_gpus() -> None:
    verdicts = {one.what: one.state for one in judge([GOOD], offered=(), wants_gpus=True, wants_ray=True)}
    assert verdicts["gpus"] == "fail" and set(verdicts.values()) == {"ok", "fail"}


def test_ray_is_not_asked_for_where_it_is_not_used() -> None:
    bare = msgspec.structs.replace(GOOD, versions={name: found for name, found in GOOD.versions.items() if name != "ray"})
    found = {ray: {one.what: one.state for one in judge([bare], offered=(), wants_gpus=False, wants_ray=ray)} for ray in (True, False)}
    assert found[True]["versions"] == "fail" and set(found[False].values()) == {"ok"}


# --- the roll call


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def follow(port: int, token: bytes, index: int, said: list[str], clock: float = 0.0, answer: str = "joined") -> None:
    line = call("127.0.0.1", port, token, BOUND_S)
    try:
        line.send(
            RollCallMessage(kind="here", index=index, facts=msgspec.structs.replace(GOOD, node=f"n{index}"), clock=time.time() + clock)
        )
        while (message := line.receive(0.1)) is None or message.kind != "over":
            if message is not None:
                line.send(RollCallMessage(kind=answer, why="no room"))  # type: ignore[arg-type]
        said.append("over")
    except PeerLost as error:
        said.append(str(error))
    finally:
        line.close()


def test_roll_call() -> None:
    port, said = free_port(), list[str]()
    roll = RollCall(port, b"secret", 2, lambda: None)
    nodes = [
        threading.Thread(target=follow, args=(port, b"secret", 1, said, -5.0)),
        threading.Thread(target=follow, args=(port, b"secret", 2, said)),
    ]
    for node in nodes:
        node.start()
    facts = roll.gather(BOUND_S)
    assert [one.node for one in facts] == ["n1", "n2"] and -6.0 < facts[0].skew_s < -4.0 < facts[1].skew_s
    roll.join(BOUND_S)
    assert roll.lost() == []
    roll.close()
    for node in nodes:
        node.join(BOUND_S)
    assert said == ["over", "over"]


def test_who_has_no_token_is_turned_away() -> None:
    port, said = free_port(), list[str]()
    roll = RollCall(port, b"secret", 1, lambda: None)
    try:
        intruder = threading.Thread(target=follow, args=(port, b"guess", 1, said))
        intruder.start()
        with pytest.raises(EnvironmentFault, match=r"nodes \[1\] of the job did not answer"):
            roll.gather(1.0)
        intruder.join(BOUND_S)
        assert said == ["the connection was closed"] and not roll.facts
    finally:
        roll.close()


def test_a_node_that_cannot_join_is_named() -> None:
    port, said = free_port(), list[str]()
    roll = RollCall(port, b"secret", 1, lambda: None)
    node = threading.Thread(target=follow, args=(port, b"secret", 1, said, 0.0, "failed"))
    node.start()
    roll.gather(BOUND_S)
    with pytest.raises(EnvironmentFault, match="node n1: no room"):
        roll.join(BOUND_S)
    roll.close()
    node.join(BOUND_S)


def test_a_node_that_leaves_is_seen() -> None:
    port = free_port()
    roll = RollCall(port, b"secret", 1, lambda: None)
    lines: list[RollCallConnection] = []

    def come() -> None:
        line = call("127.0.0.1", port, b"secret", BOUND_S)
        line.send(RollCallMessage(kind="here", index=1, facts=GOOD, clock=time.time()))
        lines.append(line)

    node = threading.Thread(target=come)
    node.start()
    roll.gather(BOUND_S)
    node.join(BOUND_S)
    assert roll.lost() == []
    lines[0].close()
    until("the loss is seen", lambda: roll.lost() == ["a"])
    roll.close()


def test_a_line_said_twice_is_not_heard_twice() -> None:
    ours, theirs = socket.socketpair()
    made: list[RollCallConnection] = []
    other = threading.Thread(target=lambda: made.append(RollCallConnection(theirs, b"secret", leads=False)))
    other.start()
    lead = RollCallConnection(ours, b"secret", leads=True)
    other.join(BOUND_S)
    lead.send(RollCallMessage(kind="join"))
    seen = theirs.recv(4096, socket.MSG_PEEK)
    assert (received := made[0].receive(BOUND_S)) is not None and received.kind == "join"
    ours.sendall(seen)
    with pytest.raises(PeerLost, match="token"):
        made[0].receive(BOUND_S)
    lead.close()
    made[0].close()
