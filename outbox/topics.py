"""Topic patterns, as a topic exchange matches them (AMQP 0-9-1, section 3.1.3.3)."""

from __future__ import annotations

import functools
import re

__all__ = ["matches"]


def matches(pattern: str, target: str) -> bool:
    """Return whether ``target`` matches ``pattern``.

    Words are what stands between dots; ``*`` stands for exactly one word, ``#`` for any number of
    them, also none.
    """
    return _compiled(pattern).fullmatch(f".{target}") is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Each word with the dot before it, so that "#" may stand for nothing, dot included.
    expression = "".join(
        r"(?:\.[^.]*)*" if word == "#" else r"\.[^.]*" if word == "*" else r"\." + re.escape(word)
        for word in pattern.split(".")
    )
    return re.compile(expression, re.DOTALL)
