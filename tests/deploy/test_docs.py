"""The documentation names only what exists: files, modules, tests, and other pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT

PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md")
#: Paths are named from the root of the tree, or from one of the packages.
BASES = ("", "orchestrator/", "workers/")
TOP = r"(?:orchestrator|workers|tests|bench|deploy|docs)"

#: `a/b.py`, and `tests/a` with or without an ending. Patterns (*, <N>) are left out.
PYTHON_FILE = re.compile(r"(?<![\w./*<-])((?:[\w.-]+/)+[\w-]+\.py)\b")
PATH = re.compile(rf"(?<![\w./*<:-])({TOP}/[\w./-]*[\w/])(?![\w*<{{./@-])")
#: A path in backticks without an ending, named from a package: `router/core/router_core`.
SHORT_PATH = re.compile(r"`((?:router|control|client|cli|config|auth|planner|sim|loadgen|scheduler|serving|runner|engines)/[\w/.-]+)`")
#: `orchestrator.a.b`; an attribute may follow the module.
MODULE = re.compile(r"(?<![\w./-])((?:orchestrator|workers)(?:\.\w+)+)")
#: A test file that is named without its folder.
TEST_FILE = re.compile(r"(?<![\w/])(test_\w+\.py)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def exists(path: str) -> bool:
    """Whether ``path`` is a file or a folder of the tree, or a module without its ending."""
    places = [ROOT / base / path for base in BASES]
    return any(place.exists() or place.with_name(f"{place.name}.py").exists() for place in places)


def module_exists(name: str) -> bool:
    """Whether ``name`` is a module or package, or an attribute of a module, which must stand in its text."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if file.is_file() or place.is_dir():
            rest = parts[count:]
            return not rest or (file.is_file() and re.search(rf"\b{rest[0]}\b", file.read_text()) is not None)
    return False


def unknown_names(text: str) -> list[str]:
    """The paths and modules that ``text`` names and that do not exist."""
    paths = {found for pattern in (PYTHON_FILE, PATH, SHORT_PATH) for found in pattern.findall(text)}
    unknown = {path for path in paths if not exists(path)} | {name for name in MODULE.findall(text) if not module_exists(name)}
    return sorted(unknown | {name for name in TEST_FILE.findall(text) if not any((ROOT / "tests").rglob(name))})


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_module_exists(page: Path) -> None:
    assert unknown_names(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_links_every_page() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}  # the index is the site's own README
    assert pages - linked == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`workers/scheduler/scheduler.py`, `router/core/router_core`, `tests/workers`", []),
        ("`workers/core/batch.py` and `router/cells`", ["router/cells", "workers/core/batch.py"]),
        ("`python -m orchestrator.sim`, workers.epoch.make_epoch.", []),
        ("`orchestrator.core.board` and `workers.epoch.mint`", ["orchestrator.core.board", "workers.epoch.mint"]),
        ("`tests/unit/test_x.py` and `tests/nowhere`", ["tests/nowhere", "tests/unit/test_x.py"]),
        ("`test_layers.py` and `test_nothing.py`", ["test_nothing.py"]),
        ("`router/http/dialects/*`, `rank<N>.safetensors`", []),
    ],
)
def test_what_does_not_exist_is_named(text: str, found: list[str]) -> None:
    assert unknown_names(text) == found


#: A row of the table of faults: its number, and the tests that prove it.
FAULT = re.compile(r"^\| (F\d\d) \|.*\| ([^|]+) \|$", re.MULTILINE)


def fault_test(name: str) -> Path:
    """The file of a test as the table of faults names it: from the root, from `tests`, or a module of `tests/faults`."""
    name = name.strip("`")
    return ROOT / name if name.startswith("tests/") else ROOT / "tests" / (f"{name}.py" if "/" in name else f"faults/{name}.py")


def is_long(tree: ast.Module) -> bool:
    """Whether every test of a module has the marker `long`, so that `make test` runs none of them."""
    marks = [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")]
    return any("mark.long" in mark for mark in marks) or all(
        any(ast.unparse(decorator) == "pytest.mark.long" for decorator in test.decorator_list) for test in tests
    )


def test_a_fault_has_a_star_where_make_test_runs_its_test() -> None:
    rows = FAULT.findall((ROOT / "docs" / "reliability.md").read_text())
    assert len(rows) > 20, "the table of faults has another form"
    wrong = []
    for fault, cell in rows:
        for item in cell.split(", "):
            name, _, star = item.partition(" ")
            if is_long(ast.parse(fault_test(name).read_text())) == (star == "*"):
                wrong.append(f"{fault}: {item}")
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pytestmark = pytest.mark.mpi\ndef test_a(): ...", False),
        ("pytestmark = [pytest.mark.mpi, pytest.mark.long]\ndef test_a(): ...", True),
        ("@pytest.mark.long\ndef test_a(): ...\ndef test_b(): ...", False),
        ("@pytest.mark.long\ndef test_a(): ...", True),
        ("@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.long), 2])\ndef test_a(x): ...", False),
    ],
)
def test_a_module_is_long_where_all_its_tests_are(text: str, found: bool) -> None:
    assert is_long(ast.parse(text)) is found


def calls_mpi(tree: ast.Module) -> bool:
    """Whether a module calls an operation of a communicator (their names begin with a capital), of MPI itself, or mpi4py's executor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr[0].isupper():
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            if owner.endswith("comm") or owner == "MPI":
                return True
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MPICommExecutor":
            return True
    return False


def test_the_list_of_who_may_call_mpi_is_whole() -> None:
    page = (ROOT / "docs" / "internals.md").read_text()
    listed = re.findall(r"`(workers/[\w/]+\.py)`", page.partition("### Who may call MPI")[2].partition("\n##")[0])
    calling = [str(path.relative_to(ROOT)) for path in (ROOT / "workers").rglob("*.py") if calls_mpi(ast.parse(path.read_text()))]
    assert sorted(listed) == sorted(calling)
