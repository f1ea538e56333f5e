"""Output of arbitrary data: text that is safe on a terminal, and JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["json_line", "payload_text", "printable"]


def printable(text: str) -> str:
    """Return ``text`` on one line, escaping everything that could control a terminal.

    Control characters, line and paragraph separators, direction marks, unassigned and private
    characters and lone surrogates are escaped as in Python's string literals.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def json_line(values: Mapping[str, Any]) -> str:
    """Return ``values`` as one line of JSON in ASCII, without control characters."""
    # json.dumps escapes every control character except DEL.
    return json.dumps(values, ensure_ascii=True).replace("\x7f", "\\u007f")


def payload_text(body: bytes) -> tuple[str, str]:
    """Return a key and the text for ``body``: ``payload``, or ``payload_base64`` if not UTF-8."""
    try:
        return "payload", body.decode()
    except UnicodeDecodeError:
        return "payload_base64", base64.b64encode(body).decode()
