"""The checker finds what must be found, and nothing else."""

from __future__ import annotations

import importlib.util
import itertools
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proving import faults
from proving.__main__ import seconds_of_faults
from proving.bounds import BOUNDS
from proving.bugs import BUGS
from proving.checker import MAX_ATTEMPTS, check
from proving.ground import HABITS, KINDS
from proving.history import Journal, Record, process_of, read
from proving.pace import Pace
from proving.processes import Server
from proving.programs.interrupted import TimeLimit, until_alarm


def record(what: str, by: str = "script-1", **facts: Any) -> Record:
    return Record(0.0, by, what, facts)


def intent(key: str, unit: str = "u", **facts: Any) -> Record:
    return record("intent", key=key, id=f"id of {key}", unit=unit, **facts)


def delivery(key: str, where: str = "ledger", event_id: str | None = None) -> Record:
    return record("delivery", "witness", key=key, id=event_id or f"id of {key}", where=where)


COMMIT = record("commit", unit="u")
ROLLBACK = record("rollback", unit="u")


def test_a_committed_event_that_was_delivered_is_fine() -> None:
    verdict = check([intent("a"), COMMIT, delivery("a")])
    assert verdict.ok
    assert verdict.counts["delivered"] == 1


def test_a_committed_event_that_was_never_delivered_is_lost() -> None:
    assert check([intent("a"), COMMIT]).lost == ["a was committed and never came out"]


def test_an_event_only_in_the_memory_of_a_killed_process_is_excused() -> None:
    killed = record("killed", process="script-1")
    assert check([intent("a"), COMMIT, killed]).ok
    confirmed = record("confirm", keys=["a"])
    assert check([intent("a"), COMMIT, confirmed, killed]).lost
    other = record("killed", process="script-2")
    assert check([intent("a"), COMMIT, other]).lost


@pytest.mark.parametrize("end", [[ROLLBACK], []])
def test_an_uncommitted_event_that_was_delivered_is_a_phantom(end: list[Record]) -> None:
    assert check([intent("a"), *end, delivery("a")]).phantom
    assert check([intent("a"), *end]).ok


UNSURE = record("unsure", unit="u")


def test_an_interrupted_unit_comes_out_as_a_whole_or_not_at_all() -> None:
    both = [UNSURE, intent("a"), intent("b")]
    assert check(both).ok
    assert check([*both, delivery("a"), delivery("b")]).ok
    assert check([*both, delivery("a")]).torn == ["u came out without ['b']"]
    assert check([*both, delivery("a"), record("killed", process="script-1")]).ok


def test_a_late_event_is_owed_if_it_was_accepted_and_a_phantom_if_it_was_refused() -> None:
    late = [UNSURE, intent("a")]
    assert check([*late, COMMIT]).lost
    assert check([*late, COMMIT, delivery("a")]).ok
    assert check([*late, ROLLBACK]).ok
    assert check([*late, ROLLBACK, delivery("a")]).phantom


def test_an_interrupted_event_may_have_the_effect_of_its_delivery() -> None:
    begun = [UNSURE, intent("a", effect=True)]
    assert check(begun).ok
    assert check([*begun, delivery("a")]).lost == ["a has no effect"]
    assert check([*begun, delivery("a"), effect("a")]).ok


def test_an_event_comes_out_where_its_address_leads() -> None:
    def came(where: str, **facts: Any) -> list[str]:
        return check([intent("a", **facts), COMMIT, delivery("a", where)]).misplaced

    assert not came("ledger", routable=True)
    assert came("parked", routable=True)
    assert not came("parked")
    assert not came("parked", only="parked")
    assert came("ledger", only="parked")


def test_a_second_delivery_needs_a_fault_where_none_is_expected() -> None:
    twice = [intent("a", once=True), COMMIT, delivery("a"), delivery("a")]
    assert check(twice).repeated == ["a came 2 times"]
    assert check([*twice, record("fault", "driver", name="cut")]).ok
    assert check([*twice, record("killed", "driver", process="relay-1")]).ok


