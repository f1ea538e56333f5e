"""The pytest plugin: fixtures for tests of code that uses outbox."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from outbox.testing.collected import CollectedEvents
from outbox.testing.recording import recorded

__all__ = ["collected_events"]

_MARKER = (
    "collected_events(strict=False): with strict=True the test fails if an event was published "
    "that no assertion has spoken of"
)


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the marker."""
    config.addinivalue_line("markers", _MARKER)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tell pytest of the setting."""
    parser.addini(
        "outbox_strict", "collected_events are strict in every test", type="bool", default=False
    )


@pytest.fixture
def collected_events(request: pytest.FixtureRequest) -> Iterator[CollectedEvents]:
    """Collect the test's events in place of every publisher, and answer assertions about them.

    For the whole process, so that threads, tasks and publishers of the code's own are included;
    pytest runs one test at a time in a process, also under pytest-xdist. No broker is needed, and
    nothing is left to the next test.
    """
    marker = request.node.get_closest_marker("collected_events")
    strict = bool(request.config.getini("outbox_strict"))
    if marker is not None:
        strict = marker.kwargs.get("strict", strict)
    with recorded(f"the fixture collected_events of {request.node.nodeid}", strict=strict) as found:
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a strict test in which events were published that nobody has spoken of."""
    result = yield
    found = getattr(item, "funcargs", {}).get("collected_events")
    if isinstance(found, CollectedEvents):
        found.check_strict()
    return result
