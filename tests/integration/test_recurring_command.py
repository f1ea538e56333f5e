"""``outbox tasks list --recurring`` and ``outbox tasks forget``, over each transport."""

from __future__ import annotations

import json

import pytest

from outbox import configure, exit_codes
from outbox.commands.cli import main
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.messages.delivery import dead_letter_queue
from tests import beating
from tests.places import Place
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


def test_recurring_tasks_are_listed_and_forgotten(
    place: Place,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUTBOX_URL", place.url)
    monkeypatch.setenv("OUTBOX_TASKS_QUEUE", name)
    for queue in (name, dead_letter_queue(name), f"{name}.every", f"{name}.every.beat"):
        place.will_clean_up(queue)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["tasks", *arguments])
        written = capsys.readouterr()
        return code, written.out, written.err

    code, out, err = run("list", "--recurring")
    assert (code, out) == (exit_codes.SUCCESS, "")
    assert "no recurring task" in err
    publisher = configure(place.url, exchange=place.exchange, tasks_queue=name)
    worker = Worker(load(["tests.beating"]), publisher=publisher, threads=1)
    beating.runs.clear()
    worker.start()
    wait_until(lambda: beating.runs)
    code, out, _ = run("list", "--recurring", "tests.beating", "--next", "2", "--json")
    shown = json.loads(out)
    assert (shown["task"], shown["queue"], shown["schedule"]) == ("beat", name, "every 1 s")
    assert len(shown["next"]) == 2
    assert shown["has_worker"]
    assert worker.stop(10)
    code, out, _ = run("list", "--recurring")
    assert out.startswith("beat  every 1 s  next 20")
    assert "  last 20" in out
    assert "no worker has it" in out
    assert run("forget", "beat") == (0, "forgot the recurring task beat\n", "")
    code, _, err = run("forget", "beat")
    assert code == exit_codes.UNFINISHED
    assert f"the queue {name!r} has no recurring task 'beat'" in err
