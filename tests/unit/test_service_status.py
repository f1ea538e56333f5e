"""What a service writes down about itself, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest

from outbox.commands.workers_command import _lines, service_command
from outbox.service.identity.listing import Listed
from outbox.service.identity.status_file import (
    Status,
    WorkerStatus,
    has_password,
    without_passwords,
)
from outbox.service.own_command import own_command, working_directory

_STATUS = Status(
    id="mail",
    pid=4711,
    command=("outbox-consume", "shop.consumers", "--id", "mail"),
    folder="/srv/shop",
    applications=("shop.consumers",),
    started_at=1.0,
    written_at=2.0,
    phase="ready",
    ready=False,
    owner=True,
    reasons=("worker 2 is starting",),
    processes=2,
    workers=(
        WorkerStatus(
            1,
            4712,
            "ready",
            10.0,
            in_flight=3,
            late=1,
            oldest=300.0,
            links={"publisher": False, "consumer": True},
            limits={"max-messages": [70, 1000]},
            resident=50 << 20,
            error={"at": 1.0, "logger": "outbox", "class": "OSError", "text": "no\x1b[31m"},
        ),
        WorkerStatus(2, 4713, "starting", 1.0),
    ),
    restarts={"died": 1},
)


def test_a_state_is_read_as_it_was_written_by_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "outbox-mail.4711.json"
    _STATUS.write(path)
    again = dataclasses.replace(_STATUS, phase="leaving")
    again.write(path)
    assert Status.read(path) == again
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [path.name]


def test_what_is_no_state_is_none(tmp_path: Path) -> None:
    path = tmp_path / "outbox-mail.4711.json"
    assert Status.read(path) is None
    _STATUS.write(path)
    values = json.loads(path.read_text())
    for text in ("", "{", "[]", '{"version": 1}', json.dumps({**values, "version": 2})):
        path.write_text(text)
        assert Status.read(path) is None
    path.write_text(json.dumps({**values, "of a later version": 1}))
    assert Status.read(path) == _STATUS


def test_what_deserves_attention_is_shown_without_control_characters() -> None:
    status = dataclasses.replace(_STATUS, started_at=time.time() - 7300)
    lines = _lines(Listed("mail", Path("x"), 4711, 4711, True, status))
    error = lines[5]
    assert lines[:5] == [
        "mail: running (process 4711), 1 of 2 ready, started 2 h ago; "
        "outbox-consume shop.consumers --id mail",
        "  not ready: worker 2 is starting",
        "  worker 1 (process 4712): ready, 3 in flight, the oldest for 5 min, "
        "1 past the timeout, started 10 s ago, 50 MiB",
        "    max-messages: 70 of 1,000",
        "    no connection: publisher",
    ]
    assert error.startswith("    last error, ")
    assert error.endswith(" ago: no\\x1b[31m")
    assert lines[6] == "  worker 2 (process 4713): starting, started 1 s ago"


def test_a_command_that_is_started_again_and_again_does_not_grow() -> None:
    once = service_command(["outbox-consume", "shop"], "1", Path("/pids"), take_over=True)
    assert once == ["outbox-consume", "shop", "--id", "1", "--pid-dir", "/pids", "--take-over"]
    again = service_command(once, "1", Path("/other"), start_timeout=90.0)
    assert again == [
        *("outbox-consume", "shop", "--id", "1", "--pid-dir", "/other", "--start-timeout", "90")
    ]
    assert service_command(again, "1", Path("/other")) == again


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("amqp://me:secret@host/", "amqp://me:***@host/"),
        ("--url=amqps://me:p@ss:word@a,b/v", "--url=amqps://me:***@a,b/v"),
        ("amqp://:secret@host", "amqp://:***@host"),
        ("amqp://me@host/", "amqp://me@host/"),
        ("amqp://host:5672/", "amqp://host:5672/"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("shop.consumers:Mail", "shop.consumers:Mail"),
    ],
)
def test_passwords_are_masked(argument: str, shown: str) -> None:
    assert without_passwords(["x", argument]) == ("x", shown)
    assert has_password([argument]) == has_password([shown]) == (argument != shown)


def test_the_command_keeps_links_and_leaves_the_interpreter_to_a_scripts_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"
    (release / "bin").mkdir(parents=True)
    (tmp_path / "current").symlink_to(release)
    monkeypatch.chdir(release)
    monkeypatch.setenv("PWD", str(tmp_path / "current"))
    assert working_directory() == str(tmp_path / "current")

    monkeypatch.setattr(sys, "executable", f"{release}/bin/python")
    monkeypatch.setattr(sys, "orig_argv", ["bin/python", "-m", "outbox.consumers", "shop"])
    assert own_command() == (f"{tmp_path}/current/bin/python", "-m", "outbox.consumers", "shop")

    script = tmp_path / "current" / "bin" / "outbox-consume"
    script.write_text("#!/old/bin/python\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "orig_argv", ["/old/bin/python", str(script), "shop"])
    assert own_command() == (str(script), "shop")
    monkeypatch.setattr(sys, "orig_argv", ["/chosen/python", str(script), "shop"])
    assert own_command() == (f"{tmp_path}/current/bin/python", str(script), "shop")

    monkeypatch.setenv("PWD", "/somewhere/else")
    assert working_directory() == str(tmp_path / "current")  # as the path of the script says
    (release / "app").mkdir()
    monkeypatch.chdir(release / "app")
    assert working_directory() == str(tmp_path / "current" / "app")
    monkeypatch.setattr(sys, "orig_argv", [f"{release}/bin/python", "-m", "outbox.consumers"])
    assert working_directory() == str(release / "app")
