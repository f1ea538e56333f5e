"""The page of hazards and the markers on the tests agree."""

from __future__ import annotations

import re

import pytest

from tests.hazards import PAGE, SECTION, marked_tests, with_tests

TEXT = PAGE.read_text()
SECTIONS = SECTION.findall(TEXT)
TESTS = marked_tests()


@pytest.mark.parametrize(("hazard", "text"), SECTIONS, ids=[hazard for hazard, _ in SECTIONS])
def test_every_hazard_has_tests_or_says_why_not(hazard: str, text: str) -> None:
    reason = re.search(r"^Not (handled|tested): \w", text, re.MULTILINE)
    assert bool(TESTS[hazard]) != bool(reason)


def test_every_marker_names_a_hazard_of_the_page() -> None:
    assert {hazard for hazard, tests in TESTS.items() if tests} <= {name for name, _ in SECTIONS}


def test_every_hazard_has_a_single_section() -> None:
    names = [name for name, _ in SECTIONS]
    assert len(set(names)) == len(names) == TEXT.count("\n### ") >= 25


def test_the_page_lists_the_marked_tests() -> None:
    assert with_tests(TEXT) == TEXT, "run scripts/hazards"
