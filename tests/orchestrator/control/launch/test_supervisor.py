"""Real mpiexec, real ranks, real signals: whoever dies, the whole gang is gone and the right cause is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.control.launch import mpiexec
from orchestrator.control.launch.launcher import KEPT_EPOCHS, GangSpec, prepare
from orchestrator.control.launch.local_launcher import LocalLauncher
from orchestrator.control.launch.subprocesses import TAG, ChildProcess, alive, tagged
from orchestrator.control.launch.supervisor import GangSupervisor, LocalNode
from orchestrator.control.reconciler import ENDED, GangStatus
from orchestrator.files import write_private
from tests.support.tiny_models import tiny_model
from workers.epoch import make_epoch
from workers.protocol.errors import EnvironmentFault
from workers.protocol.specs import FakeSpec, Parallel, PortableSpec, ReplicaSpec
from workers.protocol.status import GangPhase
from workers.serving.router_io import KeyPair

ROOT = Path(__file__).resolve().parents[4]
MPICH = mpiexec.MpiInstall(mpiexec="/opt/mpi/bin/mpiexec", family="mpich")
OPENMPI = mpiexec.MpiInstall(mpiexec="/opt/mpi/bin/mpiexec", family="openmpi")
BOUND_S = 120.0


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "not within the bound"
        time.sleep(0.02)


def spec(tmp_path: Path, *, world: int = 3, **more: object) -> GangSpec:
    engine = FakeSpec(kv_tokens=512, max_seq_len=128)
    replica = ReplicaSpec(name="r", model="fake", artifact=str(tmp_path), parallel=Parallel(tp=world), engine=engine)
    return msgspec.structs.replace(GangSpec(deployment="t", replica=replica, run_dir=str(tmp_path / "gangs")), **more)


class Launched:
    """One gang under the local launcher."""

    def __init__(self, tmp_path: Path, **more: object) -> None:
        self.launcher = LocalLauncher(mpiexec.find_mpi(os.environ["PATH"]), env())
        self.spec = spec(tmp_path, **more)
        self.launcher.start(self.spec)

    @property
    def status(self) -> GangStatus:
        return self.launcher.poll()[0]

    def reach(self, *phases: GangPhase) -> GangStatus:
        until(lambda: self.status.phase in (*phases, "failed", "stopped"))
        assert self.status.phase in phases, self.status
        return self.status

    @property
    def tag(self) -> str:
        return self.spec.tag(self.status.epoch)


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    launched.launcher.close()
    assert launched.launcher.poll() == []


@pytest.mark.mpi
def test_drain_ends_well_and_leaves_nothing(gang: Launched) -> None:
    ready = gang.reach("ready")
    tag = gang.tag
    assert ready.capacity is not None and ready.capacity.tp == 3 and [rank for rank, _, _ in ready.pids] == [0, 1, 2]
    assert len(tagged(tag)) >= 4
    gang.launcher.drain("r", ready.epoch)
    assert gang.reach("stopped").cause == ""
    until(lambda: not tagged(tag), 5.0)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_is_named_and_takes_all_along(gang: Launched, rank: int) -> None:
    ready = gang.reach("ready")
    tag, pid = gang.tag, ready.pids[rank][2]
    os.kill(pid, signal.SIGKILL)
    assert f"rank {rank} (pid {pid})" in gang.reach("failed").cause
    until(lambda: not tagged(tag), 5.0)


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_mpiexec_killed_or_stopped(gang: Launched, number: int) -> None:
    ready = gang.reach("ready")
    tag = gang.tag
    child = gang.launcher._gangs["r", ready.epoch]._child
    assert child is not None
    os.kill(child.pid, number)
    if number == signal.SIGSTOP:
        assert gang.status.phase == "ready", "a stopped mpiexec is no reason to stop serving"
        os.kill(ready.pids[1][2], signal.SIGKILL)
        assert "rank 1" in gang.reach("failed").cause
        gang.launcher.kill("r", ready.epoch)
    else:
        assert f"mpiexec (pid {child.pid}) was killed by SIGKILL" in gang.reach("failed").cause
    until(lambda: not tagged(tag), 5.0)


@pytest.mark.mpi
def test_a_stopped_rank_does_not_survive_kill(gang: Launched) -> None:
    ready = gang.reach("ready")
    tag = gang.tag
    os.kill(ready.pids[1][2], signal.SIGSTOP)
    gang.launcher.kill("r", ready.epoch)
    assert gang.launcher.poll() == [] and tagged(tag) == []


#: A rank where no mpi4py is installed.
WITHOUT_MPI = "import sys; sys.modules['mpi4py'] = None; from workers.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(("kind", "world"), [("fake", 2), ("portable", 1)])
def test_a_gang_that_needs_no_mpi(kind: str, world: int, tmp_path: Path) -> None:
    """One rank of the portable engine, or a fake one of any layout, whose rank 0 stands for all."""

    def launch(world: int) -> GangSupervisor:
        launched = spec(tmp_path, world=world, command=(sys.executable, "-c", WITHOUT_MPI))
        if kind == "portable":
            engine = PortableSpec(kv_tokens=512, max_seq_len=128)
            replica = msgspec.structs.replace(launched.replica, artifact=str(tiny_model(tmp_path / "tiny")), engine=engine)
            launched = msgspec.structs.replace(launched, replica=replica)
        started = GangSupervisor(launched, make_epoch(), [LocalNode(world)], mpi=None, env=env())
        started.start()
        return started

    gang = launch(world)
    until(lambda: gang.status().phase in (*ENDED, "ready"))
    assert gang.status().phase == "ready", gang.status()
    gang.drain()
    until(lambda: gang.status().phase in ENDED)
    assert gang.status().phase == "stopped" and not tagged(gang.tag)
    assert "rank 0 returned 0" in Path(gang.status().log_dir, "mpiexec.log").read_text()
    if kind == "fake":
        gang = launch(world)
        until(lambda: gang.status().phase == "ready")
        ((_, _, pid),) = gang.status().pids
        os.kill(pid, signal.SIGKILL)
        until(lambda: gang.status().phase == "failed")
        assert f"rank 0 (pid {pid}) was killed by SIGKILL" in gang.status().cause and not gang.kill()
    else:
        assert (lone := launch(2).status()).phase == "failed" and "no MPI found" in lone.cause and "trireme-llm[mpich]" in lone.hint


@pytest.mark.mpi
def test_the_supervisors_death_ends_its_gang(tmp_path: Path) -> None:
    code = (
        "import sys, time, msgspec, os\n"
        "from orchestrator.control.launch import mpiexec\n"
        "from orchestrator.control.launch.launcher import GangSpec\n"
        "from orchestrator.control.launch.local_launcher import LocalLauncher\n"
        "launcher = LocalLauncher(mpiexec.find_mpi(os.environ['PATH']), os.environ)\n"
        "launcher.start(msgspec.json.decode(sys.argv[1], type=GangSpec))\n"
        "while True:\n"
        "    print(msgspec.json.encode(launcher.poll()[0]).decode(), flush=True)\n"
        "    time.sleep(0.05)\n"
    )
    text = msgspec.json.encode(spec(tmp_path)).decode()
    host = subprocess.Popen([sys.executable, "-c", code, text], env=env(), stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    status = next(row for row in (msgspec.json.decode(line, type=GangStatus) for line in host.stdout) if row.phase in ("ready", "failed"))
    assert status.phase == "ready", status
    tag = f"t/r/{status.epoch}"
    assert len(tagged(tag)) >= 4
    host.kill()
    host.wait()
    host.stdout.close()
    until(lambda: not tagged(tag), 5.0)


@pytest.mark.mpi
def test_a_wrong_spec_fails_with_the_replicas_own_words(tmp_path: Path) -> None:
    launched = Launched(tmp_path, command=(sys.executable, "-m", "workers", "--no-such-flag"))
    try:
        failed = launched.reach("failed")
        assert failed.cause and not failed.pids
    finally:
        launched.launcher.close()


def test_a_missing_program_is_a_failed_gang(tmp_path: Path) -> None:
    gang = GangSupervisor(
        spec(tmp_path), make_epoch(), [LocalNode(3)], mpi=mpiexec.MpiInstall(mpiexec="/no/mpiexec", family="mpich"), env={}
    )
    gang.start()
    status = gang.status()
    assert status.phase == "failed" and "/no/mpiexec" in status.cause and gang.kill() == []


def test_files_of_a_gang_are_private_and_old_epochs_go(tmp_path: Path) -> None:
    wanted = spec(tmp_path, key='{"public": "p", "secret": "s"}')
    folders = [prepare(wanted, epoch) for epoch in range(1, KEPT_EPOCHS + 4)]
    assert [folder.exists() for folder in folders] == [False] * 3 + [True] * KEPT_EPOCHS
    last = folders[-1]
    assert last.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in last.iterdir()} == {0o600}
    told = msgspec.json.decode((last / "spec.json").read_bytes(), type=ReplicaSpec)
    assert (told.epoch, told.run_dir, told.key_file) == (KEPT_EPOCHS + 3, str(last), str(last / "key.json"))
    assert b"secret" not in (last / "spec.json").read_bytes()
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_private(tmp_path / "none" / "x", b"")


def test_the_revision_changes_with_anything_but_the_epoch(tmp_path: Path) -> None:
    one = spec(tmp_path)
    assert one.revision == spec(tmp_path).revision != spec(tmp_path, spread=True).revision


def test_the_revision_tells_key_pairs_apart_by_the_public_key_alone(tmp_path: Path) -> None:
    def revision(public: str, secret: str) -> str:
        pair = KeyPair(public=public * 40, secret=secret * 40)
        return msgspec.structs.replace(spec(tmp_path), key=msgspec.json.encode(pair).decode()).revision

    assert revision("1", "2") == revision("1", "3") != revision("2", "2")


def test_a_child_dies_with_the_thread_that_keeps_it_and_reports_its_end() -> None:
    lines: list[str] = []
    codes: list[int] = []
    child = ChildProcess(["/bin/sh", "-c", "echo one; echo two; exit 7"], env=env(), on_line=lines.append, on_exit=codes.append)
    assert child.wait(10.0) == 7
    until(lambda: codes == [7])
    assert lines == ["one", "two"]
    sleeper = ChildProcess(["/bin/sleep", "60"], env=env() | {TAG: "t/child/1"})
    assert tagged("t/child/1") == [sleeper.pid] and os.getsid(sleeper.pid) == sleeper.pid and alive(sleeper.pid)
    sleeper.signal(signal.SIGKILL)
    assert sleeper.wait(10.0) == -signal.SIGKILL and not alive(sleeper.pid)


HOSTS = [mpiexec.MpiHost(address="10.0.0.1", ranks=2), mpiexec.MpiHost(address="10.0.0.2", ranks=1)]


def test_argv() -> None:
    assert mpiexec.argv(MPICH, HOSTS[:1], ["rank"])[1:] == ["-n", "2", "rank"]
    assert mpiexec.argv(OPENMPI, HOSTS[:1], ["rank"])[1:] == ["--map-by", ":OVERSUBSCRIBE", "-n", "2", "rank"]
    many = mpiexec.argv(MPICH, HOSTS, ["rank"], control="10.0.0.1")
    assert many[1:] == ["-launcher", "manual", "-localhost", "10.0.0.1", "-hosts", "10.0.0.1:2,10.0.0.2:1", "-n", "3", "rank"]
    attached = ["--leave-session-attached", "--map-by", "slot:OVERSUBSCRIBE", "--host", "10.0.0.1:2,10.0.0.2:1"]
    assert mpiexec.argv(OPENMPI, HOSTS, ["rank"], control="10.0.0.1")[1:] == [*attached, "-n", "3", "rank"]


def test_family_and_environment() -> None:
    assert mpiexec.family_of("HYDRA build details:\n Version: 5.0.2", "x") == "mpich"
    assert mpiexec.family_of("mpirun (Open MPI) 5.0.11", "x") == "openmpi"
    with pytest.raises(EnvironmentFault, match="unknown MPI family"):
        mpiexec.family_of("Intel(R) MPI Library", "x")
    base = {"PATH": "p", "CUDA_VISIBLE_DEVICES": "9", "PMI_RANK": "1", "OMPI_COMM_WORLD_RANK": "0", "SLURM_NTASKS": "64"}
    base["RAY_LOCAL_WORLD_SIZE"] = "4"
    assert mpiexec.environment(MPICH, base, cuda=False) == {"PATH": "p"}
    cpu, gpu = mpiexec.environment(OPENMPI, base, cuda=False), mpiexec.environment(OPENMPI, base, cuda=True)
    assert cpu["OMPI_MCA_pml"] == "ob1" and "OMPI_MCA_pml" not in gpu and gpu["OMPI_MCA_mpi_yield_when_idle"] == "1"


def test_hydra_lines_and_exit_codes() -> None:
    line = "HYDRA_LAUNCH: /opt/hydra_pmi_proxy --control-port 10.0.0.1:5 --launcher manual --proxy-id 1 "
    proxy = "exec /opt/hydra_pmi_proxy --control-port 10.0.0.1:5 --launcher manual --proxy-id 1"
    addresses = [host.address for host in HOSTS]
    assert mpiexec.proxy_line(line, addresses) == (1, proxy)
    assert mpiexec.proxy_line("HYDRA_LAUNCH_END", addresses) is None
    assert mpiexec.exit_signal(MPICH, 9) == mpiexec.exit_signal(OPENMPI, 137) == mpiexec.exit_signal(MPICH, -9) == signal.SIGKILL
    assert mpiexec.exit_signal(MPICH, 3) is None and mpiexec.exit_signal(OPENMPI, 9) is None
    assert mpiexec.signal_name(11) == "SIGSEGV"


def test_what_stands_in_for_ssh_says_what_is_wanted_where() -> None:
    agent = mpiexec.environment(OPENMPI, {}, cuda=False)["PRTE_MCA_plm_ssh_agent"].split()
    words = ["-x", "10.0.0.2", "PATH=/opt:$PATH ; export PATH ;", "/opt/prted", "--leader", "10.0.0.1"]
    ran = subprocess.run([*agent, *words], capture_output=True, text=True, timeout=BOUND_S, check=True)
    command = "PATH=/opt:$PATH ; export PATH ;exec /opt/prted --leader 10.0.0.1"
    assert mpiexec.proxy_line(ran.stdout.rstrip("\n"), ["10.0.0.1", "10.0.0.2"]) == (1, command)
    assert mpiexec.proxy_line("TRIREME_LAUNCH: 10.0.0.9 prted", ["10.0.0.1"]) is None
    assert subprocess.run([*agent, "-x"], timeout=BOUND_S, check=False).returncode == 2
