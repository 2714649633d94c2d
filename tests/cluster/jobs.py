"""``ray job submit`` on three raylets, inside a network namespace: ``python -m tests.cluster.jobs FOLDER``.

Nodes have 0, 2 and 3 CPU shares, so that each of two gangs (3 and 2 ranks) has one node that holds it, and a lost node leaves too little.
Steps as :mod:`tests.faults.namespace` has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec
import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.control.host.control_socket import ControlClient, connect
from orchestrator.control.launch.subprocesses import TAG, alive, tagged
from tests.faults.control_plane import cases, daemon, epochs, exactly, rows, until
from tests.faults.namespace import measured, step
from tests.faults.streams import run_all
from tests.support.deployment import write_config
from workers.engines.fake import expected_tokens
from workers.protocol.errors import TriremeError
from workers.protocol.messages import SamplingParams

#: Generous: on a busy machine Ray takes ten times as long to start a worker as on an idle one.
BOUND_S = 300.0
DASHBOARD, GCS = "http://127.0.0.1:8265", "127.0.0.1:6379"
#: What `ray status` shows of a gang of three ranks: on a cluster that could not hold it at all, and on one that could, were it empty.
DEMAND, CUT_DEMAND = ("{'CPU': 3.0} * 1 (STRICT_PACK): 1+ pending", "{'CPU': 1.0} * 3 (PACK): 1+ pending")


def ray_cli(*line: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ray"), *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)


def submit(folder: Path, name: str, file: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What a user types in the folder of the deployment file."""
    job = ("job", "submit", "--address", DASHBOARD, "--submission-id", name, "--working-dir", str(folder), *options)
    return ray_cli(*job, "--", "trireme", "up", file)


@functools.cache
def server() -> JobSubmissionClient:
    return JobSubmissionClient(DASHBOARD)


def details(name: str) -> JobDetails:
    found = server().get_job_info(name)
    assert isinstance(found, JobDetails)
    return found


def log(name: str) -> str:
    return str(server().get_job_logs(name))


def ended(name: str) -> bool:
    """Whether a job has ended; no more than twice a second, for the job server has other things to do."""
    time.sleep(0.5)
    return bool(details(name).status.is_terminal())


def wait_ready(name: str, run: Path) -> ControlClient:
    control = connect("e2e", run)

    def ready() -> bool:
        try:
            if control.status().state == "READY":
                return True
        except TriremeError:
            pass  # not yet
        if ended(name):
            raise ChildProcessError(f"job {name} ended: {details(name)}\n{log(name)}")
        return False

    try:
        until(f"job {name} is READY", ready, BOUND_S)
    except TimeoutError:
        print(log(name), file=sys.stderr)
        raise
    return control


