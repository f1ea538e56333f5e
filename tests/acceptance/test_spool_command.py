"""``outbox spool``: what it shows, publishes and recovers."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outbox import Event, Publisher
from outbox.commands.cli import main
from outbox.spool import inspection
from outbox.spool.spool_file import SpoolFile, open_file
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.commands import outbox_command

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h
NOWHERE = "amqp://guest:guest@127.0.0.1:1/"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def left(folder: Path, *names: str, url: str = NOWHERE, exchange: str = "shop") -> Path:
    """Have a publisher leave events in a file; return it."""
    before = set(folder.iterdir()) if folder.exists() else set()
    with Publisher(url, spool=folder, exchange=exchange) as publisher:
        publisher.publish(
            [Event(id=name, target="order", exchange=exchange, body=b"{}") for name in names]
        )
    (path,) = [path for path in set(folder.iterdir()) - before if path.suffix == ".spool"]
    return path


def run(*arguments: str | Path) -> int:
    return main(["spool", *map(str, arguments)])


def test_status_shows_what_each_file_holds_and_who_has_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = left(folder, "a", "b")
    program = f"""
import os
from outbox import Event, Publisher
publisher = Publisher({NOWHERE!r}, spool={str(folder)!r})
publisher.publish([Event(id="c", target="order", exchange="shop", body=b"{{}}")])
print(os.getpid(), flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        pid = writer.stdout.readline().strip()
        newer = left(folder, "d")
        connection = sqlite3.connect(newer)
        connection.execute("PRAGMA user_version = 7")
        connection.close()
        damaged = left(folder, "e")
        damaged.write_bytes(b"x" * 10_000)
        assert run("status", "--spool", folder) == 0
        text = capsys.readouterr().out
        assert f"{ended.name}: 2 events, left by an ended process, the oldest " in text
        assert f": 1 event, process {pid}, the oldest " in text
        assert f"{newer.name}: of a newer version of outbox" in text
        assert f"{damaged.name}: unreadable: " in text
        assert text.endswith(f"{folder}: 3 events\n")
        assert run("status", "--spool", folder, "--json") == 0
        output = capsys.readouterr()
        rows = {Path(row["file"]).name: row for row in map(json.loads, output.out.splitlines())}
        assert rows[ended.name]["events"] == 2
        assert rows[ended.name]["held_by"] is None
        assert [row["held_by"] for row in rows.values() if row["held_by"]] == [f"process {pid}"]
        assert {row["state"] for row in rows.values()} == {"readable", "newer", "unreadable"}
        assert output.err == f"{folder}: 3 events\n"
        assert (
            SpoolFile.adopt(next(folder / name for name in rows if rows[name]["held_by"])) is None
        )
        writer.communicate("\n")


def test_status_shows_the_other_files_beside_those_whose_rows_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left(folder, "a", "b")
    odd = left(folder, "c")
    with contextlib.closing(sqlite3.connect(odd)) as connection, connection:
        connection.execute("UPDATE event SET occurred_at = x'00'")
    cut = left(folder, *(f"{number}" for number in range(500)))
    cut.write_bytes(cut.read_bytes()[:5000])
    assert run("status", "--spool", folder) == 0
    text = capsys.readouterr().out
    assert f"{whole.name}: 2 events" in text
    assert f"{odd.name}: unreadable: " in text
    assert f"{cut.name}: unreadable: " in text


def test_status_creates_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[str, tuple[int, bytes]]:
        return {
            path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()
        }

    left(folder, "a")
    before = contents()
    assert run("status", "--spool", folder) == 0
    assert ": 1 event, " in capsys.readouterr().out
    assert contents() == before


def _drop_override() -> None:
    """Have root obey the modes of files, in a program that is executed next."""
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE)


