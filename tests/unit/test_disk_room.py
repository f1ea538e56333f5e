"""The room for events: workers' reserve and the log are left out, a small disk has a small one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from outbox.transports.database.database import Room
from outbox.transports.database.sqlite.disk_room import room_at

MB = 1024 * 1024


@pytest.mark.parametrize(
    ("size", "free", "log", "room"),
    [
        (1000, 76, 0, Room(20 * MB, 68 * MB // 3)),
        (1000, 76, 30, Room(10 * MB, 38 * MB // 3)),
        (1000, 16, 0, Room(0, 8 * MB // 3)),
        (1000, 8, 0, Room(-8 * MB // 3, 0)),
        (60, 36, 0, Room(10 * MB, 11 * MB)),
    ],
    ids=["plenty", "a log", "only the reserve", "half of the reserve", "a small disk"],
)
def test_the_room_for_events(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    free: int,
    log: int,
    room: Room,
) -> None:
    disk = SimpleNamespace(f_frsize=4096, f_blocks=size * MB // 4096, f_bavail=free * MB // 4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: disk)
    if log:
        with open(tmp_path / "outbox.db-wal", "wb") as file:
            file.truncate(log * MB)
    assert room_at(str(tmp_path / "outbox.db")) == room
    assert room.without(MB) == Room(room.for_new - MB, room.for_copies - MB)
