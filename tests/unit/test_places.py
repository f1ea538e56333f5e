"""The places of a worker's threads while handlers are late."""

from __future__ import annotations

from outbox.consumers.worker.places import Places


def taken(count: int) -> Places:
    places = Places(count)
    places.take_all()
    return places


def test_a_late_thread_leaves_its_place_to_a_successor_and_finds_none_when_it_comes_back() -> None:
    places = taken(1)
    assert places.lose()
    assert places.late == 1
    assert not places.come_back()
    assert places.late == 0


def test_beyond_as_many_late_threads_as_places_the_next_one_back_takes_the_free_place() -> None:
    places = taken(1)
    assert places.lose()
    assert not places.lose()
    places.leave()  # the second successor has settled the message and ends
    assert places.wait_until_empty(0)
    assert places.come_back()
    assert not places.wait_until_empty(0)
    assert not places.come_back()


def test_where_no_successor_can_be_started_the_late_thread_takes_its_place_again() -> None:
    places = taken(1)
    assert places.lose()
    places.leave(to_late=True)
    assert places.come_back()


def test_nothing_works_any_more_when_every_place_was_left() -> None:
    places = taken(2)
    places.leave()
    assert not places.wait_until_empty(0)
    places.leave()
    assert places.wait_until_empty(0)
