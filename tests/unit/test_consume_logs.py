"""How lines of the log look, and which message they belong to."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outbox.consumers import MessageFilter, ReceivedEvent, consumer, current_message
from outbox.consumers.logs import JSONFormatter, TextFormatter
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.message.message_log import ended, started
from outbox.consumers.outcome import ACK, REQUEUE, Dead, Outcome
from outbox.messages.delivery import Delivery
from outbox.publisher import Publisher
from outbox.testing.recorded_delivery import processed

log = logging.getLogger("shop.handlers")


@pytest.fixture
def output() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is logged, as the JSON of ``outbox-consume``."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    handler.addFilter(MessageFilter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


def delivery(**changes: Any) -> Delivery:
    found: dict[str, Any] = {
        "queue": "orders",
        "tag": 1,
        "generation": 0,
        "redelivered": False,
        "exchange": "outbox",
        "target": "order.placed",
        "body": b'"SECRET-BODY"',
        "message_id": "m-1",
        "headers": {"outbox-attempt": 2},
    }
    return Delivery(**{**found, **changes})


def process(function: Callable[[ReceivedEvent], Any], **changes: Any) -> None:
    made = consumer("orders")(function)
    with Publisher("memory://") as publisher:
        outcome = processed(made, delivery(**changes), publisher)
    assert outcome == ACK


def test_every_line_of_a_handler_names_its_message(output: Any) -> None:
    def handle(event: ReceivedEvent) -> None:
        log.info("in the handler")
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(log.info, "in a thread"))
        thread.start()
        thread.join()
        asyncio.run(tasks())

    async def tasks() -> None:
        async def log_one(text: str) -> None:
            await asyncio.sleep(0)
            log.info(text)

        await asyncio.gather(log_one("in a task"), asyncio.to_thread(log.info, "in to_thread"))

    process(handle)
    lines = [line for line in output() if line["logger"] == log.name]
    assert sorted(line["message"] for line in lines) == [
        "in a task",
        "in a thread",
        "in the handler",
        "in to_thread",
    ]
    for line in lines:
        assert (line["message_id"], line["queue"], line["attempt"]) == ("m-1", "orders", 2)


def test_a_line_outside_of_messages_names_none(output: Any) -> None:
    process(lambda event: None)
    assert current_message() is None
    log.warning("between messages")
    [line] = [line for line in output() if line["logger"] == log.name]
    assert set(line) == {"time", "level", "logger", "process", "message"}


def test_two_concurrent_messages_do_not_mix(output: Any) -> None:
    meeting = threading.Barrier(2)

    def handle(event: ReceivedEvent) -> None:
        meeting.wait(5)
        log.info("%s", event.id)

    threads = [
        threading.Thread(target=process, args=(handle,), kwargs={"message_id": name})
        for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for line in output() if line["logger"] == log.name]
    assert {line["message"] for line in lines} == {"a", "b"}
    assert all(line["message"] == line["message_id"] for line in lines)


def test_a_line_of_json_has_the_time_in_utc_and_the_traceback_as_text(output: Any) -> None:
    before = datetime.datetime.now(datetime.UTC)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("could not\ndo %s", "it")
    [line] = output()
    moment = datetime.datetime.fromisoformat(line["time"])
    assert line["time"].endswith("Z")
    assert before <= moment <= datetime.datetime.now(datetime.UTC)
    assert (line["level"], line["logger"]) == ("ERROR", log.name)
    assert line["message"] == "could not\ndo it"
    assert line["exc_info"].startswith("Traceback")
    assert line["exc_info"].endswith("ValueError: first\nsecond")


@pytest.mark.parametrize(
    ("outcome", "level", "expected"),
    [
        (ACK, "INFO", "message 'm-1' of 'orders' finished after 0."),
        (REQUEUE, "INFO", "message 'm-1' of 'orders' requeued after 0."),
        (Dead("no\nway"), "ERROR", "message 'm-1' of 'orders' dead-lettered after 0."),
    ],
)
def test_the_end_of_a_message_is_a_line_with_its_duration(
    output: Any, outcome: Outcome, level: str, expected: str
) -> None:
    ended(delivery(), outcome, started(delivery()))
    begin, end = output()
    assert (begin["level"], begin["message"]) == ("DEBUG", "message 'm-1' of 'orders' started")
    assert end["level"] == level
    assert end["message"].startswith(expected)
    assert "\n" not in end["message"]
    assert (end["message_id"], end["queue"], end["attempt"]) == ("m-1", "orders", 2)
    assert 0 < end["duration"] < 1


def test_a_message_of_another_client_without_an_id_is_still_logged(output: Any) -> None:
    strange = delivery(message_id=None, headers=None)
    ended(strange, ACK, started(strange))
    _, line = output()
    assert "message_id" not in line
    assert (line["queue"], line["attempt"]) == ("orders", 1)


def test_the_last_line_of_a_message_without_an_id_names_the_id_its_handler_saw(
    output: Any,
) -> None:
    seen: list[str] = []
    strange = delivery(message_id=None)
    publisher = Publisher("memory://")
    message = Message(
        consumer("orders")(lambda event: seen.append(event.id)),
        strange,
        InlineEngine(publisher),
    )
    contextvars.copy_context().run(InlineEngine(publisher).conclude, message)
    ended(strange, ACK, 0.0)
    [line] = output()
    assert [line["message_id"]] == seen
    assert line["message"].startswith(f"message {seen[0]!r} of 'orders' finished")


def test_an_id_with_a_line_break_forges_no_line() -> None:
    forged = "x\nERROR root: forged\x1b[0m"
    lines = []
    for form in (TextFormatter(), JSONFormatter()):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(form)
        handler.addFilter(MessageFilter())
        log.addHandler(handler)

        def handle(event: ReceivedEvent) -> None:
            log.error("careful")

        try:
            process(handle, message_id=forged)
        finally:
            log.removeHandler(handler)
        lines.append(stream.getvalue())
    text, as_json = lines
    assert text.count("\n") == as_json.count("\n") == 1
    assert r"shop.handlers: [x\nERROR root: forged\x1b[0m] careful" in text
    assert "\x1b" not in text + as_json


def test_a_line_of_text_names_an_id_once() -> None:
    fields = {"msg": "message 'm-1' finished", "levelname": "INFO", "name": "x"}
    own = logging.makeLogRecord({**fields, "outbox_message": {"message_id": "m-1"}})
    MessageFilter().filter(own)
    assert TextFormatter().format(own).endswith(" x: message 'm-1' finished")
    handlers = logging.makeLogRecord({**fields, "message_id": "m-1"})
    assert TextFormatter().format(handlers).endswith(" x: [m-1] message 'm-1' finished")


def test_a_records_own_fields_are_not_overwritten(output: Any) -> None:
    process(lambda event: log.info("printing", extra={"queue": "printer"}))
    [line] = [line for line in output() if line["logger"] == log.name]
    assert (line["message_id"], line["queue"]) == ("m-1", "printer")


def test_extra_fields_are_in_a_line_of_json_whatever_they_hold(output: Any) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise ValueError

    cycle: list[Any] = []
    cycle.append(cycle)
    extra = {
        "order_id": 17,
        "tags": {"a": [1.5, None]},
        "when": datetime.date(2026, 11, 21),
        "time": "noon",
        "nan": float("nan"),
        "cycle": cycle,
        "keys": {("a", 1): 2},
        "hostile": Hostile(),
    }
    log.warning("charged", extra=extra)
    [line] = output()
    assert line["message"] == "charged"
    assert line["time"].endswith("Z")
    assert line["extra_time"] == "noon"
    assert (line["order_id"], line["tags"], line["when"]) == (17, extra["tags"], "2026-11-21")
    assert (line["nan"], line["cycle"], line["keys"]) == ("nan", "[[...]]", "{('a', 1): 2}")
    assert line["hostile"] == "(unavailable: ValueError)"
    log.warning("nothing")
    assert set(output()[1]) == {"time", "level", "logger", "process", "message"}


def test_the_filter_works_with_a_custom_format() -> None:
    record = logging.makeLogRecord({"msg": "hello"})
    assert MessageFilter().filter(record)
    form = logging.Formatter("%(message_id)s|%(queue)s|%(attempt)d|%(duration).1f|%(message)s")
    assert form.format(record) == "||0|0.0|hello"


def test_no_payload_is_in_any_line(output: Any) -> None:
    process(lambda event: log.info("handling %r", event))
    ended(delivery(), Dead("rejected"), started(delivery()))
    assert len(output()) >= 3
    assert "SECRET-BODY" not in json.dumps(output())
