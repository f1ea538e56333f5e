"""The pytest plugin: fixtures for tests of code that uses outbox."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from outbox import MissingExtra
from outbox.testing.assertions import EventAssertions
from outbox.testing.broker import BrokerMissing, PrivateBroker
from outbox.testing.collected_events import CollectedEvents
from outbox.testing.installation import live, recorded
from outbox.testing.live_events import LiveEvents

__all__ = ["collected_events", "embedded_events", "live_events", "outbox_broker"]

_MARKER = (
    "collected_events(strict=False): with strict=True the test fails if a published event was "
    "matched by no assertion; also for live_events and embedded_events"
)
_FIXTURES = ("collected_events", "live_events", "embedded_events")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the setting."""
    parser.addini(
        "outbox_strict", "make collected_events strict in every test", type="bool", default=False
    )


@pytest.fixture
def collected_events(request: pytest.FixtureRequest) -> Iterator[CollectedEvents]:
    """Collect the test's events instead of publishing them, for assertions about them.

    It collects in the whole process, including the threads, tasks and publishers that the code
    makes; pytest runs one test at a time in a process, also under pytest-xdist. It needs no broker,
    and leaves nothing behind for the next test.
    """
    with recorded(_where(request), strict=_is_strict(request)) as collected:
        yield collected


@pytest.fixture(scope="session")
def outbox_broker() -> Iterator[PrivateBroker]:
    """A private RabbitMQ for the session, or for each worker of pytest-xdist.

    It is started when a test first requests it, on a free loopback port, and stopped at the end. If
    RabbitMQ isn't installed, the test is skipped; if ``CI`` is set, it fails.
    """
    try:
        broker = PrivateBroker()
    except BrokerMissing as error:
        message = (
            f"the fixture outbox_broker needs RabbitMQ: {error}; the fixture embedded_events "
            "needs no server"
        )
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    with broker:
        yield broker


@pytest.fixture
def live_events(
    request: pytest.FixtureRequest, outbox_broker: PrivateBroker
) -> Iterator[LiveEvents]:
    """Publish the test's events to a private RabbitMQ, for assertions about what arrived.

    Every publisher and worker of the process uses a virtual host created for the test.
    """
    url = outbox_broker.start().empty_url()
    with live(url, _where(request), strict=_is_strict(request)) as published:
        yield published
    outbox_broker.give_back(url)


@pytest.fixture
def embedded_events(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LiveEvents]:
    """Publish the test's events to an SQLite file, for assertions about what arrived.

    Every publisher and worker of the process uses a file created for the test. It needs the extra
    ``[sql]``, but no server.
    """
    try:
        import outbox.sql  # noqa: F401  # says which extra is missing
    except MissingExtra as error:
        pytest.fail(f"the fixture embedded_events: {error}", pytrace=False)
    url = f"sqlite:///{quote(str(tmp_path / 'outbox-events.db'))}"
    with live(url, _where(request), strict=_is_strict(request)) as published:
        yield published


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a strict test if a published event was matched by no assertion."""
    result = yield
    for name in _FIXTURES:
        events = getattr(item, "funcargs", {}).get(name)
        if isinstance(events, EventAssertions):
            events.check_strict()
    return result


def _where(request: pytest.FixtureRequest) -> str:
    return f"the fixture {request.fixturename} of {request.node.nodeid}"


def _is_strict(request: pytest.FixtureRequest) -> bool:
    strict = bool(request.config.getini("outbox_strict"))
    marker = request.node.get_closest_marker("collected_events")
    return strict if marker is None else bool(marker.kwargs.get("strict", strict))
