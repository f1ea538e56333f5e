"""What a dead process had begun is known to its siblings, and to their successors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from outbox.consumers.losses.begun_keeper import BegunKeeper
from outbox.consumers.losses.begun_table import BegunTable, Loss, key_of, message_of

PROGRAM = """
import sys, time
from outbox.consumers.losses.begun_table import BegunTable, key_of
table = BegunTable.inherited()
assert table is not None and BegunTable.inherited() is None
table.own(sys.argv[1])
ended = table.begin(key_of("q", "ended"))
table.begin(key_of("q", "running"), int(sys.argv[2]))
table.begin(key_of("q", "long" * 100))
table.end(ended)
table.end(table.begin(key_of("q", "running")))  # an attempt before
print("begun", flush=True)
sys.stdin.read()
table.close()
"""


@pytest.fixture
def keeper() -> Iterator[BegunKeeper]:
    found = BegunKeeper(2, 8)
    yield found
    found.close()


@pytest.fixture
def sibling(keeper: BegunKeeper, monkeypatch: pytest.MonkeyPatch) -> BegunTable:
    return table_of(keeper, monkeypatch)


def table_of(keeper: BegunKeeper, monkeypatch: pytest.MonkeyPatch) -> BegunTable:
    region = keeper.take()
    assert region is not None
    for name, value in keeper.variables(region).items():
        monkeypatch.setenv(name, value)
    table = BegunTable.inherited()
    assert table is not None
    return table


@contextmanager
def worker(
    keeper: BegunKeeper, owner: str = "", losses: int = 0
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    region = keeper.take()
    assert region is not None
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, owner, str(losses)],
        env={**os.environ, **keeper.variables(region)},
        pass_fds=[keeper.descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process, region
        process.kill()


def test_siblings_know_what_ran_in_a_dead_process_before_and_after_the_parent_has_noticed(
    keeper: BegunKeeper, sibling: BegunTable
) -> None:
    running, ended = key_of("q", "running"), key_of("q", "ended")
    with worker(keeper, losses=1) as (process, region):
        assert sibling.loss_of(running) is None  # it lives: its link may be lost, not the message
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet waited for
        assert sibling.loss_of(running) == Loss(2, None)
        assert sibling.loss_of(ended) == Loss(0, None)  # it may not have been acked
        assert sibling.loss_of(key_of("other", "running")) is None
        lost = keeper.free(region, -signal.SIGKILL)
    assert set(lost) == {"'running' of 'q'", "one with a long id"}
    assert sibling.loss_of(running) == Loss(2, -9)
    assert sibling.loss_of(key_of("q", "long" * 100)) == Loss(1, -9)
    assert sibling.loss_of(ended) == Loss(0, -9)
    sibling.forget(running)
    assert sibling.loss_of(running) is None


def test_the_losses_of_a_message_are_counted_in_one_grave(
    keeper: BegunKeeper, sibling: BegunTable
) -> None:
    for losses in range(3):
        with worker(keeper, losses=losses) as (_, region):
            pass
        keeper.free(region, 1)
        assert sibling.loss_of(key_of("q", "running")) == Loss(losses + 1, 1)


def test_the_losses_of_what_has_ended_are_kept_until_it_is_acked(
    keeper: BegunKeeper, sibling: BegunTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a dead letter whose process died before its confirm would be run again."""
    table = table_of(keeper, monkeypatch)
    region = table._region
    table.end(table.begin(key_of("q", "dead"), 3))
    assert keeper.free(region, 1) == []
    assert sibling.loss_of(key_of("q", "dead")) == Loss(3, 1)


def test_what_a_process_gave_up_in_order_is_no_loss(
    keeper: BegunKeeper, sibling: BegunTable
) -> None:
    with worker(keeper) as (process, region):
        process.communicate("")
    assert sibling.loss_of(key_of("q", "running")) is None
    assert keeper.free(region, 0) == []


def test_what_ran_in_a_process_that_the_parent_killed_is_no_loss(
    keeper: BegunKeeper, sibling: BegunTable
) -> None:
    with worker(keeper) as (process, region):
        keeper.spare(region)
        process.kill()
        process.wait()
        assert sibling.loss_of(key_of("q", "running")) is None
    assert keeper.free(region, -9) == []
    assert sibling.loss_of(key_of("q", "running")) is None


def test_owners_of_dead_processes_are_handed_out_once_to_each_process(
    keeper: BegunKeeper, sibling: BegunTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sibling.dead_owners() == []
    for owner in ("a", "b"):
        with worker(keeper, owner) as (_, region):
            pass
        keeper.free(region, 1)
    assert sibling.dead_owners() == ["a", "b"]
    assert sibling.dead_owners() == []
    assert table_of(keeper, monkeypatch).dead_owners() == ["a", "b"]


def test_a_message_without_a_free_place_runs_unnoted(sibling: BegunTable) -> None:
    places = [sibling.begin(key_of("q", str(n))) for n in range(9)]
    assert len(set(places)) == 9
    assert -1 in places
    for place in places:
        sibling.end(place)
    assert sibling.begin(key_of("q", "next")) >= 0


def test_regions_and_graves_are_bounded(keeper: BegunKeeper) -> None:
    regions = []
    while (region := keeper.take()) is not None:
        regions.append(region)
    assert len(regions) == 12
    keeper.free(regions[0], 0)
    assert keeper.take() == regions[0]


def test_the_oldest_losses_are_forgotten_first(
    keeper: BegunKeeper, sibling: BegunTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(keeper, monkeypatch)
    region = table._region
    for number in range(1025):
        place = table.begin(key_of("q", f"m{number}"))
        keeper.free(region, 1)
        assert keeper.take() == region
        table.end(place)
    assert sibling.loss_of(key_of("q", "m0")) is None
    assert sibling.loss_of(key_of("q", "m1")) == Loss(1, 1)
    assert sibling.loss_of(key_of("q", "m1024")) == Loss(1, 1)


def test_keys_of_any_length_fit_and_differ() -> None:
    keys = {key_of("q" * 250, f"{n}" * 200) for n in range(10)} | {key_of("q", ""), key_of("", "q")}
    assert len(keys) == 12
    assert max(map(len, keys)) <= 124
    assert message_of(key_of("queue", "id")) == "'id' of 'queue'"


def test_threads_share_the_places(sibling: BegunTable) -> None:
    held: set[int] = set()
    wrong: list[int] = []
    end = time.monotonic() + 0.5

    def run(number: int) -> None:
        while time.monotonic() < end:
            place = sibling.begin(key_of("q", str(number)))
            if place in held:
                wrong.append(place)
            held.add(place)
            held.discard(place)
            sibling.end(place)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not wrong
    assert len({sibling.begin(key_of("q", str(n))) for n in range(8)} - {-1}) == 8
