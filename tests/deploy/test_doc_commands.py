"""Every command line of the documentation is one that its program would accept: `trireme`, `make`, and modules started by `python -m`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_lines import command_lines, fault
from tests.support.source_tree import ROOT

PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md")


def faults(text: str) -> list[str]:
    return [f"{' '.join(words)}: {why}" for words, whole in command_lines(text) if (why := fault(words, whole=whole))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_is_accepted(page: Path) -> None:
    assert faults(page.read_text()) == []


def test_the_pages_hold_command_lines_of_every_program() -> None:
    found = [words for page in PAGES for words, _ in command_lines(page.read_text())]
    assert {words[0] for words in found} == {"trireme", "make", "python"}
    assert len(found) > 300, "the pages write their command lines in another form"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("    trireme serve PATH -tp 2    # as many as hold it", [["trireme", "serve", "PATH", "-tp", "2"]]),
        ("    trireme plan F --cpus 2          CPUs on each node", [["trireme", "plan", "F", "--cpus", "2"]]),
        ("    $ X=1 trireme down a && sudo trireme up b &", [["trireme", "down", "a"], ["trireme", "up", "b"]]),
        ("    trireme up \\\n        f.yaml", [["trireme", "up", "f.yaml"]]),
        ("    mpiexec -n 2 python -m workers --tp-size N", [["python", "-m", "workers", "--tp-size", "1"]]),
        ("```bash\ntrireme top [NAME] [--ranks|--no-ranks] ...\n```", [["trireme", "top", "NAME", "--ranks"]]),
        ("Run `trireme\nstatus`, `make check`; trireme is a word, and so is `trireme_steps`.", [["trireme", "status"], ["make", "check"]]),
        ("    make don't", []),
    ],
)
def test_the_command_lines_of_a_page(text: str, words: list[list[str]]) -> None:
    assert [found for found, _ in command_lines(text)] == words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("    trireme bench --rat 2", "No such option: --rat"),
        ("    trireme statuses", "No such command 'statuses'"),
        ("    trireme keys api ad alice", "No such command 'ad'"),
        ("    trireme up", "Missing argument"),
        ("    trireme bench -n many", "Invalid value for '--requests'"),
        ("`make tests`", "no target tests"),
        ("`python -m bench.routers`", "no module bench.routers to run"),
        ("`python -m bench.router --stream 3`", "bench.router has no flag --stream"),
        ("    python -m workers --engine fake --modle m", "--modle"),
    ],
)
def test_a_line_that_would_be_refused_is_named(text: str, why: str) -> None:
    (found,) = faults(text)
    assert why in found


@pytest.mark.parametrize(
    "text",
    ["`trireme up`", "`trireme COMMAND --help`", "    trireme logs ...", "`make check test`", "    python -m http.server -d build/docs"],
)
def test_a_line_that_leaves_something_out_is_accepted(text: str) -> None:
    assert faults(text) == []
