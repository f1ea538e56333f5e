"""Topic patterns, as a topic exchange matches them (AMQP 0-9-1, section 3.1.3.3)."""

from __future__ import annotations

import functools
import re

__all__ = ["matches"]


def matches(pattern: str, target: str) -> bool:
    """Return whether ``target`` matches ``pattern``.

    Dots separate words; ``*`` matches exactly one word, ``#`` any number of them, also none.
    """
    return _compiled(pattern).fullmatch(f".{target}") is not None


_ANY = r"(?:\.[^.]*)*"
_WORD_ENDS = r"(?=\.|\Z)"


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Each word has the dot before it, so that "#" can match the empty string, dot included.
    runs = [""]
    for word in pattern.split("."):
        if word == "#":
            runs.append("")
        else:
            runs[-1] += r"\.[^.]*" if word == "*" else r"\." + re.escape(word)
    first, *others = runs
    # Between two "#" the first match is as good as any: an atomic group, which never backtracks,
    # keeps a pattern of many "#" from trying every way to share the words.
    for number, run in enumerate(others, 1):
        if number == len(others):
            first += _ANY + run
        elif run:
            first += f"(?>{_ANY}?{run}{_WORD_ENDS})"
    return re.compile(first, re.DOTALL)
