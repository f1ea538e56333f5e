"""Puts a recorder in the place of every publisher, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from outbox import UsageError, observing
from outbox.testing.collected import CollectedEvents
from outbox.testing.recorder import Recorder

__all__ = ["recorded"]

_where = ""
"""Who has installed the recorder that is in force."""


@contextmanager
def recorded(where: str, *, strict: bool = False) -> Iterator[CollectedEvents]:
    """Record every event of the process in the block, in place of publishing it.

    Args:
        where: this is asked for, for people.
        strict: see :class:`outbox.testing.CollectedEvents`; the caller checks it in the end.

    Raises:
        UsageError: events are recorded already; the message names both places.
    """
    global _where
    if observing.installed() is not None:
        raise UsageError(
            f"events are recorded already, by {_where or 'something else'}: "
            f"{where} cannot record them too; use one of the two"
        )
    recorder = Recorder()
    observing.install(recorder)
    _where = where
    try:
        yield CollectedEvents(recorder, strict=strict)
    finally:
        observing.install(None)
        _where = ""
