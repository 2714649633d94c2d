"""`trireme debug` on a deployment whose replica is killed under load: the story reports the loss, the dump replays exactly."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from orchestrator.cli.main import run
from orchestrator.client import AsyncClient, Client
from orchestrator.control.host.control_socket import ControlClient, DeploymentStatus
from orchestrator.router.core.recorder import read_dump
from orchestrator.router.diagnostics import StoryReport
from tests.support.deployment import MODEL, deployed, wait_for_state, write_config
from tests.support.gang import short_folder, wait_for

STREAMS, TOKENS = 12, 300
SECRET = [33, 99, 44, 101, 55]


def wait_for_replicas(status: DeploymentStatus) -> None:
    """Until the router may send to both replicas: a replica is up before the router has its Hello."""
    with Client([address.endpoint for address in status.rpc], model=MODEL) as client:
        wait_for(lambda: [replica["state"] for replica in client.status()["replicas"]] == ["ready", "ready"], what="both replicas")


async def served(status: DeploymentStatus, kill: bool) -> list[str]:
    """Ids of requests that were read to their end while a replica was killed."""
    running: set[int] = set()
    all_run = asyncio.Event()
    async with AsyncClient([address.endpoint for address in status.rpc], model=MODEL) as client:

        async def one(index: int) -> str:
            call = client.complete([*SECRET, 65 + index], texts=False, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            count = 0
            async for piece in call.stream():
                count += len(piece.tokens)
                running.add(index)
                if len(running) == STREAMS:
                    all_run.set()
            assert count == TOKENS
            return call.request

        async def killed() -> None:
            await all_run.wait()
            _, _, pid = status.models[0].replicas[0].pids[0]
            os.kill(pid, signal.SIGKILL)

        ids, _ = await asyncio.gather(asyncio.gather(*map(one, range(STREAMS))), killed() if kill else asyncio.sleep(0))
        return ids


@pytest.mark.timeout(300)
def test_a_killed_replica_is_told_of_and_its_dump_replays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with short_folder() as folder, deployed(write_config(folder)) as (control, status):
        assert isinstance(control, ControlClient)
        wait_for_replicas(status)
        ids = asyncio.run(served(status, kill=True))
        wait_for_state(control, "READY", 120.0)
        ids += asyncio.run(served(status, kill=False))
        capsys.readouterr()

        def command(*words: str) -> str:
            assert run(["debug", *words, "--run-dir", str(folder / "run")]) == 0, capsys.readouterr().err
            return capsys.readouterr().out

        stories = [command("story", id) for id in ids]
        moved = [story for story in stories if "lost at" in story]
        assert moved and len(moved) < len(ids), "\n\n".join(["some ran at the killed replica, some did not", *stories])
        for story in moved:
            words = ["accepted, and queued", "attempt 1: ", "acknowledged by", "first token from", "lost at", "queued again",
                     "attempt 2", f"finished: length, {TOKENS} tokens"]  # fmt: skip
            places = [story.find(word) for word in words]
            assert -1 not in places and places == sorted(places), story
        (found,) = msgspec.json.decode(command("story", ids[0], "-o", "json"), type=list[StoryReport])
        assert found.stories[0].request_id == ids[0] and found.stories[0].choices[0].end == "finished"
        assert run(["debug", "story", "nobody", "--run-dir", str(folder / "run")]) != 0
        assert "no longer kept" in capsys.readouterr().err

        file = tmp_path / "incident.dump"
        assert command("dump", "-o", str(file)).split() == [str(file)]
    lines = file.read_bytes().splitlines()
    dump = read_dump(lines)
    assert len(dump.events) > 100 and dump.header.dropped == 0
    text = file.read_text()
    assert re.search(r"99,\s*44,\s*101", text) is None and '"client":"local"' not in text, "a prompt or a client is in the dump"
    done = subprocess.run([sys.executable, "-m", "orchestrator.sim", "--replay", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "the replay is the same" in done.stdout, done.stdout + done.stderr
    lines[-2] = lines[-2].replace(b'"at":', b'"at":1', 1)
    file.write_bytes(b"\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "orchestrator.sim", "--replay", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "and is" in done.stdout, "a dump that was changed replays otherwise"
