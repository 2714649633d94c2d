"""What the wheel holds besides modules: every other file in the packages, each as package data of pyproject.toml."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trireme", "orchestrator", "workers")


def data_files() -> list[Path]:
    found = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return [path for path in found if path.suffix not in (".py", ".pyc")]


def test_every_data_file_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert len(data_files()) >= 9

    def packaged(path: Path) -> bool:
        inside = {package: path.relative_to(folder) for package in patterns if path.is_relative_to(folder := package.replace(".", "/"))}
        return any(fnmatch(str(rest), pattern) for package, rest in inside.items() for pattern in patterns[package]) or any(
            path.match(pattern) for pattern in patterns["*"]
        )

    assert [path for path in data_files() if not packaged(path)] == []


def test_each_package_is_typed() -> None:
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").is_file()] == []


@pytest.mark.parametrize("image", ["portable", "router", "tensorrt-llm"])
def test_an_image_gets_every_package_and_what_its_links_point_to(image: str) -> None:
    lines = (ROOT / "deploy" / "docker" / f"{image}.Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    links = [(ROOT / path).resolve().relative_to(ROOT) for path in data_files() if (ROOT / path).is_symlink()]
    assert links and {*PACKAGES, *(path.parts[0] for path in links)} <= copied
