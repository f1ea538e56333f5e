"""When dead and running workers are replaced, without processes or clocks."""

from __future__ import annotations

import threading

import pytest

from outbox.consumers.command.limits import Limits, MemoryLimit, Recycling
from outbox.consumers.worker.worker_context import Quota
from outbox.service.health.restarts import Restarts
from outbox.system.resident_memory import resident_bytes

MIB = 2**20


def doubling(attempt: int) -> float:
    return 0.5 * 2.0**attempt


def test_the_wait_doubles_while_workers_die_young() -> None:
    restarts = Restarts(doubling)
    assert [restarts.died(1.0) for _ in range(5)] == [0.5, 1, 2, 4, 8]
    assert restarts.in_a_row == 5


def test_the_wait_is_bounded_and_has_jitter() -> None:
    restarts = Restarts()
    waits = [restarts.died(0.0) for _ in range(50)]
    assert 0.25 <= waits[0] <= 0.5
    assert all(15 <= wait <= 30 for wait in waits[10:])
    assert len(set(waits[10:])) > 1


def test_a_worker_that_has_lived_for_a_minute_resets_the_count() -> None:
    restarts = Restarts(doubling)
    for _ in range(4):
        restarts.died(59.9)
    assert restarts.died(60.0) == 0.5
    assert restarts.in_a_row == 1


def test_the_third_early_death_in_a_row_counts_as_a_crash_loop() -> None:
    restarts = Restarts(doubling)
    found = []
    for lived in (1.0, 1.0, 1.0, 61.0):
        restarts.died(lived)
        found.append(restarts.looping)
    assert found == [False, False, True, False]


def test_without_limits_nothing_is_recycled() -> None:
    assert not Limits()
    assert Recycling(Limits(), 0.0).reason(1e9, has_worked=True) is None


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_age_has_a_jitter_of_a_tenth_and_is_never_exceeded(fraction: float) -> None:
    recycling = Recycling(Limits(age=100.0), 1000.0, fraction=fraction)
    age = 100.0 - 10.0 * fraction
    assert recycling.reason(1000.0 + age - 0.01, has_worked=False) is None
    assert recycling.reason(1000.0 + age, has_worked=False) == "maximum age reached"


def test_memory_is_checked_once_a_second_and_after_the_first_message() -> None:
    sizes = [100 * MIB, 301 * MIB]
    recycling = Recycling(Limits(memory=MemoryLimit(300 * MIB)), 0.0, resident=lambda: sizes.pop(0))
    assert recycling.reason(0.0, has_worked=False) is None
    assert len(sizes) == 2  # its successor would use as much before its first message
    assert recycling.reason(0.2, has_worked=True) is None
    assert recycling.reason(1.1, has_worked=True) is None
    assert len(sizes) == 1
    assert recycling.reason(1.3, has_worked=True) == "memory limit exceeded (301 MiB)"


def test_several_looks_at_the_memory_decide_together() -> None:
    sizes = iter([400, 100, 100, 400, 100, 100, 400, 400])
    limits = Limits(memory=MemoryLimit(300 * MIB, 3, 5))
    recycling = Recycling(limits, 0.0, resident=lambda: next(sizes) * MIB)
    for look in range(7):
        assert recycling.reason(10.0 * look, has_worked=True) is None
        assert recycling.reason(10.0 * look + 9.9, has_worked=True) is None
        assert recycling.values(0.0) == {"memory": (recycling.size, 300 * MIB)}
    assert recycling.reason(70.0, has_worked=True) == "memory limit exceeded (400 MiB)"


def test_the_resident_size_follows_what_is_allocated() -> None:
    before = resident_bytes()
    block = b"x" * (64 * MIB)
    assert resident_bytes() - before > 32 * MIB
    del block


def test_no_more_messages_start_than_allowed_and_the_last_end_is_reported_once() -> None:
    quota = Quota(1000)
    begun, ended = [], []

    def work() -> None:
        while quota.begin():
            begun.append(1)
            ended.append(quota.end())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(begun), sum(ended)) == (1000, 1)
    assert quota.used_up


def test_a_quota_is_used_up_when_the_last_message_ends_not_when_it_starts() -> None:
    quota = Quota(1)
    assert quota.begin()
    assert not quota.begin()
    assert not quota.used_up
    assert quota.end()
    assert quota.used_up


def test_deaths_while_messages_ran_are_no_failed_starts_and_wait_two_seconds_at_most() -> None:
    restarts = Restarts(doubling)
    assert [restarts.died_with_messages(1.0) for _ in range(4)] == [0.5, 1, 2, 2]
    assert not restarts.looping
    assert restarts.died(1.0) == 0.5
    assert restarts.died_with_messages(60.0) == 0.5
