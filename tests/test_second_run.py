"""What `make test` does with tests that failed beside others: see tests/support/second_run.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT


def second_run(folder: Path, failed: list[str]) -> tuple[int, str]:
    """Exit code and output of the second run, after one in which the tests ``failed``; all but `bad` pass now."""
    names = ["good", *failed]
    (folder / "test_x.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('name', {names})\ndef test_one(name):\n    assert name != 'bad'\n"
    )
    record = folder / "cache/v/cache/lastfailed"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({f"test_x.py::test_one[{name}]": True for name in failed}))
    flags = ["--second-run", "--last-failed", "--last-failed-no-failures", "none"]
    own = ["-p", "tests.support.second_run", "-c", "/dev/null", "--rootdir", str(folder), "-o", f"cache_dir={folder / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *own, *flags, str(folder)],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("failed", "code", "said"),
    [
        (["a"], 0, "1 of at most 2 tests passed only when run again alone: test_x.py::test_one[a]\n"),
        (["a", "b"], 0, "2 of at most 2 tests passed only when run again alone: test_x.py::test_one[a], test_x.py::test_one[b]\n"),
        (["bad"], 1, "1 failed"),
        (["a", "b", "c"], 1, "3 tests failed, and at most 2 may run a second time: none does"),
    ],
)
def test_few_may_run_again_and_are_named(tmp_path: Path, failed: list[str], code: int, said: str) -> None:
    found, output = second_run(tmp_path, failed)
    assert found == code and said in output, output
