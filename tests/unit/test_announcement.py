"""Announcements: bounded when they are written, and read with care."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.presence.announcement import MOST_BYTES, Announcement, encoded

VALUES: dict[str, Any] = {
    "process": "a1",
    "kind": "worker",
    "id": "mail-1",
    "host": "web-3",
    "pid": 4711,
    "app_id": "shop",
    "phase": "ready",
    "age": 3600.5,
    "interval": 10.0,
    "threads": 8,
    "concurrency": 100,
    "in_flight": 3,
    "late": 1,
    "error": {"class": "OperationalError", "age": 12.5},
    "outbox": "0.1.0",
    "python": "3.13.1",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NAMES = ["version", *VALUES, "queues", "more_queues"]


def test_an_announcement_is_read_as_it_was_written() -> None:
    body = encoded(VALUES, ["mail", "mail.high"])
    assert json.loads(body)["version"] == 1
    assert Announcement.parse(body) == Announcement(
        **{name: value for name, value in VALUES.items() if name != "error"},
        error="OperationalError",
        error_age=12.5,
        queues=("mail", "mail.high"),
    )


@pytest.mark.parametrize("name", ["q", "q" * 250, "ä" * 125, '"' * 250, "\0" * 250])
@pytest.mark.parametrize("count", [0, 1, 15, 1_000])
def test_an_announcement_has_at_most_four_kibibytes(name: str, count: int) -> None:
    queues = [name] * count
    longest = {**VALUES, **dict.fromkeys(("host", "app_id"), "\x00" * 1000), "error": None}
    for values in (VALUES, longest):
        body = encoded(values, queues)
        assert len(body) <= MOST_BYTES
        found = Announcement.parse(body)
        assert found is not None
        assert list(found.queues) == queues[: len(found.queues)]
        assert len(found.queues) + found.more_queues == count
        assert count > 15 or name != "q" or len(found.queues) == count


def test_a_name_that_is_not_unicode_is_written() -> None:
    found = Announcement.parse(encoded({**VALUES, "host": "web\udcff"}, ["\udcff"]))
    assert found is not None
    assert (found.host, found.queues) == ("web?", ("?",))


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(NAMES), JSON) | JSON, st.sampled_from([1, 2, "1", None]))
def test_what_others_publish_there_is_an_announcement_or_skipped(
    values: Any, version: object
) -> None:
    if isinstance(values, dict):
        values = {"version": version, **values}
    found = Announcement.parse(json.dumps(values).encode())
    if found is not None:
        assert values["version"] == 1
        assert found.process == values["process"][:255]
        assert all(isinstance(name, str) for name in found.queues)
        assert found.pid >= 0
        assert found.age >= 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 4_000,
        b"[]",
        b"{}",
        json.dumps({**VALUES, "version": 2}).encode(),
        json.dumps({**VALUES, "version": 1, "process": None}).encode(),
        encoded(VALUES, []) + b" " * MOST_BYTES,
    ],
    ids=lambda body: f"{body[:10]!r}{len(body)}",
)
def test_what_is_no_announcement_is_skipped(body: bytes) -> None:
    assert Announcement.parse(body) is None


def test_unknown_members_are_ignored_and_wrong_ones_count_as_missing() -> None:
    values = {**VALUES, "version": 1, "new": {"a": 1}, "pid": "x", "late": True, "age": -1}
    found = Announcement.parse(json.dumps(values).encode())
    assert found is not None
    assert (found.pid, found.late, found.age, found.host) == (0, 0, 0.0, "web-3")
