"""What a framework needs around the handling of each message: the seam between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

__all__ = ["Surroundings", "here", "provide"]

Surroundings = Callable[[], AbstractContextManager[object]]
"""A function that returns a new context manager for a message, entered in its handler's context."""

_provider: Callable[[], Surroundings | None] | None = None


def provide(provider: Callable[[], Surroundings | None] | None) -> None:
    """Ask ``provider``, where a worker is made, what its messages need around them.

    Args:
        provider: returns it for the application that is current here, or None. None ends this.
    """
    global _provider
    _provider = provider


def here() -> Surroundings | None:
    """Return what the application that is current here needs around each message, or None."""
    return None if _provider is None else _provider()