def test_status_reads_a_folder_that_cannot_be_written(folder: Path) -> None:
    path = left(folder, "a", "b")
    folder.chmod(0o500)
    try:
        done = subprocess.run(
            outbox_command("spool", "status", "--spool", str(folder)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=_drop_override,
        )
    finally:
        folder.chmod(0o700)
    assert done.stdout.startswith(f"{path.name}: 2 events"), done.stdout + done.stderr


def test_a_look_at_a_file_that_is_taken_meanwhile_shows_what_it_holds_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left(folder, "a")
    file = SpoolFile.adopt(path)
    assert file is not None
    file.close()

    def open_and_take(*arguments: Any, **options: Any) -> sqlite3.Connection:
        monkeypatch.undo()
        connection = open_file(*arguments, **options)
        connection.execute("SELECT count(*) FROM event").fetchone()
        taken.execute(
            "INSERT INTO event SELECT seq + 1, 'b', exchange, type, payload, "
            "content_type, headers, key, priority, deliver_at, occurred_at, unroutable, size "
            "FROM event"
        )
        return connection

    taken = open_file(path, "rw")
    monkeypatch.setattr(inspection, "open_file", open_and_take)
    assert inspection.look_at(path).events == 2
    taken.close()


def test_drain_publishes_what_ended_processes_have_left_for_this_broker(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    own = left(folder, "a", "b", url=proxy.url, exchange=name)
    other = left(folder, "c", exchange=name)
    monkeypatch.setenv("OUTBOX_URL", proxy.url)
    monkeypatch.setenv("OUTBOX_EXCHANGE", name)
    monkeypatch.setenv("OUTBOX_SPOOL", str(folder))
    monkeypatch.setenv("OUTBOX_DRAIN_TIMEOUT", "0")
    assert run("drain") == 7
    assert own.exists()
    proxy.heal()
    with Publisher(NOWHERE, exchange=name) as publisher:
        publisher.publish([Event(id="mine", target="order", exchange=name, body=b"{}")])
        assert run("drain") == 1
        output = capsys.readouterr()
        assert output.out == "2 events published\n"
        assert f"not drained: {other.name}: its events are for another broker" in output.err
        assert not own.exists()
    assert run("drain", other) == 0
    assert capsys.readouterr().out == "1 event published\n"
    assert [message.id for message in inspector.messages(queue, 3)] == ["a", "b", "c"]


def test_drain_names_the_processes_that_have_files_and_leaves_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = left(folder, "a")
    program = f"""
import sys
from pathlib import Path
from outbox.spool.spool_file import SpoolFile
file = SpoolFile.adopt(Path({str(path)!r}))
print("ready", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert run("drain", "--url", NOWHERE, "--spool", folder) == 0
        output = capsys.readouterr()
        named = f"not drained: {path.name}: process {holder.pid} has it"
        assert named in output.err.replace("'", "")
        assert output.out == "0 events published\n"
        holder.communicate("\n")
    assert path.exists()


def test_salvage_recovers_what_can_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"event-{number:04}" for number in range(2000)]
    path = left(folder, *names)
    with open(path, "r+b") as file:  # damage some pages in the middle
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\0" * 8192)
    bad = path.with_name(f"{path.name}.bad-20261127T140000")
    path.rename(bad)
    assert run("salvage", bad) == 0
    output = capsys.readouterr().out
    (new,) = [path for path in folder.iterdir() if path.suffix == ".spool"]
    assert f"copied to {new}" in output
    salvaged = SpoolFile.adopt(new)
    assert salvaged is not None
    found = [each.event.id for each in salvaged.read(10_000, 1 << 30)]
    salvaged.remove()
    assert found == [name for name in names if name in set(found)]
    assert 1900 < len(found) < 2000
    assert f"{2000 - len(found)} known to be missing" in output
    bad.write_bytes(b"nothing")
    assert run("salvage", bad) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["status"], "no spool is named: give --spool FOLDER, or set OUTBOX_SPOOL"),
        (["status", "--spool", "/nowhere"], "there is no folder /nowhere"),
        (["drain", "--url", NOWHERE, "/nowhere/x"], "there is no file /nowhere/x"),
        (["salvage", "/nowhere/x"], "/nowhere/x is no file of a spool, or doesn't exist"),
    ],
)
def test_wrong_usage_is_named_in_one_line(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"outbox: {why}\n"
