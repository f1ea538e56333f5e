"""The page of ``outbox doctor`` describes each check."""

from __future__ import annotations

import re
from pathlib import Path

from outbox.doctor.catalogue import all_checks

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def test_each_check_has_a_section_that_begins_with_its_title() -> None:
    sections = dict(
        re.findall(r"^### (OBX\d{3})\n\n(.*?)\n\n", PAGE.read_text() + "\n", re.M | re.S)
    )
    checks = all_checks()
    assert sections.keys() == {check.code for check in checks}
    for check in checks:
        begin = " ".join(sections[check.code].split())
        title = check.title[0].upper() + check.title[1:]
        assert begin.startswith(title), (check.code, begin)
        assert check.docs.endswith(f"/docs/doctor.md#{check.anchor}")
        assert check.remedy.endswith("."), check.code


def test_the_codes_are_unique_and_in_order() -> None:
    codes = [check.code for check in all_checks()]
    assert codes == sorted(set(codes))
    assert len(codes) == 26
