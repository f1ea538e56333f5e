"""The sum of what several processes have counted."""

from __future__ import annotations

from typing import Any

__all__ = ["add"]


def add(base: Any, counts: Any) -> Any:
    """Return the sum of two sets of counts, without changing either.

    Objects are added key by key, arrays element by element, and numbers as they are. Of anything
    else, and where the shapes differ, the later counts stand.

    Args:
        base: the sum until now; None for nothing.
        counts: what to add, as read from JSON; None for nothing.
    """
    if counts is None or base is None:
        return base if counts is None else counts
    if isinstance(base, dict) and isinstance(counts, dict):
        return {key: add(base.get(key), counts.get(key)) for key in {**base, **counts}}
    if isinstance(base, list) and isinstance(counts, list) and len(base) == len(counts):
        return [add(one, other) for one, other in zip(base, counts, strict=True)]
    if _is_number(base) and _is_number(counts):
        return base + counts
    return counts


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
