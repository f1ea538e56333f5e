"""Tables and bounds, as Markdown, and the progress until they are there."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Bound", "machine", "median", "print_bounds", "progress", "table"]


def progress(text: str) -> None:
    """Print a line about a case to standard error; standard output has the results alone."""
    print(text, file=sys.stderr, flush=True)


def median(values: Iterable[float]) -> float:
    """Return the median, or 0 if there are no values."""
    found = list(values)
    return statistics.median(found) if found else 0.0


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True, slots=True)
class Bound:
    """A measured value and its bound.

    Attributes:
        what: the meaning of the value.
        value: the measured value.
        bound: the minimum, or with ``at_most`` the maximum.
        at_most: whether ``bound`` is the maximum.
    """

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def ok(self) -> bool:
        """Whether the value is within its bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def print_bounds(bounds: Sequence[Bound]) -> bool:
    """Print the values and their bounds; return whether all are within their bounds."""
    rows = [
        [
            one.what,
            f"{one.value:.2f}",
            f"{'at most' if one.at_most else 'at least'} {one.bound:g}",
            "" if one.ok else "missed",
        ]
        for one in bounds
    ]
    print(table(["ratio", "measured", "wanted", ""], rows), flush=True)
    return all(one.ok for one in bounds)


def machine(server: str) -> str:
    """Return a description of the machine and the software."""
    import os

    return (
        f"Python {sys.version.split()[0]}, RabbitMQ {server}, {os.cpu_count()} cores, "
        f"{platform.system()}"
    )