def test_an_event_comes_out_soon_unless_something_goes_wrong() -> None:
    def came(at: float, **facts: Any) -> list[Record]:
        return [
            intent("a", **facts),
            COMMIT,
            Record(at, "witness", "delivery", delivery("a").facts),
        ]

    assert check(came(6.5, routable=True)).delayed == ["a came 6.5 s after its commit"]
    assert check([*came(6.5, routable=True), record("fault", "driver", name="cut")]).ok
    assert check(came(4.0, routable=True)).ok
    assert check(came(6.5, routable=True, stored=True)).ok


def test_a_delayed_event_does_not_come_out_before_its_time() -> None:
    def came(at: float) -> list[str]:
        arrived = Record(at, "witness", "delivery", delivery("a").facts)
        return check([intent("a", not_before=5.0), COMMIT, arrived]).early

    assert came(4.5) == ["a came out 0.500 s too early"]
    assert not came(5.0)


def test_a_program_that_does_not_end_is_found() -> None:
    stuck = record("astray", "driver", process="script", how="did not end within 60 s")
    assert check([intent("a"), COMMIT, delivery("a"), stuck]).astray == [
        "script did not end within 60 s"
    ]


def test_a_process_id_that_is_given_again_names_another_journal(tmp_path: Path) -> None:
    first, second = (Journal.of_process(tmp_path, "script", 7) for _ in range(2))
    assert first.by == "script-7" != second.by
    assert process_of(second.by) == process_of(first.by) == "script-7"
    second.write("commit", unit="u")
    assert [each.by for each in read(tmp_path)] == [second.by]


