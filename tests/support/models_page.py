"""Writes the table of ``docs/models.md``: ``python -m tests.support.models_page``. A test checks that the page is current."""

from __future__ import annotations

import sys

from tests.support.families import CASES
from tests.support.source_tree import ROOT
from workers.models.families.family import Family
from workers.models.registry import FAMILIES

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- The table is written by `python -m tests.support.models_page`. -->\n\n", "\n<!-- End of the table. -->\n"
HEAD = (
    "| `model_type` | models | GGUF | TensorRT-LLM checkpoint | cases against transformers |",
    "|---|---|---|---|---|",
)


def row(family: Family) -> str:
    """The family's line; what it is stands in the first line of its module."""
    what = (sys.modules[family.read.__module__].__doc__ or "").strip().splitlines()[0].rstrip(".")
    cases = ", ".join(case.name.removeprefix(f"{family.model_type}-") for case in CASES if case.model_type == family.model_type)
    gguf = f"`{family.gguf.architecture}`" if family.gguf is not None else "no"
    return f"| `{family.model_type}` | {what} | {gguf} | {'yes' if family.trtllm else 'no'} | {cases or 'none'} |"


def page(text: str) -> str:
    """``text`` of the page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n".join((*HEAD, *(row(family) for family in FAMILIES.values()))) + "\n" + END + rest.split(END)[1]


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
