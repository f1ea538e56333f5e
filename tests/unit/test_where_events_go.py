"""What decides whether an event is collected, stored, or published at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outbox import (
    Event,
    Publisher,
    UsageError,
    auto_publishing,
    configuration,
    configure,
    enqueue_event,
    sinks,
)
from outbox.testing import CollectedEvents


class Database:
    """A framework's database that keeps what is stored, by alias."""

    def __init__(self) -> None:
        self.stored: list[tuple[str | sinks.Bound, Event]] = []

    def sink_using(self, alias: str | sinks.Bound) -> sinks.Sink | None:
        def store(event: Event, publisher: Publisher | None) -> bool:
            self.stored.append((alias, event))
            return True

        return store


@pytest.fixture
def database() -> Iterator[Database]:
    found = Database()
    sinks.sink_using = found.sink_using
    yield found
    sinks.sink_using = None


def test_a_database_that_is_configured_takes_each_event(database: Database) -> None:
    event = enqueue_event({}, "orders")
    assert database.stored == [(sinks.BOUND, event)]


def test_an_alias_chooses_the_database(database: Database) -> None:
    event = enqueue_event({}, "orders", using="archive")
    assert database.stored == [("archive", event)]


def test_a_session_that_was_bound_comes_first(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Database()
    monkeypatch.setattr(sinks, "bound", lambda: session.sink_using(sinks.BOUND))
    event = enqueue_event({}, "orders")
    assert session.stored == [(sinks.BOUND, event)]
    assert not database.stored
    monkeypatch.setattr(sinks, "bound", lambda: None)
    enqueue_event({}, "orders")
    assert len(database.stored) == 1


def test_without_an_alias_or_a_session_events_are_collected(
    database: Database, collected_events: CollectedEvents
) -> None:
    with auto_publishing():
        event = enqueue_event({}, "orders", session=None)
        assert not database.stored
    assert [each.id for each in collected_events.published] == [event.id]


def test_an_event_of_no_database_is_published_at_once(collected_events: CollectedEvents) -> None:
    with pytest.raises(RuntimeError), auto_publishing():
        event = enqueue_event({}, "orders", using=None)
        raise RuntimeError
    assert [each.id for each in collected_events.published] == [event.id]


def test_an_alias_needs_a_framework() -> None:
    configure("memory://")
    with pytest.raises(UsageError, match=r"outbox\.django is not set up"):
        enqueue_event({}, "orders", using="default")


def test_only_one_of_them_may_be_given() -> None:
    configure("memory://")
    with pytest.raises(UsageError, match="only one of session, connection and using"):
        enqueue_event({}, "orders", using="default", session=None)


def test_an_application_provides_its_own_publisher() -> None:
    process_wide = configure("memory://")
    with Publisher("memory://") as own:
        provided: list[Publisher | None] = [own]
        configuration.provide(lambda: provided[0])
        try:
            with auto_publishing():
                enqueue_event({}, "orders")
            assert own.stats().published == 1
            assert configuration.publisher_if_any() is own
            provided[0] = None
            with auto_publishing():
                enqueue_event({}, "orders")
        finally:
            configuration.provide(None)
    assert process_wide.stats().published == 1
