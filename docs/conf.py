"""The documentation site: `make docs` builds it into build/docs. A warning, such as a link that leads nowhere, is an error."""

from __future__ import annotations

import tarfile
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"

project = "Trireme"
extensions = ["myst_parser", "sphinxcontrib.mermaid", "sphinx_copybutton"]
html_theme = "furo"
html_title = "Trireme"
html_static_path = ["../build/docs-static"]
html_show_sphinx = False
html_show_copyright = False
highlight_language = "none"
# GitHub renders the same pages: its way of naming headings, and its fence for pictures.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
exclude_patterns: list[str] = []
# Pictures are drawn by a script that make has fetched: a reader's browser asks no other host.
mermaid_use_local = "mermaid/mermaid.esm.min.mjs"
mermaid_height = "auto"
mermaid_fullscreen = False


def _unpack_mermaid() -> None:
    """Put the script and its parts out of npm's archive into the folder of static files."""
    (archive,) = (BUILD / "mermaid").glob("mermaid-*.tgz")
    static = BUILD / "docs-static" / "mermaid"
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix("package/dist/")
            if name == "mermaid.esm.min.mjs" or (name.startswith("chunks/mermaid.esm.min/") and name.endswith(".mjs")):
                script = files.extractfile(member)
                assert script is not None, member
                target = static / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(script.read())


_unpack_mermaid()
