"""The pytest plugin: fixtures for tests of code that uses outbox."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from outbox import MissingExtra, OutboxError
from outbox.observer import seam
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
_PLACE = (
    "embedded_events(url): the server on which the fixture embedded_events creates its schema or "
    "database; by default OUTBOX_TEST_DATABASE_URL, or the setting outbox_embedded_url"
)
_FIXTURES = {"collected_events", "live_events", "embedded_events"}
_CHECKED = pytest.StashKey[list[EventAssertions]]()
_SESSION = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line("markers", _MARKER)
    config.addinivalue_line("markers", _PLACE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the settings."""
    parser.addini(
        "outbox_strict", "make collected_events strict in every test", type="bool", default=False
    )
    parser.addini(
        "outbox_embedded_url",
        "the server on which embedded_events creates a schema or database for each test; by "
        "default it uses a SQLite file",
        default="",
    )
    parser.addini(
        "outbox_always",
        "collect the events of all tests: none reaches a real broker, with or without a fixture",
        type="bool",
        default=False,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Collect the events of imports, of fixtures for several tests, and between tests."""
    blocks = early_config.stash[_SESSION] = ExitStack()
    if early_config.getini("outbox_always") and seam.observer is None:
        blocks.enter_context(recorded("pytest's setting outbox_always", replaceable=True))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop collecting."""
    if blocks := config.stash.get(_SESSION, None):
        blocks.close()


@pytest.fixture(autouse=True)
def _outbox_always(request: pytest.FixtureRequest) -> None:
    if request.config.getini("outbox_always") and not _FIXTURES.intersection(request.fixturenames):
        request.getfixturevalue("collected_events")


@pytest.fixture
def collected_events(request: pytest.FixtureRequest) -> Iterator[CollectedEvents]:
    """Collect the test's events instead of publishing them, for assertions about them.

    It collects in the whole process, including the threads, tasks and publishers that the code
    makes; pytest runs one test at a time in a process, also under pytest-xdist. It needs no broker,
    and leaves nothing behind for the next test.
    """
    # Requested by the setting alone, it makes room for other ways to collect, and isn't checked.
    is_implied = request.config.getini("outbox_always") and (
        request.fixturename not in request.fixturenames
    )
    where = _where(request)
    with recorded(where, strict=_is_strict(request), replaceable=is_implied) as collected:
        if not is_implied:
            _check_at_end(request, collected)
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
        _check_at_end(request, published)
        yield published
    outbox_broker.give_back(url)


@pytest.fixture
def embedded_events(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LiveEvents]:
    """Publish the test's events to a database, for assertions about what arrived.

    Every publisher and worker of the process uses a place created for the test: a SQLite file, so
    that no server is needed, or a schema or database on the server that the marker
    ``embedded_events(url=...)`` names, or ``OUTBOX_TEST_DATABASE_URL``, or the setting
    ``outbox_embedded_url``. It needs the extra ``[sql]``.
    """
    try:
        import outbox.sql  # noqa: F401  # says which extra is missing
    except MissingExtra as error:
        pytest.fail(f"the fixture embedded_events: {error}", pytrace=False)
    with (
        _place(request, tmp_path) as url,
        live(url, _where(request), strict=_is_strict(request)) as published,
    ):
        _check_at_end(request, published)
        yield published


@contextmanager
def _place(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    marker = request.node.get_closest_marker("embedded_events")
    server = (
        (marker.kwargs.get("url") if marker else None)
        or os.environ.get("OUTBOX_TEST_DATABASE_URL")
        or str(request.config.getini("outbox_embedded_url"))
    )
    if not server:
        yield f"sqlite:///{quote(str(folder / 'outbox-events.db'))}"
        return
    from outbox.transports.database.server.separate import separate

    try:
        with separate(server) as url:
            yield url
    except OutboxError as error:
        pytest.fail(f"the fixture embedded_events: {error}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a strict test if a published event was matched by no assertion."""
    result = yield
    for events in item.stash.get(_CHECKED, []):
        events.check_strict()
    return result


def _check_at_end(request: pytest.FixtureRequest, events: EventAssertions) -> None:
    checked = request.node.stash.setdefault(_CHECKED, [])
    checked.append(events)
    request.addfinalizer(checked.clear)  # the test's item lives until the session ends


def _where(request: pytest.FixtureRequest) -> str:
    return f"the fixture {request.fixturename} of {request.node.nodeid}"


def _is_strict(request: pytest.FixtureRequest) -> bool:
    strict = bool(request.config.getini("outbox_strict"))
    marker = request.node.get_closest_marker("collected_events")
    return strict if marker is None else bool(marker.kwargs.get("strict", strict))
