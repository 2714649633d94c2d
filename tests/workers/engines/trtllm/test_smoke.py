"""The smoke test of a real host, as far as it goes without one: it ends at once and says why; and its look at the installed names sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import probe_trtllm
from tests.support.trtllm_host import FAKES, pretend

ROOT = FAKES.parents[1]


def test_a_host_without_it_is_told_so() -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-m", "bench.smoke_trtllm"]
    ran = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.splitlines()[0] == "error: this host has no TensorRT-LLM, so nothing was tried"


def test_a_host_without_gpus_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("TRIREME_FAKE_GPUS", "[]")
    line = [sys.executable, "-m", "bench.smoke_trtllm"]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 4 and "this host has no GPU" in ran.stderr


def test_the_probe_finds_all_that_the_backends_use_in_the_faked_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    ran = subprocess.run([sys.executable, "-m", "bench.probe_trtllm"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["missing"] == 0 and told["there"] > 50, ran.stdout


class Sample:
    """What a package could hold: one keyword, one attribute, one that only its instances have."""

    there = 1

    def __init__(self, known: int) -> None:
        self.hidden = known

    def call(self, **anything: int) -> None:
        """Take whatever is given."""


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        ("Sample", "there"),
        ("Sample.there", "there"),
        ("Sample.hidden", "untold"),
        ("Sample(known=)", "there"),
        ("Sample(invented=)", "missing"),
        ("Sample.call", "there"),
        ("Sample.call(x=)", "untold"),
        ("Sample.call.gone", "missing"),
        ("Simple", "missing"),
        ("sample.there", "missing"),
    ],
)
def test_the_probe_sees_what_is_missing(use: str, verdict: str) -> None:
    assert probe_trtllm.judge(f"{__name__}.{use}") == verdict
