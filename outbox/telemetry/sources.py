"""Where this process counts: the objects that count, and the sums of those that are gone.

An object that counts does so in its own plain integers, and registers here how they are read.
Nothing is computed before that is asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from outbox.system import process
from outbox.telemetry.table import METRICS

__all__ = [
    "MOST_SERIES",
    "OTHER",
    "Labels",
    "Samples",
    "Value",
    "add",
    "admitted",
    "count",
    "read",
    "register",
]

Labels: TypeAlias = tuple[str, ...]
"""The values of a metric's labels, in the order of the table in ``metrics``."""

Value: TypeAlias = "float | tuple[float, ...]"
"""A number; of a histogram its sum, then the count of each bucket, not cumulative."""

Samples: TypeAlias = "dict[str, dict[Labels, Value]]"
"""Values by the name of the metric, then by labels."""

Owner = TypeVar("Owner")

MOST_SERIES = 1000
"""Combinations of labels that a metric may have; all further ones are counted as one."""
OTHER = "other"
"""The value of labels that stand for further queues and consumers."""

_lock = threading.RLock()  # a finalizer may register while this thread reads
_living: list[tuple[weakref.ref[Any], Callable[[], Samples], Callable[[Any], Samples] | None]] = []
_gone: Samples = {}
_known: dict[str, set[Labels]] = {}


def _start_from_zero() -> None:
    """Forget what the parent of a forked child has counted."""
    global _lock
    _lock = threading.RLock()
    _living.clear()
    _gone.clear()


process.after_fork(_start_from_zero)


def register(
    owner: Owner,
    counts: Callable[[], Samples],
    gauges: Callable[[Owner], Samples] | None = None,
) -> None:
    """Have the counts of ``owner`` read with those of this process. Thread-safe.

    Args:
        owner: the object that counts. It may be forgotten; what it had counted stays.
        counts: returns its counters and histograms; must not refer to ``owner``.
        gauges: returns its gauges, while it exists.
    """
    with _lock:
        _fold()
        _living.append((weakref.ref(owner), counts, gauges))


def count(name: str, labels: Labels, number: int) -> None:
    """Add ``number`` to a counter that no object owns. Thread-safe; for rare things: it locks."""
    add(_gone, {name: {labels: number}})


def read() -> Samples:
    """Return all that this process has counted since it began or was forked. Thread-safe."""
    samples: Samples = {}
    with _lock:
        _fold()
        add(samples, _gone)
        living = list(_living)
    for reference, counts, gauges in living:
        add(samples, counts())
        owner = reference()
        if gauges is not None and owner is not None:
            add(samples, gauges(owner))
    return samples


def add(total: Samples, samples: Mapping[str, Mapping[Labels, Value]]) -> None:
    """Add ``samples`` to ``total``, with at most ``MOST_SERIES`` series for each metric."""
    with _lock:
        for name, series in samples.items():
            sums = total.setdefault(name, {})
            metric = METRICS.get(name)
            join = _highest if metric is not None and metric.is_maximum else _sum
            for labels, value in series.items():
                key = admitted(name, labels)
                before = sums.get(key)
                sums[key] = value if before is None else join(before, value)


def admitted(name: str, labels: Labels) -> Labels:
    """Return ``labels``, or those for further queues if the metric has had too many others.

    What was once admitted always is: a counter that moved elsewhere would seem to fall. Outcomes
    and the like, which outbox itself has named, stay.
    """
    known = _known.setdefault(name, set())
    if labels in known:
        return labels
    if len(known) < MOST_SERIES - _ROOM:
        known.add(labels)
        return labels
    metric = METRICS.get(name)
    by_users = 0 if metric is None else metric.named_by_users
    return (*[OTHER] * by_users, *labels[by_users:])


_ROOM = 10  # series for what the others are counted as: one for each outcome


def _fold() -> None:
    """Add the counts of owners that are gone to the base."""
    for source in [each for each in _living if each[0]() is None]:
        _living.remove(source)
        add(_gone, source[1]())


def _highest(one: Value, other: Value) -> Value:
    return one if isinstance(one, tuple) or isinstance(other, tuple) else max(one, other)


def _sum(one: Value, other: Value) -> Value:
    if isinstance(one, tuple):
        if not isinstance(other, tuple) or len(one) != len(other):
            return one  # of another version, with other buckets
        return tuple(map(sum, zip(one, other, strict=True)))
    return one if isinstance(other, tuple) else one + other
