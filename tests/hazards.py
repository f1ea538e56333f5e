"""The hazards of ``docs/hazards.md`` and the tests that are marked with them.

``python -m tests.hazards`` writes the lists of tests into the page.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hazards.md"
SECTION = re.compile(r"^### (\w+): .*\n((?:(?!##).*\n)*)", re.MULTILINE)
TESTS = re.compile(r"^- `tests/.*\n", re.MULTILINE)


def hazards_of(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the ids in the test's ``@pytest.mark.hazard(...)``."""
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.hazard":
            yield from (ast.literal_eval(argument) for argument in decorator.args)


def marked_tests() -> dict[str, list[str]]:
    """Return the tests of each hazard, by file and in the order of the file."""
    tests = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for hazard in hazards_of(node):
                    tests[hazard].append(f"{path.relative_to(ROOT)}::{node.name}")
    return tests


def with_tests(page: str) -> str:
    """Return ``page`` with the marked tests at the end of each section."""
    tests = marked_tests()

    def section(match: re.Match[str]) -> str:
        prose = TESTS.sub("", match[0]).rstrip() + "\n\n"
        lines = "".join(f"- `{test}`\n" for test in tests[match[1]])
        return f"{prose}{lines}\n" if lines else prose

    return SECTION.sub(section, page).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_tests(PAGE.read_text()))
