"""What a router tells about itself: ``/status``, ``/ui/data``, ``/metrics``, and its state file; and the state file of a replica.

A real router with two replicas that say fixed things: ``a`` is ready and answered one request, ``b`` left. The replica's state file is that
of a real gang of one rank on FakeEngine. Times, process ids and versions are masked. ``metrics.txt``: every family with its type and help,
and every series with its labels, with the value where that is no matter of time. Record again: ``python -m tests.recorded.record status``.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.recorded.recording import MASK, as_json, as_text, check, check_names, masked, without
from tests.recorded.stage import Line, Stage
from tests.support.gang import Gang, short_folder, wait_for
from workers.protocol.messages import Bye

AREA = "status"
ROUTER = ["status.json", "ui_data.json", "metrics.txt", "router_serving.json", "router_stopped.json"]
REPLICA = ["replica_ready.json", "replica_stopped.json", "replica_failed.json"]
NAMES = [*ROUTER, *REPLICA]
#: A matter of time.
TIMES = ("age_s", "signal_age_s", "tok_s", "time", "started", "total_s", "since", "version")
#: Series whose values are, too, or the machine's.
UNSTEADY = re.compile(r"process_|trireme_[a-z0-9_]*_second")
BEAT: dict[str, Any] = {
    "step": 41, "busy_ms": 1.5, "predicted_ms": 2.5, "running": 2, "waiting": 1, "free_blocks": 40, "prefill_tokens": 32,
    "step_ms": 2.25, "prompt_tokens_total": 1000, "output_tokens_total": 500, "prefix_queries_total": 60, "prefix_hits_total": 20,
    "preemptions_total": 1, "step_tokens": [3, 2, 1, *[0] * 13], "step_tokens_total": 9,
}  # fmt: skip


def heard(stage: Stage) -> bool:
    """Whether the router knows all that its replicas said."""
    rows = {row["name"]: row for row in json.loads(stage.get("/status").body)["replicas"]}
    return bool(rows["a"]["step"] == BEAT["step"] and rows["b"]["state"] == "lost")


def router() -> dict[str, str]:
    with Stage() as stage:
        body = {"model": "m", "prompt": "hi", "max_tokens": 64, "seed": 1}
        stage.post("/v1/completions", body, (Line(("He", "llo")),))
        other = stage.replica_named("b", "boot-b")
        other.tell(Bye(boot="boot-b", reason="it leaves"))
        stage.replica.beat(**BEAT)
        wait_for(lambda: heard(stage), 30.0, what="what the replicas said")
        status, page = (json.loads(stage.get(path).body) for path in ("/status", "/ui/data"))
        found = {
            "status.json": as_json(without(status, TIMES)),
            "ui_data.json": as_json(without(latencies_masked(page), TIMES)),
            "metrics.txt": as_text(metrics(stage.get("/metrics").body.decode())),
            "router_serving.json": state_file(stage),
        }
        assert stage.router.terminate() == 0
        return found | {"router_stopped.json": state_file(stage)}


def state_file(stage: Stage) -> str:
    text = masked(stage.router.state_file.read_text(), stage.places)
    return as_json(without(json.loads(text), ("pid",)))


def latencies_masked(page: dict[str, Any]) -> dict[str, Any]:
    """Only the last count of a latency, that of all observations, is no matter of time."""
    for model in page["models"]:
        for latency in (model["first_token"], model["inter_token"]):
            latency["counts"] = [*[MASK] * (len(latency["counts"]) - 1), latency["counts"][-1]]
    return page


def metrics(text: str) -> str:
    lines = [line.rpartition(" ")[0] if UNSTEADY.match(line) else line for line in text.splitlines()]
    return re.sub(r'version="[^"]+"', 'version="<version>"', "\n".join(lines))


def replica() -> dict[str, str]:
    """State files of real ranks: one that serves and is ordered to stop, and one that cannot start."""
    found = {}
    with short_folder() as folder:
        with Gang(folder, [], name="r0", tp=1) as gang:
            gang.wait_phase("ready")
            found["replica_ready.json"] = gang_file(gang.run_dir, folder)
            gang.mpiexec.send_signal(signal.SIGTERM)
            gang.wait_exit()
            found["replica_stopped.json"] = gang_file(gang.run_dir, folder)
        with Gang(folder, [], name="r1", tp=2, ranks=1) as broken:
            broken.wait_exit()
            found["replica_failed.json"] = gang_file(broken.run_dir, folder)
    return found


def gang_file(run_dir: Path, folder: Path) -> str:
    state = json.loads((run_dir / "state.json").read_text().replace(str(folder), "<folder>"))
    state["pids"] = [[rank, "<host>", "<pid>"] for rank, _, _ in state["pids"]]
    return as_json(without(state, TIMES))


def recordings() -> dict[str, str]:
    return router() | replica()


@pytest.fixture(scope="module")
def router_now() -> dict[str, str]:
    return router()


@pytest.fixture(scope="module")
def replica_now() -> dict[str, str]:
    return replica()


@pytest.mark.parametrize("name", ROUTER)
def test_the_router_tells_of_itself_as_recorded(name: str, router_now: dict[str, str]) -> None:
    check(AREA, name, router_now[name])


@pytest.mark.mpi
@pytest.mark.parametrize("name", REPLICA)
def test_the_replicas_state_file_is_as_recorded(name: str, replica_now: dict[str, str]) -> None:
    check(AREA, name, replica_now[name])


def test_nothing_else_is_recorded() -> None:
    check_names(AREA, NAMES)
