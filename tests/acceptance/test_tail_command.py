"""``outbox tail`` as its users run it: a process, its output, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from outbox import Publisher, exit_codes
from proving.proxy import FaultProxy
from tests.amqp import Inspector, properties_of
from tests.commands import outbox_command, run_outbox
from tests.integration.test_worker import send


@contextlib.contextmanager
def tailing(url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in the block, from the moment it watches."""
    process = subprocess.Popen(
        outbox_command("tail", *arguments),
        env={**os.environ, "OUTBOX_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        watching = process.stderr.readline()
        assert watching.startswith("outbox: watching "), watching + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.one_python
def test_events_are_shown_as_they_pass_by_until_ctrl_c(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with tailing(amqp_url, "order.*", "x", "--exchange", name) as process:
        [id] = send(publisher, "order.placed", {"order_id": 17})
        send(publisher, "photo.new", 1)
        moment, target, shown_id, payload = line(process).rstrip("\n").split("  ")
        assert (target, shown_id, payload) == ("order.placed", id, '{"order_id":17}')
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", moment)
        inspector.publish("x", b"\x1b[2J\n\xc2\x9b1m", name, properties_of(message_id="\x1b]0;t"))
        shown = line(process)
        assert shown.endswith("  x  \\x1b]0;t  \\x1b[2J\\n\\x9b1m\n"), shown
        send(publisher, "x", "." * 5_000)
        shown = line(process)
        assert shown.endswith("... (5002 bytes)\n")
        assert len(shown) < 1_200
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=20)
    assert (process.returncode, output, error) == (
        exit_codes.INTERRUPTED,
        "",
        "outbox: interrupted\n",
    )
    assert len(inspector.messages(name, 4)) == 4  # it has taken nothing


@pytest.mark.one_python
def test_json_has_everything_and_the_limit_ends_it(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with tailing(amqp_url, "--exchange", name, "--json", "--limit", "2") as process:
        headers: dict[str, Any] = {"tenant": 7, "raw": b"\xff", "list": [None, {"a": True}]}
        [id] = send(publisher, "x", "." * 5_000, headers=headers, key="k", priority=3)
        inspector.publish("y", b"\xff\x7f", name, properties_of(message_id="2"))
        first, second = (json.loads(line(process)) for _ in range(2))
        assert process.wait(20) == exit_codes.SUCCESS
    assert first.pop("occurred_at")
    assert first == {
        "id": id,
        "exchange": name,
        "target": "x",
        "key": "k",
        "priority": 3,
        "headers": {"tenant": 7, "raw": "\\xff", "list": [None, {"a": True}]},
        "size": 5_002,
        "content_type": "application/json",
        "payload": json.dumps("." * 5_000),
    }
    assert (second["id"], second["payload_base64"]) == ("2", "/38=")


@pytest.mark.one_python
def test_it_says_what_may_be_missing_and_goes_on(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with FaultProxy(amqp_url) as proxy:
        with tailing(proxy.url, "--exchange", name, "--no-payload", "--limit", "1") as process:
            assert process.stderr is not None
            proxy.cut()
            assert "the connection was lost" in process.stderr.readline()
            assert "connected again; " in process.stderr.readline()
            [id] = send(publisher, "x", "secret")
            assert line(process).endswith(f"  x  {id}  8 bytes\n")
            assert process.wait(20) == exit_codes.SUCCESS


@pytest.mark.one_python
def test_what_cannot_be_watched_is_said_with_an_exit_code(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    for url, options, code, text in (
        ("sqlite:///x.db", (), exit_codes.USAGE, "sqlite:// has none"),
        ("", (), exit_codes.USAGE, "OUTBOX_URL"),
        (amqp_url, ("--exchange", name), exit_codes.USAGE, f"no exchange '{name}'"),
        (amqp_url, ("--limit", "-1"), exit_codes.USAGE, "invalid integer from 0 on: '-1'"),
        ("amqp://127.0.0.1:1", (), exit_codes.UNAVAILABLE, "cannot connect to 127.0.0.1:1"),
    ):
        done = run_outbox("tail", *options, variables={"OUTBOX_URL": url})
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1 or "usage:" in done.stderr
