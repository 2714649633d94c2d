"""Records again: ``python -m tests.recorded.record [AREA ...]``. Prints what changed; look at it with ``git diff tests/recorded/data``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tests.recorded.recording import FOLDER, recorded

#: Each has ``AREA`` (its folder under data/) and ``recordings()`` (file name -> text).
MODULES = (
    "test_help", "test_exit_codes", "test_config_show", "test_routes", "test_answers", "test_rpc", "test_wire", "test_status",
    "test_control", "test_deployment",
)  # fmt: skip


def record(area: str, now: dict[str, str]) -> int:
    """Write one area; the number of files that changed."""
    then = recorded(area)
    (FOLDER / area).mkdir(parents=True, exist_ok=True)
    changed = 0
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) == now.get(name):
            continue
        changed += 1
        file = FOLDER / area / name
        print(f"{'new' if name not in then else 'gone' if name not in now else 'changed'}: {area}/{name}")
        if name in now:
            file.write_text(now[name])
        else:
            file.unlink()
    return changed


def main(wanted: Sequence[str]) -> int:
    modules = {module.AREA: module for module in (importlib.import_module(f"tests.recorded.{name}") for name in MODULES)}
    if unknown := set(wanted) - modules.keys():
        print(f"no such area: {', '.join(sorted(unknown))}; there are {', '.join(modules)}", file=sys.stderr)
        return 2
    changed = sum(record(area, module.recordings()) for area, module in modules.items() if not wanted or area in wanted)
    print(f"{changed} recordings changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
