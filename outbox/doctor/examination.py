"""Runs the checks, and keeps apart what is wrong, what is right, and what could not be checked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outbox.doctor.catalogue import all_checks
from outbox.doctor.check import Check
from outbox.doctor.examined import Examined, SetUp
from outbox.doctor.finding import SEVERITIES, NotApplicable, NotChecked, Problem, Severity
from outbox.errors import OutboxError

__all__ = ["Diagnosis", "Finding", "examine"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, with the check that has found it."""

    check: Check
    problem: Problem

    @property
    def remedy(self) -> str:
        """What to do."""
        return self.problem.remedy or self.check.remedy


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of all checks.

    Attributes:
        findings: what is wrong, by the codes of the checks.
        passed: the checks that have looked at everything, and found nothing.
        not_checked: the checks that could not look, or not at everything, and why.
    """

    findings: Sequence[Finding]
    passed: Sequence[Check]
    not_checked: Sequence[tuple[Check, str]]

    def worst(self) -> Severity | None:
        """Return the highest severity; None without findings."""
        severities = [finding.problem.severity for finding in self.findings]
        return max(severities, key=SEVERITIES.index, default=None)


def examine(set_up: SetUp, checks: Sequence[Check] | None = None) -> Diagnosis:
    """Run the checks, one after the other; the default is all of them. Changes nothing."""
    findings: list[Finding] = []
    passed: list[Check] = []
    not_checked: list[tuple[Check, str]] = []
    examined = Examined(set_up)
    with contextlib.closing(examined), _quiet():
        for check in all_checks() if checks is None else checks:
            before = len(findings)
            try:
                for problem in check.run(examined):
                    findings.append(Finding(check, problem))  # noqa: PERF401  also before an error
            except NotApplicable:
                continue
            except NotChecked as error:
                not_checked.append((check, str(error)))
                continue
            except OutboxError as error:
                not_checked.append((check, str(error).partition("\n")[0]))
                continue
            except Exception as error:  # a check that fails must not hide the others
                text = " ".join(str(error).split())
                not_checked.append((check, f"the check failed: {type(error).__name__}: {text}"))
                continue
            if len(findings) == before:
                passed.append(check)
    return Diagnosis(findings, passed, not_checked)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep pika from logging the refusals that the checks provoke."""
    logger = logging.getLogger("pika")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