def test_a_journal_may_be_written_by_a_signal_handler_at_any_moment(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "one")
    count = 0

    def write(*_: object) -> None:
        nonlocal count
        count += 1
        journal.write("commit", unit=f"signal-{count}")

    before = signal.signal(signal.SIGALRM, write)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for number in range(3000):
            journal.write("commit", unit=f"main-{number}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count
    assert len(read(tmp_path)) == 3000 + count


def test_an_action_is_interrupted_or_finished() -> None:
    def limit(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, limit)
    try:
        assert not until_alarm(0.01, lambda: time.sleep(5))
        assert until_alarm(5, lambda: None)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_event_that_was_never_enqueued_is_a_phantom() -> None:
    assert check([delivery("a")]).phantom
    assert check([delivery("a>")]).phantom


def test_a_second_delivery_must_have_the_same_id() -> None:
    twice = [intent("a"), COMMIT, delivery("a"), delivery("a")]
    assert check(twice).ok
    assert check(twice).counts["second deliveries with the same id"] == 1
    assert check([*twice, delivery("a", event_id="another")]).renamed
    assert check([intent("a"), COMMIT, delivery("a", event_id="another")]).renamed


def test_order_is_checked_within_a_lane_and_for_first_deliveries() -> None:
    intents = [intent(f"{lane}{n}", lane=lane, seq=n) for lane in "ab" for n in (1, 2)]
    good = ["a1", "b1", "b2", "a1", "a2", "b1"]
    assert check([*intents, COMMIT, *map(delivery, good)]).ok
    bad = ["a1", "b2", "b1", "a2"]
    found = check([*intents, COMMIT, *map(delivery, bad)])
    assert found.disordered == ["b1 (number 1 of b) after 2"]


def test_a_consumer_with_a_follow_on_must_have_published_it_once() -> None:
    delivered = [intent("a", work="follow"), COMMIT, delivery("a")]
    assert check(delivered).lost
    assert check([*delivered, delivery("a>")]).ok
    assert check([*delivered, delivery("a>"), delivery("a>", event_id="another")]).renamed
    assert check([*delivered, delivery("a>"), delivery("a", "dead")]).phantom


def test_a_failing_consumer_must_have_published_nothing_and_left_a_dead_letter() -> None:
    delivered = [intent("a", work="fail"), COMMIT, delivery("a")]
    assert check(delivered).lost
    assert check([*delivered, delivery("a", "dead")]).ok
    assert check([*delivered, delivery("a", "dead"), delivery("a>")]).phantom


@pytest.mark.parametrize("work", ["retry", "slow"])
def test_a_consumer_that_fails_at_first_must_have_published_eventually(work: str) -> None:
    delivered = [intent("a", work=work), COMMIT, delivery("a")]
    assert check(delivered).lost
    assert check([*delivered, delivery("a>")]).ok
    assert check([*delivered, delivery("a>"), delivery("a", "dead")]).phantom


def effect(key: str) -> Record:
    return record("effect", "effects", key=key, id=f"id of {key}")


def test_an_effect_must_happen_exactly_once() -> None:
    delivered = [intent("a", effect=True), COMMIT, delivery("a")]
    assert check(delivered).lost == ["a has no effect"]
    assert check([*delivered, effect("a")]).ok
    assert check([*delivered, effect("a"), effect("a")]).twice == ["a was done 2 times"]


@pytest.mark.parametrize("end", [[ROLLBACK], [COMMIT, delivery("a"), delivery("a", "dead")]])
def test_a_rolled_back_or_failed_message_must_have_no_effect(end: list[Record]) -> None:
    begun = [intent("a", effect=True, work="fail"), *end]
    assert check(begun).ok
    assert check([*begun, effect("a")]).phantom


def attempt(what: str, at: float, number: int, **facts: Any) -> Record:
    return Record(at, "worker-1", what, {"key": "a", "attempt": number, **facts})


def failed(at: float, number: int, *, redelivered: bool = False) -> Record:
    return attempt("failed", at, number, delay=1.0, redelivered=redelivered)


def test_no_attempt_begins_before_its_delay_is_over() -> None:
    first = [attempt("handling", 5.0, 1), failed(5.1, 1)]
    assert not check([*first, attempt("handling", 6.1, 2)]).early
    assert check([*first, attempt("handling", 6.0, 2)]).early
    # The first failure of an attempt that was made twice decides.
    assert not check([*first, failed(5.5, 1), attempt("handling", 6.2, 2)]).early


def test_attempts_are_limited_and_counted() -> None:
    assert check([attempt("handling", 5.0, MAX_ATTEMPTS + 1)]).endless
    again = [failed(5.0, 1), failed(6.0, 1)]
    assert check(again).endless == ["a failed 2 times as if it were the first"]
    assert not check([failed(5.0, 1), failed(6.0, 1, redelivered=True)]).endless
    assert not check([*again, delivery("a"), delivery("a")]).endless  # it was published twice
    assert not check([*again, record("fault", "driver", name="kill broker")]).endless


def test_a_dead_letter_reports_all_attempts() -> None:
    delivered = [intent("a", work="fail"), COMMIT, delivery("a")]

    def dead(attempts: int) -> Record:
        return record("delivery", key="a", id="id of a", where="dead", attempts=attempts)

    assert check([*delivered, dead(MAX_ATTEMPTS)]).ok
    assert check([*delivered, dead(1)]).endless == ["a was given up after 1 attempts"]


def test_a_history_is_read_up_to_a_torn_line(tmp_path: Path) -> None:
    Journal(tmp_path, "one").write("commit", unit="u")
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write('{"at": 1, "what": "com')
    [found] = read(tmp_path)
    assert (found.by, found.what, found.facts) == ("one", "commit", {"unit": "u"})


def test_a_schedule_is_the_same_for_the_same_seed_and_mends_everything_in_time() -> None:
    def planned(seed: int) -> list[faults.Planned]:
        return faults.plan(random.Random(seed), 60, faults.FAULTS, (0.5, 3))

    assert planned(1) == planned(1) != planned(2)
    assert all(one.at <= one.until <= 60 for one in planned(1))
    for track in {fault.track for fault in faults.FAULTS}:
        of_track = [one for one in planned(1) if one.fault.track == track]
        for earlier, later in itertools.pairwise(of_track):
            assert earlier.until < later.at


def test_two_minutes_leave_time_for_every_fault() -> None:
    seconds = seconds_of_faults(2)
    for seed in range(20):
        planned = faults.plan(random.Random(seed), seconds, faults.FAULTS, (0.5, 3))
        assert {one.fault for one in planned} == set(faults.FAULTS)


def test_a_writer_slowed_down_by_another_process_pauses_longer_until_released(
    tmp_path: Path,
) -> None:
    writer, driver = Pace(tmp_path, "script"), Pace(tmp_path, "script")
    assert writer.factor == 1
    driver.set(slow=True)
    driver.set(slow=True)
    assert writer.factor > 1
    assert Pace(tmp_path, "durable").factor == 1
    driver.set(slow=False)
    driver.set(slow=False)
    assert writer.factor == 1


def test_every_planted_bug_names_faults_that_exist() -> None:
    for bug in BUGS:
        assert len(faults.named(bug.faults)) == len(bug.faults)
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 8


def call(key: str = "a", task: str = "kept", **facts: Any) -> Record:
    return intent(key, task=task, work="follow", **facts)


def run(key: str = "a", at: float = 0.0) -> list[Record]:
    return [replace(delivery(key, "run"), at=at), delivery(f"{key}>", "run")]


def result(status: str, value: str | None = '"a"') -> Record:
    return record("result", "results", id="id of a", status=status, value=value, error=None)


def test_a_task_that_has_run_leaves_its_value() -> None:
    done = [call(), COMMIT, *run()]
    assert check([*done, result("succeeded")]).ok
    for wrong in (result("running"), result("failed"), result("succeeded", '"b"')):
        assert len(check([*done, wrong]).unsettled) == 1
    assert check(done).unsettled == ["a is None, not succeeded"]
    assert check([call(task="unkept"), COMMIT, *run()]).ok
    assert check([call(), ROLLBACK, result("running")]).unsettled


def test_a_value_is_lost_only_where_the_task_commits_and_a_worker_was_killed() -> None:
    lost = result("succeeded", None)
    killed = record("killed", process="calls-1")
    for task, more, is_fine in (
        ("committing", [killed], True),
        ("committing", [], False),
        ("kept", [killed], False),
    ):
        assert check([call(task=task), COMMIT, *run(), lost, *more]).ok is is_fine


def test_a_session_holds_the_effect_and_the_result_or_neither() -> None:
    effect = record("effect", "effects", key="a", id="id of a")
    done = [call(task="in_session"), COMMIT, *run()]
    assert check([*done, effect, result("succeeded")]).ok
    assert check([*done, result("succeeded")]).unsettled == ["a is succeeded, its effect missing"]


def test_a_cancelled_task_does_not_run() -> None:
    cancelling = record("cancelling", key="a")
    cancelled = record("cancelled", key="a", since=1.0)
    row = result("cancelled", None)
    called = [call(), COMMIT, record("confirm", keys=["a"])]
    assert check([*called, cancelling, cancelled, row]).ok
    assert check([*called, cancelling, row]).ok  # the caller was killed meanwhile
    assert check([*called, cancelling]).lost
    assert check([*called, cancelling, cancelled, row, *run(at=2.0)]).phantom == [
        "a ran after it was cancelled"
    ]


def test_every_planted_bug_names_programs_and_habits_that_exist() -> None:
    for bug in BUGS:
        assert set(bug.kinds) <= {*KINDS, "database"}
        assert set(bug.habits) <= {*HABITS, "notify"}
        assert bug.found_as in check([]).findings


def test_every_habit_exposes_a_bug() -> None:
    assert {habit for bug in BUGS for habit in bug.habits} >= set(HABITS)


def test_every_bound_is_a_module() -> None:
    for module, *_ in BOUNDS:
        assert importlib.util.find_spec(module) is not None


def test_a_child_that_its_server_has_killed_counts_as_killed(tmp_path: Path) -> None:
    server = Server("prefork", ["nothing"], {}, tmp_path, children=1)
    journal = Journal(tmp_path, "driver")
    server.terminate(journal)  # without a log
    assert read(tmp_path) == []
    (tmp_path / "prefork.log").write_text(
        "worker: Warm shutdown (MainProcess)\n[2026-11-27 04:13:50,043: ERROR/MainProcess] "
        "Process 'ForkPoolWorker-37' pid:24764 exited with 'signal 9 (SIGKILL)'\n"
    )
    server.terminate(journal)
    [killed] = read(tmp_path)
    assert (killed.what, killed.facts["process"]) == ("killed", "prefork-24764")
