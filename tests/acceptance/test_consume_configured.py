"""``outbox-consume`` of an application that calls ``configure()`` itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.messages.delivery import dead_letter_queue
from tests.places import SQLitePlace, events_for
from tests.waiting import wait_until

MODULE = """
import pathlib
import outbox
from outbox import enqueue_event, publish
from outbox.consumers import consumer

outbox.configure("sqlite:///other.db", exchange="theirs")

@consumer("jobs")
def jobs(event):
    with open("runs", "a") as runs:
        runs.write(f"{event.payload['n']}\\n")
    if event.payload["n"] == 0:
        raise ValueError("no")
    if event.payload["n"] == 1:
        outbox.configure("sqlite:///third.db", exchange="theirs")
    enqueue_event({"of": event.payload["n"]}, "done")
    publish()
"""


@pytest.mark.parametrize("isolated", [False, True], ids=["threads", "subprocesses"])
@pytest.mark.slow
def test_the_applications_settings_count_and_the_commands_url_has_precedence(
    tmp_path: Path, isolated: bool
) -> None:
    (tmp_path / "work.py").write_text(MODULE)
    place = SQLitePlace(str(tmp_path / "ours.db"), "theirs")
    place.bind("done", "theirs", "done")
    isolation = ["--isolate", "process"] if isolated else []
    child = subprocess.Popen(
        [sys.executable, "-m", "outbox.consumers", "work", "--url", place.url, *isolation],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        bound = "SELECT count(*) FROM outbox_bindings WHERE queue = 'jobs' AND exchange = 'theirs'"
        wait_until(lambda: place.execute(bound)[0][0] == 1, 30)
        with place.publisher() as publisher:
            assert publisher.publish(events_for(publisher, ["jobs"] * 4)).ok
        wait_until(lambda: place.count("done") == 3, 30)
        wait_until(lambda: place.count(dead_letter_queue("jobs")) == 1, 30)
    finally:
        child.terminate()
        _, log = child.communicate(timeout=30)
    assert child.returncode == 0, log
    assert sorted((tmp_path / "runs").read_text().split()) == ["0", "1", "2", "3"]
    assert place.count("jobs") == 0
    assert not (tmp_path / "other.db").exists()
    assert not (tmp_path / "third.db").exists()
