"""What a function can be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["takes_no_arguments"]


def takes_no_arguments(function: Callable[..., Any]) -> bool:
    """Return whether it can be called without arguments; True where its signature isn't known."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # it has none
        pass
    return True
