"""The wheel, built and installed into empty environments away from the repository: `make test-wheel`, with an index of packages.

PIP: more flags for pip, TORCH: what it installs as torch; as in the Makefile.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", *shlex.split(os.environ.get("PIP", "")))
BOUND_S = 600.0
EXAMPLES = sorted(path.name for path in (ROOT / "deploy" / "examples").iterdir())


class Environment:
    """A virtual environment and an empty folder beside it. Commands see no repository, no MPI of the system and no settings."""

    def __init__(self, home: Path, *packages: str) -> None:
        self.folder = home / "work"
        self.folder.mkdir(parents=True)
        self._bin = home / "venv" / "bin"
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(("TRIREME", "PYTHONPATH", "RAY_"))}
        self._env |= {"PATH": f"{self._bin}:/usr/bin:/bin", "TRIREME_RUN_DIR": str(home / "run")}
        subprocess.run([sys.executable, "-m", "venv", str(self._bin.parent)], check=True, timeout=BOUND_S)
        if packages:
            self.run("python", *PIP, *packages)

    def run(self, *line: str, code: int = 0) -> str:
        """What a command of this environment prints; on stderr too where another exit code is expected."""
        ran = subprocess.run(
            [str(self._bin / line[0]), *line[1:]],
            cwd=self.folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )
        assert ran.returncode == code, f"{line}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout if not code else ran.stdout + ran.stderr

    def installed(self) -> set[str]:
        return {row["name"].lower() for row in json.loads(self.run("python", "-m", "pip", "list", "--format", "json"))}


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tri", dir="/tmp") as folder:  # short: Unix socket paths end at 107 bytes
        yield Path(folder)


@pytest.fixture(scope="module")
def wheel(short: Path) -> str:
    """Built from what git tracks, as it is now."""
    source = short / "source"
    for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False) if (ROOT / name).is_file() else os.symlink(
                os.readlink(ROOT / name), source / name
            )
    built = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(short),
        *shlex.split(os.environ.get("PIP", "")),
    ]
    subprocess.run([*built, str(source)], check=True, timeout=BOUND_S)
    return str(next(short.glob("*.whl")))


def test_the_client_alone(wheel: str, short: Path) -> None:
    here = Environment(short / "c", wheel)
    assert here.installed() - {"pip", "setuptools"} == {"trireme-llm", "msgspec", "pyzmq"}
    names = "import trireme; print(*[getattr(trireme, name).__name__ for name in trireme.__all__ if name != '__version__'])"
    assert "AsyncClient" in here.run("python", "-c", names)
    assert "hint: pip install 'trireme-llm[server]'" in here.run("trireme", "status", code=4)


def test_the_server_without_an_engine(wheel: str, short: Path) -> None:
    """Everything that a hint names, and a deployment of the fake engine without MPI."""
    here = Environment(short / "s", f"{wheel}[server]")
    assert not here.installed() & {"torch", "ray", "mpi4py", "mpich"}
    assert [Path(line).name for line in here.run("trireme", "config", "examples").split()] == EXAMPLES
    for name in EXAMPLES:
        here.run("trireme", "config", "show", f"deploy/examples/{name}")
    local = "deploy/examples/local.yaml"
    for kind in ("slurm", "ray", "kubernetes"):
        assert here.run("trireme", "plan", local, "--cpus", "8,memory=16GB", "--render", kind)
    assert "#SBATCH" in here.run("trireme", "submit", "slurm", local, "--dry-run")
    assert "trireme-llm[ray]" in here.run("trireme", "up", local, "--launcher", "ray", code=4)
    assert "trireme-llm[torch]" in here.run("trireme", "serve", "smollm2-135m-instruct", "--launcher", "local", code=4)
    here.run("trireme", "up", "deploy/examples/fake.yaml", "--port", "0", "--detach")
    try:
        assert here.run("trireme", "generate", "hello", "-n", "8").strip()
        assert here.run("trireme", "generate", "hello", "-n", "8", "--rpc").strip()
        assert '"READY"' in here.run("trireme", "status", "--json")
    finally:
        here.run("trireme", "down")


def test_the_whole_demo(wheel: str, short: Path) -> None:
    here = Environment(short / "d")
    here.run("python", *PIP, os.environ.get("TORCH", "torch"))
    here.run("python", *PIP, f"{wheel}[server,torch,mpich,ray,guided]")
    assert "Paris" in here.run("trireme", "demo")
