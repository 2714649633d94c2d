"""The table of families: every one has a case, and its line on the page of models."""

from __future__ import annotations

from tests.support.families import CASES
from tests.support.models_page import PAGE, page
from workers.models.registry import FAMILIES


def test_the_page_of_models_is_current() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "write it again: python -m tests.support.models_page"


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES} == set(FAMILIES)
