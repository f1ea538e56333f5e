"""The pytest plugin: fixtures for tests of code that uses outbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outbox import observing
from outbox.testing.collected import CollectedEvents
from outbox.testing.recorder import Recorder

__all__ = ["collected_events"]


@pytest.fixture
def collected_events() -> Iterator[CollectedEvents]:
    """Collect the test's events in place of every publisher, and answer assertions about them.

    For the whole process, so that threads, tasks and publishers of the code's own are included;
    pytest runs one test at a time in a process, also under pytest-xdist. No broker is needed, and
    nothing is left to the next test.
    """
    recorder = Recorder()
    before = observing.installed()
    observing.install(recorder)
    try:
        yield CollectedEvents(recorder)
    finally:
        observing.install(before)
