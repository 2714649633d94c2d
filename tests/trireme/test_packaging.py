"""What the wheel holds and asks for: modules, every other file in the packages, and dependencies that the client needs.

The wheel itself is installed and tried by `tests/trireme/test_wheel.py`.
"""

from __future__ import annotations

import os
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from orchestrator.cli.extras import EXTRAS
from orchestrator.files import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trireme", "orchestrator", "workers")


def data_files() -> list[Path]:
    """Files that are no modules, also behind links."""
    found = [Path(top, name) for package in PACKAGES for top, _, names in os.walk(ROOT / package, followlinks=True) for name in names]
    return [path.relative_to(ROOT) for path in found if path.suffix not in (".py", ".pyc")]


def test_every_data_file_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert len(data_files()) >= 40

    def packaged(path: Path) -> bool:
        inside = {package: path.relative_to(folder) for package in patterns if path.is_relative_to(folder := package.replace(".", "/"))}
        return any(
            fnmatch(str(rest), pattern.replace("**", "*")) for package, rest in inside.items() for pattern in patterns[package]
        ) or any(path.match(pattern) for pattern in patterns["*"])

    assert [path for path in data_files() if not packaged(path)] == []


def test_what_is_shipped_beside_the_code_is_deploy() -> None:
    assert SHIPPED.is_symlink() and SHIPPED.resolve() == ROOT / "deploy"


def test_the_base_is_what_the_client_needs_and_every_extra_can_be_named() -> None:
    """What an import of the client brings in is in `tests/trireme/test_public_interface.py`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = {re.split(r"[\[<>=~]", text)[0].lower().replace("-", "_") for text in requirements}
        return found - {"trireme_llm"}

    extras = project["optional-dependencies"]
    assert names(project["dependencies"]) == {"msgspec", "pyzmq"}
    distributions = {"yaml": "pyyaml", "pynvml": "nvidia_ml_py", "opentelemetry": "opentelemetry_sdk"}
    for extra, modules in EXTRAS.items():
        assert {distributions.get(module, module) for module in modules} <= names(extras[extra]), extra
    assert {distributions.get(module, module) for module in EXTRAS["server"]} == names(extras["server"])
    for engine in ("torch", "tensorrt-llm"):
        assert "trireme-llm[server]" in extras[engine]


def test_each_package_is_typed() -> None:
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").is_file()] == []


@pytest.mark.parametrize("image", ["portable", "router", "tensorrt-llm"])
def test_an_image_gets_every_package_and_what_its_links_point_to(image: str) -> None:
    lines = (ROOT / "deploy" / "docker" / f"{image}.Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    behind = {(ROOT / path).resolve().relative_to(ROOT).parts[0] for path in data_files()}
    assert "deploy" in behind and {*PACKAGES, *behind} <= copied
