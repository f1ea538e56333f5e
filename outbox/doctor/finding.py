"""What a check has found, or why it could not look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["SEVERITIES", "NotApplicable", "NotChecked", "Problem", "Severity"]

Severity = Literal["note", "warning", "error"]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""In rising order."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, with one subject.

    Attributes:
        severity: ``error``: events or messages don't get through, or may be lost; ``warning``: they
            will not, under load or after a failure; ``note``: worth knowing, and perhaps intended.
        text: one line, without secrets; it names its subject.
        remedy: what to do; empty for the remedy of the check.
    """

    severity: Severity
    text: str
    remedy: str = ""


class NotChecked(Exception):
    """The check, or a part of it, could not be made; the text says why."""


class NotApplicable(Exception):
    """The set-up has nothing that the check is about."""
