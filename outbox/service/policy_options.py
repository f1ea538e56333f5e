"""Options of the commands that run under a parent."""

from __future__ import annotations

import argparse
import math

from outbox.service.health.policy import CPULimit, Policy, RestartBound

__all__ = ["add_policy", "duration", "has_policy", "policy_of"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_RETRIES = 5
_LONGEST = 7 * 86400.0


def add_policy(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what the parent puts up with."""
    group.add_argument(
        "--stuck-after",
        type=_patience,
        metavar="TIME",
        help="kill and replace a process that doesn't react for this long: no thread of it runs, "
        "its event loop is blocked, or all handlers have exceeded their own timeout; also one that "
        "is in a single call of C code for that long, whose messages are dead-lettered in the end; "
        "0: never (default: 30s)",
    )
    group.add_argument(
        "--max-cpu",
        type=_cpu,
        metavar="PERCENT[:CHECKS]",
        help="restart a process that uses more than PERCENT of one core in each of CHECKS "
        "intervals of 10 s in a row (default of CHECKS: 5), with the processes that it has "
        "started; for workers that normally wait: one with a backlog is busy",
    )
    group.add_argument(
        "--max-restarts",
        type=_bound,
        metavar="N[/TIME]",
        help="exit with code 5 after N processes in a row, in TIME at least, have ended without "
        "ever being ready; 0: never (default: 10/2m)",
    )


def has_policy(options: argparse.Namespace) -> bool:
    """Return whether one of the options is given: then there has to be a parent."""
    return (options.stuck_after, options.max_cpu, options.max_restarts) != (None, None, None)


def policy_of(options: argparse.Namespace, *, in_background: bool = False) -> Policy:
    """Return what the options say.

    In the background, where nothing else starts it again, a service that was given up is tried
    again every ten minutes, five times.
    """
    bound: RestartBound | None = options.max_restarts or RestartBound()
    return Policy(
        stuck_after=30.0 if options.stuck_after is None else options.stuck_after,
        bound=bound if bound is not None and bound.deaths else None,
        cpu=options.max_cpu,
        retries=_RETRIES if in_background else 0,
    )


def duration(text: str) -> float:
    """Return the seconds of ``90s``, ``30m``, ``12h``, ``7d`` or a number; NaN for others."""
    lower = text.lower()
    unit = lower[-1:] if lower[-1:] in _UNITS else ""
    try:
        return float(lower.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        return math.nan


def _patience(text: str) -> float:
    seconds = duration(text)
    if not (seconds == 0 or 1 <= seconds <= _LONGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1s to 7d, or 0")
    return seconds


def _cpu(text: str) -> CPULimit:
    percent, colon, checks = text.partition(":")
    try:
        limit = CPULimit(float(percent.removesuffix("%")), int(checks) if colon else 5)
    except ValueError:
        limit = CPULimit(0, 0)
    if not (0 < limit.percent < math.inf and limit.checks >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a limit; use for example 50 or 50:5")
    return limit


def _bound(text: str) -> RestartBound:
    deaths, slash, time = text.partition("/")
    seconds = duration(time) if slash else 0.0
    if not (deaths.isdecimal() and 0 <= seconds < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a bound; use for example 10 or 10/2m")
    return RestartBound(int(deaths), seconds)
