"""The page of hazards names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hazards.md").read_text()
SECTIONS = re.findall(r"^### (\w+): .*\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE)
TEST = re.compile(r"^- `(tests/[\w/]+\.py)::(test_\w+)`$", re.MULTILINE)


@pytest.mark.parametrize(("label", "text"), SECTIONS, ids=[label for label, _ in SECTIONS])
def test_every_hazard_names_tests_and_each_of_them_exists(label: str, text: str) -> None:
    named = TEST.findall(text)
    assert len(named) == len(re.findall("^- ", text, re.MULTILINE)) > 0
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        defined = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in defined, f"{label} names {path}::{name}"


def test_every_hazard_has_a_section_of_its_own() -> None:
    labels = [label for label, _ in SECTIONS]
    assert len(set(labels)) == len(labels) == PAGE.count("\n### ") >= 25
