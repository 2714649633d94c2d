"""What is done to a real Slurm of three nodes, one line of JSON a step: ``{"step", "seconds", "detail"}``; a step that fails raises.

Run by ``test_slurm.py`` inside the namespace of ``cluster.sh``: ``python -m tests.slurm.scenario TMP_DIR PART...``. Jobs are submitted as a
user does it, by `trireme submit slurm`; what runs is the script of `deploy/slurm`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestrator.client import Client
from orchestrator.control.host.control_socket import connect
from orchestrator.control.launch.subprocesses import TAG, alive
from orchestrator.slurm import endpoint as endpoints
from orchestrator.slurm.endpoint import Endpoint
from tests.slurm.load import Load
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.engines.fake import expected_tokens
from workers.protocol.messages import SamplingParams

#: Generous: on a busy machine Ray takes ten times as long to start as on an idle one.
BOUND_S = 400.0
TRIREME = [sys.executable, "-m", "trireme"]
TOKENS = 60


def until(what: str, condition: Callable[[], Any], bound_s: float = BOUND_S) -> Any:
    deadline = time.monotonic() + bound_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"not within {bound_s} s: {what}")


def say(step: str, begun: float, detail: object = "") -> None:
    print(json.dumps({"step": step, "seconds": round(time.monotonic() - begun, 1), "detail": detail}), flush=True)


def ran(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def oracle(prompt: str, tokens: int = TOKENS) -> str:
    return bytes(expected_tokens(prompt.encode(), SamplingParams(max_tokens=tokens, temperature=0.0))).decode()


class Site:
    """The folder of a test run, with the files that its jobs need."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.jobs = tmp, tmp / "jobs"
        self.tokenizer = tiny_tokenizer(tmp / "tokenizer")
        self.submitted: list[int] = []

    def write(self, name: str, model: dict[str, object], **deployment: object) -> Path:
        file = self.tmp / f"{name}.yaml"
        http = {"host": "127.0.0.1", "port": 0}
        file.write_text(yaml.safe_dump({"name": name, "http": http, "drain_grace_s": 5, "models": [model]} | deployment))
        return file

    def fake(self, **changes: object) -> dict[str, object]:
        return {
            "name": "fake", "path": str(self.tokenizer), "engine": "fake", "fake_step_ms": 20, "max_seq_len": 2048, "kv_tokens": 32768,
            "max_batch_size": 16,
        } | changes  # fmt: skip

    def submit(self, file: Path, *flags: str) -> int:
        out = ran(*TRIREME, "submit", "slurm", str(file), "--job-dir", str(self.jobs), *flags)
        self.submitted.append(int(out))
        return self.submitted[-1]

    def log(self, name: str, job: int) -> str:
        file = self.jobs / f"{name}-{job}.log"
        return file.read_text() if file.exists() else ""

    def ready(self, name: str, job: int, start: int = 0) -> Endpoint:
        """The endpoint of this start of a job, as its folder tells it; ends at once when the job does."""
        file = self.jobs / f"{name}-{job}" / endpoints.FILE

        def look() -> Endpoint | None:
            found = endpoints.read(file)
            if found is not None and found.state == "ready" and found.start == start:
                return found
            assert state(job) not in ("", "FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), (
                f"{state(job)}\n{self.log(name, job)}"
            )
            return None

        found: Endpoint = until(f"job {job} ready", look)
        return found

    def tell(self) -> None:
        """What a person would look at when a step fails."""
        for log in sorted([*self.jobs.rglob("*.log"), *(self.tmp / "slurm" / "log").glob("*.log"), *self.tmp.glob("*.log")]):
            print(f"--- {log.relative_to(self.tmp)}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)


def facts(job: int) -> dict[str, str]:
    """What Slurm knows of a job; nothing once it has forgotten it."""
    done = subprocess.run(["scontrol", "show", "job", "-o", str(job)], capture_output=True, text=True, timeout=120, check=False)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def state(job: int) -> str:
    return facts(job).get("JobState", "")


def left_of(job: int, name: str) -> list[str]:
    """Processes that a job has left: of its steps, and of its gangs, which carry a tag instead of Slurm's variables."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            env = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        except OSError:
            continue
        ours = f"SLURM_JOB_ID={job}".encode() in env or any(row.startswith(f"{TAG}={name}-{job}/".encode()) for row in env)
        if ours and int(entry) != os.getpid() and alive(int(entry)):
            found.append(f"{entry} {command}")
    return found


def gone(job: int, name: str) -> None:
    until(f"job {job} over", lambda: state(job) not in ("RUNNING", "COMPLETING", "PENDING", "CONFIGURING", "SUSPENDED"))
    try:
        until("no process of it", lambda: not left_of(job, name), 60.0)
    except TimeoutError:
        raise AssertionError(f"job {job} left {left_of(job, name)}") from None
    assert not ran("squeue", "--noheader", "--steps", f"--jobs={job}"), "a step is left"


def ask_both(found: Endpoint) -> None:
    body = {"model": "fake", "prompt": "Hello", "max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    answer = httpx.post(f"{found.url}/v1/completions", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    assert answer.json()["choices"][0]["text"] == oracle("Hello")
    with Client(list(found.rpc), model="fake") as client:
        reply = client.complete("Hello again", max_tokens=TOKENS, temperature=0.0, ignore_eos=True).result()
    assert reply.choices[0].text == oracle("Hello again")


def allocation(site: Site) -> None:
    begun = time.monotonic()
    replicas = [{"name": "left", "tp_size": 2}, {"name": "right", "tp_size": 2}]
    file = site.write("whole", site.fake(replicas=replicas))
    job = site.submit(file, "--nodes=3", "--cpus-per-task=2", "--time=20", "--partition=main", "--no-handover")
    found = site.ready("whole", job)
    say("endpoint of three nodes", begun, found.url)

    begun = time.monotonic()
    until("the pointer names it", lambda: endpoints.read(site.jobs / "whole.json") == found, 30.0)
    ask_both(found)
    log = site.log("whole", job)
    assert f"endpoint: {found.url}" in log
    ranks = list((site.jobs / f"whole-{job}" / "replicas").rglob("rank*.log"))
    assert len(ranks) == 4, ranks
    token = (site.jobs / f"whole-{job}" / "start-0" / "token").read_bytes()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            held = Path(f"/proc/{entry}/cmdline").read_bytes() + Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        assert token not in held, f"the token is in the open: {entry}"
    say("answers over both doors", begun)

    begun = time.monotonic()
    ran("scancel", str(job))
    gone(job, "whole")
    say("scancel leaves nothing", begun, state(job))

    begun = time.monotonic()
    job = site.submit(file, "--nodes=2", "--cpus-per-task=2", "--time=20", "--no-handover")
    found = site.ready("whole", job)
    texts: list[str] = []
    streamed = threading.Thread(target=lambda: texts.append(long_answer(found.url)))
    streamed.start()
    until("the answer is under way", lambda: running(found) > 0, 60.0)
    ran("scancel", "--batch", "--signal=TERM", str(job))
    streamed.join(BOUND_S)
    assert texts == [oracle("long", 200)], texts
    gone(job, "whole")
    end = facts(job)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), end
    assert not (site.jobs / "whole.json").exists() and not (site.jobs / f"whole-{job}" / endpoints.FILE).exists()
    say("TERM drains and ends with 0", begun)


def refusal(site: Site) -> None:
    """Needs no Ray: the job ends before it."""
    begun = time.monotonic()
    broken = site.write("broken", site.fake(device="cuda", engine="portable"))
    job = site.submit(broken, "--nodes=3", "--cpus-per-task=2", "--time=20", "--no-handover")
    until("the job failed", lambda: state(job) == "FAILED")
    log = site.log("broken", job)
    assert facts(job)["ExitCode"] == "4:0", (facts(job), log)
    assert "error: pre-flight refuses: gpus" in log and "hint: submit with --gpus-per-node" in log, log
    assert "pre-flight ok   mpi: mpich" in log and "pmi2" in log and "pre-flight ok   files" in log and "on 3 nodes" in log, log
    gone(job, "broken")
    say("pre-flight refuses", begun, log.count("pre-flight"))


def long_answer(url: str) -> str:
    body = {"model": "fake", "prompt": "long", "max_tokens": 200, "temperature": 0.0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


def running(found: Endpoint) -> int:
    status = connect(found.deployment, Path(found.folder).parent).status()
    return sum(row.running for model in status.models for row in model.replicas)


def epochs(found: Endpoint) -> dict[str, int]:
    status = connect(found.deployment, Path(found.folder).parent).status()
    return {row.name: row.epoch for model in status.models for row in model.replicas}


def requeue(site: Site) -> None:
    begun = time.monotonic()
    job = site.submit(site.write("again", site.fake(replicas=2)), "--cpus-per-task=3", "--time=20", "--no-handover")
    first = site.ready("again", job)
    before = epochs(first)
    ran("scontrol", "requeue", str(job))
    until("it waits or runs again", lambda: facts(job).get("Restarts") == "1")
    # Slurm holds a requeued job back for two minutes; an operator who does not want to wait says so.
    until("it waits", lambda: state(job) in ("PENDING", "RUNNING"))
    ran("scontrol", "update", f"JobId={job}", "StartTime=now")
    second = site.ready("again", job, start=1)
    after = epochs(second)
    assert after.keys() == before.keys() and all(after[name] > before[name] for name in before), (before, after)
    ask_both(second)
    log = site.log("again", job)
    assert f"job {job}, start 2" in log and log.count("endpoint: ") == 2, log
    ran("scancel", str(job))
    gone(job, "again")
    say("requeued with new epochs", begun, {"before": before, "after": after})


@contextmanager
def front(site: Site, name: str, model: dict[str, object]) -> Iterator[tuple[Any, dict[str, object]]]:
    """Standing routers outside of any job: their status, and the `join` of those who come."""
    doors = {"rpc": {"host": "127.0.0.1", "port": 18100}, "back": {"host": "127.0.0.1", "port": 18200}}
    file = site.write(name, model, **doors)
    run_dir = site.tmp / "front"
    with open(site.tmp / f"{name}.log", "wb") as log:
        host = subprocess.Popen([*TRIREME, "router", str(file), "--run-dir", str(run_dir)], stdout=log, stderr=log)
    try:
        control = connect(name, run_dir)
        until("the routers stand", lambda: host.poll() is None and (run_dir / name / "join.json").exists(), 120.0)
        keys = ran(*TRIREME, "keys", "join", "slurm", "--name", name, "--run-dir", str(run_dir)).splitlines()[-1]
        yield control, {"file": str(run_dir / name / "join.json"), "key_file": keys}
    finally:
        host.send_signal(signal.SIGTERM)
        code = host.wait(120)
    assert code == 0, (site.tmp / f"{name}.log").read_text()


#: The shortest limit that Slurm's early signal leaves any use of; one that leaves time for two Rays on a busy machine.
SHORT, LONGER = ("--time=3",), ("--time=6", "--lead=200")


def hand_over(
    site: Site,
    name: str,
    model: dict[str, object],
    right: Callable[[str, str], bool],
    *,
    launcher: str,
    limit: Sequence[str],
    exact: bool = False,
) -> dict[str, object]:
    """A job and its successor under constant load; returns the result."""
    with front(site, f"{name}-front", model) as (control, join):
        job = site.submit(site.write(name, model, join=join, launcher=launcher), "--cpus-per-task=3", *limit)
        site.ready(name, job)
        status = control.status()
        load = Load(status.url, status.rpc, status.key_file, str(model["name"]), TOKENS, right, streams=4, calls=2, exact=exact)
        load.start()
        try:
            folder = site.jobs / f"{name}-{job}"
            successor = int(
                until("a successor", lambda: (folder / "successor" / "job").exists() and (folder / "successor" / "job").read_text())
            )
            site.submitted.append(successor)
            site.ready(name, successor)
            until("the first job has ended", lambda: state(job) not in ("RUNNING", "COMPLETING"))
            mark = load.answered
            until("the successor answers alone", lambda: load.answered > mark + 20)
        finally:
            load.stop()
        end = facts(job)
        assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), end
        assert "draining: the successor is ready" in site.log(name, job), site.log(name, job)
        assert not load.wrong, load.wrong[:5]
        pointed = endpoints.read(site.jobs / f"{name}.json")
        assert pointed is not None and pointed.generation > 1, pointed
        gone(job, name)
        ran("scancel", f"--name={name}")  # on a slow machine the successor has one of its own by now
        gone(successor, name)
    return {"answered": load.answered, "wrong": len(load.wrong), "longest_s": round(load.longest, 2)}


def fake_answer(prompt: str, text: str) -> bool:
    return text == oracle(prompt)


def handover(site: Site) -> None:
    begun = time.monotonic()
    say("hand-over, fake engine", begun, hand_over(site, "fast", site.fake(), fake_answer, launcher="local", limit=SHORT))


def handover_ray(site: Site) -> None:
    begun = time.monotonic()
    say("hand-over, a Ray each", begun, hand_over(site, "rays", site.fake(), fake_answer, launcher="ray", limit=LONGER))


def engine(site: Site) -> None:
    begun = time.monotonic()
    folder = tiny_model(site.tmp / "tiny")
    model = {"name": "tiny", "path": str(folder), "engine": "portable", "tp_size": 2, "fixed_shape": True, "kv_tokens": 4096,
             "max_seq_len": 256, "max_batch_size": 8}  # fmt: skip
    first: dict[str, str] = {}

    def as_before(prompt: str, found: str) -> bool:
        return found.count(",") == TOKENS - 1 and first.setdefault(prompt, found) == found

    detail = hand_over(site, "real", model, as_before, launcher="local", limit=SHORT, exact=True)
    say("hand-over, portable engine", begun, detail | {"prompts": len(first)})


def array(site: Site) -> None:
    begun = time.monotonic()
    with front(site, "tasks-front", site.fake()) as (control, join):
        job = site.submit(
            site.write("tasks", site.fake(), join=join, launcher="local"), "--cpus-per-task=2", "--time=20", "--array=2", "--no-handover"
        )
        pointers = [endpoints.pointer(str(site.jobs), "tasks", str(task)) for task in range(2)]
        found = until("both tasks ready", lambda: (rows := [endpoints.read(path) for path in pointers]) and all(rows) and rows)
        tasks = [one.job for one in found]
        assert len({one.deployment for one in found}) == 2
        url = control.status().url
        assert long_answer(url) == oracle("long", 200)
        ran("scancel", str(job))
        for task in tasks:
            gone(task, "tasks")
    say("an array of replicas", begun, tasks)


PARTS = {
    "refusal": refusal,
    "allocation": allocation,
    "requeue": requeue,
    "handover": handover,
    "handover-ray": handover_ray,
    "engine": engine,
    "array": array,
}


def main() -> None:
    site = Site(Path(sys.argv[1]))
    try:
        for part in sys.argv[2:] or PARTS:
            PARTS[part](site)
    except BaseException:
        site.tell()
        raise


if __name__ == "__main__":
    main()
