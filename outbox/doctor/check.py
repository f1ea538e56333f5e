"""A check as data, and the problems it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.doctor.finding import Problem

if TYPE_CHECKING:
    from outbox.doctor.examined import Examined

__all__ = ["Check"]

_PAGE = "https://github.com/outbox-events/outbox/blob/main/docs/doctor.md"


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        code: ``OBX`` and three digits, which never change their meaning.
        title: what is looked at.
        remedy: what to do about a problem that names no remedy.
        run: yields the problems. It raises ``NotChecked`` where it can't look (after those it has
            found, if any), and ``NotApplicable`` where there is nothing to look at.
    """

    code: str
    title: str
    remedy: str
    run: Callable[[Examined], Iterator[Problem]]

    @property
    def anchor(self) -> str:
        """The check's heading in ``docs/doctor.md``."""
        return self.code.lower()

    @property
    def docs(self) -> str:
        """The address of that heading."""
        return f"{_PAGE}#{self.anchor}"
