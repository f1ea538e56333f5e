"""The log of ``outbox-consume``, as its users read it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outbox import Event, exit_codes
from tests.places import SQLitePlace
from tests.waiting import wait_until

MODULE = """
import asyncio, logging, warnings
from outbox.consumers import consumer

log = logging.getLogger("shop")


@consumer("orders")
def orders(event):
    log.info("in the handler")
    asyncio.run(asyncio.to_thread(log.info, "in a thread"))
    warnings.warn("old")
    if event.payload["fail"]:
        raise ValueError("no\\nway")
"""

FORGED = "b\nERROR root: forged"


def consume(place: SQLitePlace, folder: Path, *arguments: str) -> str:
    """Consume a message that succeeds and one that fails; return the log."""
    (folder / "work.py").write_text(MODULE)
    command = [sys.executable, "-m", "outbox.consumers", "work", *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OUTBOX_URL": place.url},
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        place.bind("orders", "")
        with place.publisher(unroutable="fail") as publisher:
            events = [
                Event(
                    id=name,
                    target="orders",
                    exchange="",
                    body=json.dumps({"fail": fail, "card": "SECRET-BODY"}).encode(),
                )
                for name, fail in (("a", False), (FORGED, True))
            ]
            publisher.publish(events).raise_for_failure()
        wait_until(lambda: place.count("orders.dead") == 1, 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == exit_codes.SUCCESS
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    return (folder / "log").read_text()


@pytest.fixture
def place(tmp_path: Path) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), "outbox")


def test_every_line_of_json_is_an_object_and_those_of_a_message_have_its_id(
    place: SQLitePlace, tmp_path: Path
) -> None:
    log = consume(place, tmp_path, "--log-format", "json")
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.splitlines()]
    for name in ("a", FORGED.replace("\n", "\\n")):
        own = [line for line in lines if line.get("message_id") == name]
        assert {line["message"] for line in own if line["logger"] == "shop"} == {
            "in the handler",
            "in a thread",
        }
        [end] = [line for line in own if line["logger"] == "outbox.consumer.messages"]
        assert end["queue"] == "orders"
        assert end["duration"] > 0
        assert end["level"] == ("INFO" if name == "a" else "ERROR")
        assert ("exc_info" in end) == (name != "a")
    [warning] = [line for line in lines if line["logger"] == "py.warnings"]  # it comes once
    assert warning["message_id"]
    assert "SECRET-BODY" not in log


def test_every_line_of_text_about_a_message_has_its_id_and_none_is_forged(
    place: SQLitePlace, tmp_path: Path
) -> None:
    log = consume(place, tmp_path)
    assert log.count("shop: [a] in ") == 2
    assert log.count(r"shop: [b\nERROR root: forged] in ") == 2
    assert "outbox.consumer.messages: message 'a' of 'orders' finished after 0." in log
    assert "dead-lettered after 0." in log
    assert "\nERROR root: forged" not in log
    assert "SECRET-BODY" not in log


def test_above_level_info_messages_are_not_logged_one_by_one(
    place: SQLitePlace, tmp_path: Path
) -> None:
    log = consume(place, tmp_path, "--log-level", "WARNING")
    assert "message 'a'" not in log
    assert "dead-lettered" in log


def test_the_error_that_ends_the_process_is_a_line_of_json_too(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("raise RuntimeError('broken')")
    done = subprocess.run(
        [sys.executable, "-m", "outbox.consumers", "work", "--log-format", "json"],
        cwd=tmp_path,
        env={**os.environ, "OUTBOX_URL": "memory://"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=20,
        check=False,
    )
    [line] = [json.loads(line) for line in done.stderr.splitlines()]
    assert (line["level"], line["message"]) == ("CRITICAL", "uncaught RuntimeError; exiting")
    assert line["exc_info"].endswith("RuntimeError: broken")
    assert done.returncode == 1
