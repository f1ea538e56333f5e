"""``outbox relay`` as its users run it: a process, signals, output, exit codes."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.sql import Store
from outbox.system.signals import BURST
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.relaying import an_event, is_empty, many, opened
from tests.waiting import wait_until

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/events.db"


@pytest.fixture
def start(database_url: str, amqp_url: str) -> Iterator[Start]:
    """Start the command; by default both URLs are in its environment."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
            child = subprocess.Popen(
                [sys.executable, "-m", "outbox", "relay", *arguments],
                env={
                    **os.environ,
                    "OUTBOX_DATABASE_URL": database_url,
                    "OUTBOX_URL": amqp_url,
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield begin


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = child.communicate(timeout=30)
    return child.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_relay_publishes_until_a_signal_and_exits_cleanly(
    start: Start, store: Store, inspector: Inspector, name: str, number: int
) -> None:
    inspector.queue(name, name)
    store.put(many(20, name))
    child = start()
    assert len(inspector.messages(name, 20)) == 20
    wait_until(lambda: is_empty(store))
    child.send_signal(number)
    code, output, errors = ended(child)
    assert (code, output) == (exit_codes.SUCCESS, "")
    assert "relaying" in errors
    assert "stopped; 20 events published" in errors


def test_sigterm_under_load_leaves_no_leases_and_repeats_nothing(
    start: Start, store: Store, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(5000, name))
    proxy.delay = 0.05
    child = start("--url", proxy.url, "--batch", "50")
    wait_until(lambda: store.status().waiting < 4900)
    child.send_signal(signal.SIGTERM)
    assert ended(child)[0] == exit_codes.SUCCESS
    left = store.status()
    assert left.leased == 0
    assert left.waiting > 0
    assert inspector.count(name) == 5000 - left.waiting


def test_rows_that_are_not_confirmed_in_time_are_released(
    start: Start, store: Store, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    child = start("--url", proxy.url, "--shutdown-timeout", "0.2")
    store.put([an_event(0, name)])
    inspector.get(name)
    wait_until(lambda: is_empty(store))
    proxy.black_hole()
    store.put(many(20, name))
    wait_until(lambda: store.status().leased == 20)
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    code, _, errors = ended(child)
    assert code == exit_codes.UNFINISHED
    assert time.monotonic() - begin < 8  # the default is 10
    assert store.status().waiting == 20
    assert "lost" not in errors  # they are in the table


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(
    start: Start, store: Store, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    child = start("--url", proxy.url, "--shutdown-timeout", "60")
    store.put([an_event(0, name)])
    inspector.get(name)
    wait_until(lambda: is_empty(store))
    proxy.black_hole()
    store.put([an_event(1, name)])
    wait_until(lambda: store.status().leased == 1)
    child.send_signal(signal.SIGTERM)
    time.sleep(BURST + 0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(2) == exit_codes.INTERRUPTED


@pytest.mark.slow
def test_a_signal_before_the_database_can_be_reached_is_a_clean_stop(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        child = start(OUTBOX_DATABASE_URL=f"postgresql://outbox@127.0.0.1:{port}/events")
        connection, _ = silent.accept()
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        connection.close()
        silent.close()
        code, _output, errors = ended(child)
    assert code == exit_codes.SUCCESS, errors


def test_once_publishes_due_events_and_exits(
    start: Start, store: Store, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(30, name))
    assert ended(start("--once", "--batch", "7"))[:2] == (0, "30 events published\n")
    assert ended(start("--once", "--ordered"))[:2] == (0, "0 events published\n")
    assert len(inspector.all(name)) == 30


def test_once_stops_early_at_a_signal_and_releases_its_rows(
    start: Start, store: Store, proxy: FaultProxy, name: str
) -> None:
    store.put(many(30, name))
    proxy.black_hole()
    child = start("--once", "--url", proxy.url, "--shutdown-timeout", "0.2")
    wait_until(lambda: store.status().leased == 30)
    child.send_signal(signal.SIGTERM)
    assert ended(child)[:2] == (exit_codes.UNFINISHED, "0 events published\n")
    assert store.status().waiting == 30


@pytest.mark.slow
def test_postgresql_is_relayed_in_order_with_hints(
    start: Start, postgresql_url: str, inspector: Inspector, name: str
) -> None:
    store = opened(postgresql_url)
    inspector.queue(name, name)
    child = start("--database", postgresql_url, "--ordered", "--listen", "--lease", "120")
    store.put([an_event(n, name, key="k") for n in range(5)])
    assert [message.payload for message in inspector.messages(name, 5)] == [0, 1, 2, 3, 4]
    child.send_signal(signal.SIGTERM)
    assert ended(child)[0] == exit_codes.SUCCESS
    store.engine.dispose()


def test_on_a_terminal_one_line_shows_how_many_and_how_fast(
    database_url: str, store: Store, amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    store.put(many(20, name))
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "outbox", "relay", "--database", database_url, "--url", amqp_url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    seen, asked = b"", False
    timer = threading.Timer(20, child.kill)
    timer.start()
    try:
        with contextlib.suppress(OSError):  # the terminal is gone with the child
            while data := os.read(controller, 4096):
                seen += data
                if b"20 events published" in seen and not asked:
                    asked = True
                    child.send_signal(signal.SIGTERM)
        assert child.wait(10) == exit_codes.SUCCESS
    finally:
        timer.cancel()
        os.close(controller)
    assert b"\r\x1b[K20 events published, " in seen
    assert b"a second" in seen


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--database", "sqlite:////nowhere/x.db"], exit_codes.USAGE, "its folder does not exist"),
        (["--database", "oracle://u:hunter2@h/d"], exit_codes.USAGE, "oracle"),
        (
            ["--database", "postgresql://u:hunter2@127.0.0.1:1/d"],
            exit_codes.UNAVAILABLE,
            "the database failed",
        ),
        (["--url", "amqp://u:hunter2@127.0.0.1:1/", "--once"], exit_codes.UNAVAILABLE, "127.0.0.1"),
        (["--url", "http://u:hunter2@h"], exit_codes.USAGE, "use amqp://user"),
        (["--lease", "0"], exit_codes.USAGE, "lease is 0.0"),
        (["--batch", "0"], exit_codes.USAGE, "--batch"),
    ],
)
def test_errors_are_reported_in_one_line(
    start: Start, store: Store, name: str, arguments: list[str], code: int, expected: str
) -> None:
    store.put([an_event(1, name)])
    found, output, errors = ended(start(*arguments, "--log-level", "ERROR"))
    assert (found, output) == (code, "")
    assert expected in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert "hunter2" not in errors


def test_a_missing_table_is_reported_with_advice(start: Start, tmp_path: Path) -> None:
    code, _, errors = ended(start("--database", f"sqlite:///{tmp_path}/other.db"))
    assert code == exit_codes.USAGE
    assert "outbox sql create" in errors


def test_a_missing_database_names_the_option(start: Start) -> None:
    code, _, errors = ended(start(OUTBOX_DATABASE_URL=""))
    assert code == exit_codes.USAGE
    assert "--database URL, or set OUTBOX_DATABASE_URL" in errors


def test_a_missing_broker_names_the_option(start: Start, store: Store) -> None:
    code, _, errors = ended(start(OUTBOX_URL=""))
    assert code == exit_codes.USAGE
    assert "OUTBOX_URL" in errors
    assert "Traceback" not in errors
