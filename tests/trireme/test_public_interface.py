"""The public package: its names are there, it is cheap to import, and `python -m trireme` is the command."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trireme
from workers.protocol import errors

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> str:
    ran = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_type_checkers_see_the_names_that_programs_get() -> None:
    tree = ast.parse((ROOT / "trireme" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in (*trireme._SOURCES, "workers")]
    assert {alias.name for node in imports for alias in node.names} == set(trireme.__all__) == set(dir(trireme))
    for name in trireme.__all__:
        assert getattr(trireme, name) is not None


def test_every_error_of_the_tree_is_public() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(trireme.__all__)


def test_another_name_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'trireme' has no attribute 'from_code'"):
        trireme.from_code  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import trireme", {"msgspec", "zmq", "starlette", "ray", "torch", "rich", "typer", "asyncio"}),
        ("from trireme import TooLong, __version__", {"zmq", "starlette", "ray", "torch", "rich", "typer", "asyncio"}),
        ("from trireme import *", {"starlette", "uvicorn", "httpx", "ray", "torch", "numpy", "rich", "typer"}),
    ],
)
def test_an_import_loads_only_what_is_used(code: str, absent: set[str]) -> None:
    loaded = python("-c", f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})").split()
    assert not absent & set(loaded)


def test_the_package_runs_as_the_command() -> None:
    assert python("-m", "trireme", "version") == f"trireme {trireme.__version__}\n"