def gangs_left() -> list[int]:
    """Every process of any gang, whatever its deployment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{TAG}=".encode() in Path("/proc", entry, "environ").read_bytes() and alive(int(entry)):
                found.append(int(entry))
        except OSError:
            continue
    return found


def nothing_left(what: str) -> None:
    """No process of a gang, no placement group, no actor of ours."""
    until(f"{what}: no process of a gang", lambda: not gangs_left(), BOUND_S)

    def ours() -> list[str]:
        groups = [row["name"] for row in ray.util.placement_group_table().values() if row["state"] != "REMOVED"]
        return groups + [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].startswith("trireme/")]

    until(f"{what}: no placement group and no actor", lambda: not ours(), BOUND_S)


def closed_to_strangers() -> None:
    answer = httpx.get(f"{DASHBOARD}/api/jobs/", trust_env=False)
    assert answer.status_code == 401, answer.status_code
    step("a stranger without the token", answer.status_code)


def codes_by_class(work: Path) -> None:
    submitted = submit(work, "wrong", "missing.yaml")
    found = details("wrong")
    assert submitted.returncode == 1 and found.status == JobStatus.FAILED, (submitted.returncode, found)
    assert found.driver_exit_code == 3 and "missing.yaml" in log("wrong"), (found.driver_exit_code, log("wrong"))
    step("a job's exit code tells the class", found.driver_exit_code)


def demanded(shape: str) -> None:
    until(f"ray status shows {shape}", lambda: shape in ray_cli("status", "--address", GCS).stdout, BOUND_S)


def add_node(number: int, cpus: int, folder: Path) -> None:
    node = ("--node-ip-address", f"127.0.0.{number}", "--num-cpus", str(cpus), "--temp-dir", str(folder / f"r{number}"))
    for _ in range(4):
        started = ray_cli("start", "--address", GCS, *node, "--object-store-memory", "80000000")
        if started.returncode == 0:
            return
        # Ray waits 30 s for a raylet, which is too short on a busy machine: what it gave up must not come up later.
        with contextlib.suppress(LookupError):
            os.kill(daemon("/raylet", f"--node_ip_address=127.0.0.{number}").pid, signal.SIGKILL)
    raise ChildProcessError(started.stdout + started.stderr)


def raylet_dies(control: ControlClient, folder: Path) -> None:
    """Its gang finds no node that holds it, the autoscaler is shown what is missing, and a new node gets the gang."""
    before = control.status()
    wide = rows(before)["wide"]
    assert wide.hosts == ("127.0.0.3",) and rows(before)["left"].hosts == ("127.0.0.2",), rows(before)
    raylet = daemon("/raylet", "--node_ip_address=127.0.0.3")
    tag = f"{before.name}/wide/{wide.epoch}"

    def kill() -> float:
        begun = time.monotonic()
        os.kill(raylet.pid, signal.SIGKILL)
        until("its ranks are gone", lambda: not tagged(tag), 60.0)
        return time.monotonic() - begun

    gone, pause = exactly(control, 400, kill)
    measured("Ray job, raylet killed -> its ranks are gone", gone, 5.0)
    measured("Ray job, raylet killed -> next token at the client", pause, 1.0)
    step("0 lost when a raylet dies under load")
    demanded(DEMAND)
    assert rows(control.status())["left"].epoch == rows(before)["left"].epoch, "another gang was touched"
    step("the autoscaler sees the demand", rows(control.status())["wide"].cause)
    add_node(4, 1, folder)
    demanded(CUT_DEMAND)
    step("the layout is judged again when the cluster changes")
    begun = time.monotonic()
    add_node(5, 3, folder)
    until("placed again", lambda: (s := control.status()).state == "READY" and rows(s)["wide"].epoch > wide.epoch, BOUND_S)
    assert rows(control.status())["wide"].hosts == ("127.0.0.5",)
    measured("Ray job, new raylet -> gang placed and ready there", time.monotonic() - begun, 60.0)
    exactly(control, 50, lambda: 0.0)
    step("the gang is placed again on a living node", epochs(control.status()))


def stop(name: str) -> float:
    """What ``ray job stop`` asks of the server; when it was asked."""
    begun = time.monotonic()
    assert server().stop_job(name)
    return begun


def stop_drains(control: ControlClient) -> None:
    status = control.status()
    asked = cases(400)
    run = asyncio.run(run_all(status, asked, lambda: stop("serving"), enough=120))
    for case, (choice,) in zip(asked, run.answers, strict=True):
        want = expected_tokens(case.prompt.encode(), SamplingParams(max_tokens=400, temperature=0.0))
        assert (choice.tokens, choice.reason) == (want, "length"), case.prompt
    until("the job's end", lambda: ended("serving"), BOUND_S)
    assert details("serving").status == JobStatus.STOPPED
    assert not alive(status.pid) and not any(map(alive, status.routers.values()))
    assert "nothing is left" in log("serving"), log("serving")
    nothing_left("job stop")
    measured("Ray job stopped under load -> nothing left", time.monotonic() - run.verdict, 60.0)
    step("a stopped job finishes what runs and leaves nothing")


def killed_while_it_drains(control: ControlClient) -> None:
    """Ray kills a job three seconds after its SIGTERM: what is left then is the controller's."""
    status = control.status()
    with httpx.Client(base_url=status.url, trust_env=False, timeout=BOUND_S) as http:
        body = {"model": "fake", "prompt": "long", "max_tokens": 1900, "temperature": 0.0, "ignore_eos": True, "stream": True}
        try:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                begun = stop("hasty")
                for _ in lines:
                    pass
        except httpx.TransportError as error:
            cut = type(error).__name__
        else:
            raise AssertionError("the answer was finished: nothing was killed")
    until("the killed host's end", lambda: not alive(status.pid), BOUND_S)  # its sockets close before it is gone
    nothing_left("job killed")
    measured("Ray job killed while it drained -> nothing left", time.monotonic() - begun, 60.0)
    step("a job that Ray kills leaves nothing", cut)


def main(folder: Path) -> None:
    work, run = folder / "work", folder / "run"
    work.mkdir()
    gangs = [{"name": "wide", "tp_size": 3}, {"name": "left", "tp_size": 2}]
    deployment = {"launcher": "ray", "drain_grace_s": 30, "replica_timeout_s": 1.0, "run_dir": str(run)}
    file = write_config(work, deployment=deployment, replicas=gangs, max_batch_size=16, kv_tokens=65536)
    closed_to_strangers()
    codes_by_class(work)
    ray.init(address=GCS, namespace="trireme", log_to_driver=False)
    env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    submitted = submit(work, "serving", file.name, "--no-wait", "--runtime-env-json", msgspec.json.encode(env).decode())
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    control = wait_ready("serving", run)
    exactly(control, 50, lambda: 0.0)
    assert daemon("gcs_server") and not (run / "e2e" / "keys" / "ray_token").exists(), "a second Ray was started"
    step("a job serves from the cluster that it runs on", {name: row.hosts for name, row in rows(control.status()).items()})
    raylet_dies(control, folder)
    stop_drains(control)
    submitted = submit(work, "hasty", file.name, "--no-wait")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    control = wait_ready("hasty", run)
    assert "RAY_JOB_STOP_WAIT_TIME_S" in log("hasty"), "nobody was warned"
    killed_while_it_drains(control)
    ray.shutdown()
    shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
