"""Folders that appear whole or not at all, and the locks that guard them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workers.artifacts.atomic_folder import locked, replacing
from workers.protocol.errors import EnvironmentFault

HOLD = """
import sys, time
from pathlib import Path
from workers.artifacts.atomic_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_waited_for_only_so_long_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "x.lock"
    with locked(lock), pytest.raises(EnvironmentFault, match=r"x\.lock is held by another process"), locked(lock, timeout_s=0.1):
        pass
    assert not list(lock.parent.iterdir())
    with locked(lock):
        assert lock.exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentFault), locked(lock, timeout_s=0.1):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with locked(lock, timeout_s=10):
        pass


def test_the_target_changes_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("one", "two"):
        with replacing(target) as aside:
            (aside / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "one"
            inode = aside.stat().st_ino
        # Renamed, not copied: there is no moment at which half of it is there.
        assert target.stat().st_ino == inode
        assert (target / "file").read_text() == text
    with pytest.raises(KeyboardInterrupt), replacing(target) as aside:
        (aside / "file").write_text("three")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_writer_left_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "half").write_text("half")
    with replacing(tmp_path / "target") as aside:
        assert not list(aside.iterdir())
