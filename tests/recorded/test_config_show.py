"""What ``trireme config show`` prints of a small file and of every example, plain and with ``--resolved``.

Record again: ``python -m tests.recorded.record config_show``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.recorded import lines
from tests.recorded.recording import ROOT, as_text, check, check_names

AREA = "config_show"
SMALL = "name: small\nmodels:\n  - name: tiny\n    engine: fake\n    replicas: 2\n"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


def recordings() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "small.yaml").write_text(SMALL)
        asked = {"small": "small.yaml"} | {f"example_{file.stem}": str(file) for file in EXAMPLES}
        commands = {
            f"{what}{ending}.txt": ["config", "show", file, *flags]
            for what, file in asked.items()
            for ending, flags in (("", []), ("_resolved", ["--resolved"]))
        }
        ran = lines.run(list(commands.values()), folder)
        found = {}
        for (what, line), one in zip(commands.items(), ran, strict=True):
            rows = (one.out + one.err).splitlines()
            if "--resolved" in line:  # a table, whose columns are as wide as the longest path in them
                rows = [" ".join(row.split()) for row in rows]
            found[what] = as_text("\n".join(rows).replace(str(folder), "<folder>").replace(str(ROOT), "<root>"))
    return found


NAMES = sorted(f"{what}{ending}.txt" for what in ("small", *(f"example_{file.stem}" for file in EXAMPLES)) for ending in ("", "_resolved"))


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_shown_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_every_recorded_file_is_there() -> None:
    check_names(AREA, NAMES)
