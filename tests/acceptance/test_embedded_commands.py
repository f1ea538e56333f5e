"""The commands on a SQLite file, as their users run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.messages.dead_letters import PARKING_QUEUE
from tests.commands import Done, run_outbox
from tests.places import SQLitePlace, events_for, reading
from tests.waiting import wait_until

MODULE = """
from outbox import enqueue_event, publish
from outbox.consumers import consumer


@consumer("invoices", topics=["order.*"])
def invoices(event):
    enqueue_event({"of": event.payload["n"]}, "invoice.sent")
    publish()
"""


@pytest.fixture
def place(tmp_path: Path) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), "outbox")


def parked(place: SQLitePlace, *arguments: str) -> Done:
    return run_outbox("parked", *arguments, "--url", place.url)


def test_outbox_consume_works_on_the_file_until_it_is_stopped(
    place: SQLitePlace, tmp_path: Path
) -> None:
    (tmp_path / "work.py").write_text(MODULE)
    with reading(place, "seen", ["invoice.*"]) as reader, place.publisher() as publisher:
        child = subprocess.Popen(
            [sys.executable, "-m", "outbox.consumers", "work", "--url", "sqlite:///outbox.db"],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "OUTBOX_URL"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(
                lambda: place.execute("SELECT 1 FROM outbox_bindings WHERE pattern = 'order.*'")
            )
            publisher.publish(events_for(publisher, ["order.placed"] * 3))
            sent = [json.loads(one.body)["of"] for one in reader.get(3)]
            child.send_signal(signal.SIGTERM)
            _, log = child.communicate(timeout=20)
        finally:
            if child.poll() is None:
                child.kill()
    assert child.returncode == exit_codes.SUCCESS, log
    assert sorted(sent) == [0, 1, 2]
    assert place.execute("SELECT queue, type FROM outbox_events") == []


def test_outbox_parked_lists_replays_and_deletes(place: SQLitePlace) -> None:
    with place.publisher() as publisher:
        events = events_for(publisher, ["order.placed", "order.paid", "lost"])
        assert publisher.publish(events).parked == tuple(events)
    listed = parked(place, "list", "--json", "--payload")
    assert listed.returncode == exit_codes.SUCCESS, listed.stderr
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(row["id"], row["target"], row["payload"]) for row in rows] == [
        (event.id, event.target, f'{{"n":{n}}}') for n, event in enumerate(events)
    ]
    assert {row["reason"] for row in rows} == {"312 NO_ROUTE"}

    with reading(place, "orders", ["order.*"]) as reader:
        replayed = parked(place, "replay", "--target", "order.*", "--limit", "1")
        assert "3 messages, 1 replayed, 0 failed" in replayed.stdout, replayed.stderr
        assert [one.message_id for one in reader.get()] == [events[0].id]
    left = parked(place, "replay")
    assert left.returncode == exit_codes.UNFINISHED
    assert "2 messages, 1 replayed, 1 failed" in left.stdout
    assert "312 NO_ROUTE" in left.stderr

    purged = parked(place, "purge", "--yes")
    assert (purged.returncode, purged.stdout) == (
        exit_codes.SUCCESS,
        f"{PARKING_QUEUE}: 1 message, 1 deleted\n",
    )
    assert place.count(PARKING_QUEUE) == 0
    assert place.count("orders") == 1


@pytest.mark.slow
def test_a_thousand_parked_events_are_replayed_in_order(place: SQLitePlace) -> None:
    with place.publisher() as publisher:
        events = events_for(publisher, ["late"] * 2_500)
        publisher.publish(events)
    with reading(place, "orders", ["late"]) as reader:
        assert "2500 replayed" in parked(place, "replay").stdout
        assert [one.message_id for one in reader.get(2_500)] == [event.id for event in events]
    assert place.execute("SELECT count(*) FROM outbox_events") == [(0,)]


def test_messages_being_processed_are_left_alone(place: SQLitePlace) -> None:
    with place.publisher() as publisher:
        publisher.publish(events_for(publisher, ["lost"] * 2))
    with reading(place, PARKING_QUEUE, again=True, prefetch=1) as reader:
        [held] = reader.take(1)
        assert "1 message, 1 deleted" in parked(place, "purge", "--yes").stdout
        assert place.execute("SELECT id FROM outbox_events") == [(held.message_id,)]
