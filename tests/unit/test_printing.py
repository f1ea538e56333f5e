"""Text for a terminal, from any data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.commands.printing import json_line, payload_text, printable

anything = st.text(st.characters(exclude_categories=()))  # lone surrogates, too


@given(anything)
def test_printable_text_cannot_move_the_cursor(text: str) -> None:
    assert printable(text).isprintable()


@given(st.text("aé漢 \\\"'"))
def test_printable_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ("\u202e", r"\u202e"), ("\x7f", r"\x7f")],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.dictionaries(anything, anything | st.none() | st.integers()))
def test_a_line_of_json_is_printable_and_keeps_its_value(values: dict[str, Any]) -> None:
    line = json_line(values)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == values


def test_a_binary_payload_is_shown_in_base64() -> None:
    assert payload_text('{"a": "é"}'.encode()) == ("payload", '{"a": "é"}')
    assert payload_text(b"\xff\x00") == ("payload_base64", "/wA=")
