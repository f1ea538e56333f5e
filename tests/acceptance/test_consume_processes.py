"""``outbox-consume -p`` as its users run it: workers that die, leak, are replaced and reloaded."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.messages.delivery import dead_letter_queue
from outbox.system.signals import BURST
from tests.consuming import Command
from tests.places import Place, RabbitMQPlace, SQLitePlace
from tests.waiting import wait_until


@pytest.fixture
def anywhere(place: Place, tmp_path: Path, name: str) -> Iterator[Command]:
    """The command on either transport."""
    found = Command(tmp_path, place, name)
    yield found
    found.close()


@pytest.fixture
def command(tmp_path: Path, name: str) -> Iterator[Command]:
    """The command on a file, for what has nothing to do with the transport."""
    found = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    yield found
    found.close()


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.hazard("G7")
def test_a_killed_worker_is_replaced_and_its_message_is_handled(anywhere: Command) -> None:
    anywhere.start("-p", "2", "-t", "1")
    anywhere.consuming(2)
    [message] = anywhere.publish("sleep 1.5")
    anywhere.wait_done(1, "began")
    [(_, victim)] = anywhere.did("began")
    os.kill(victim, signal.SIGKILL)
    [wait] = anywhere.wait_for(
        rf"\(process {victim}\) was killed by SIGKILL after [\d.]+ s; "
        r"starting another in ([\d.]+) s"
    )
    assert float(wait) <= 0.5
    assert len(anywhere.consuming(3)) == 3
    if isinstance(anywhere.place, RabbitMQPlace):  # on a file it comes when its lease has ended
        anywhere.wait_done(1)
        assert anywhere.did()[0][0] == message
    assert anywhere.stop() == exit_codes.SUCCESS, anywhere.text()


@pytest.mark.slow
def test_the_parent_neither_imports_the_application_nor_connects(anywhere: Command) -> None:
    anywhere.start("-p", "2")
    workers = anywhere.consuming(2)
    anywhere.publish("nothing")
    anywhere.wait_done(1)
    assert sorted(pid for _, pid in anywhere.did("imported")) == sorted(workers)
    folder = f"/proc/{anywhere.process.pid}/fd"
    opened = [os.readlink(f"{folder}/{one}") for one in os.listdir(folder)]
    assert not [one for one in opened if one.startswith("socket:") or "outbox.db" in one]
    assert anywhere.stop() == exit_codes.SUCCESS


@pytest.mark.hazard("G7")
@pytest.mark.slow
def test_a_crash_loop_of_one_worker_is_slowed_down_and_reported(command: Command) -> None:
    command.write("raise RuntimeError('broken')")
    command.start("-p", "3")
    found = command.wait_for(
        r"worker (\d) \(process \d+\) ended with exit code 1 after [\d.]+ s[^;]*; "
        r"starting another in ([\d.]+) s",
        3,
    )
    assert {number for number, _ in found} == {"1"}  # the others are not even tried
    waits = [float(wait) for _, wait in found]
    for wait, longest in zip(waits, (0.5, 1, 2), strict=False):
        assert longest / 2 - 0.05 <= wait <= longest
    assert len(command.wait_for(r"\(3 in a row\); starting another in")) == 1
    assert command.text().count('"exc_info"') == len(command.workers())
    begin = time.monotonic()
    assert command.stop() == exit_codes.SUCCESS
    assert time.monotonic() - begin < 2


@pytest.mark.hazard("G7")
@pytest.mark.slow
def test_when_the_parent_is_killed_workers_finish_running_messages_and_exit(
    anywhere: Command,
) -> None:
    anywhere.start("-p", "2", "-t", "1")
    workers = anywhere.consuming(2)
    messages = anywhere.publish("sleep 0.7", "sleep 0.7")
    anywhere.wait_done(2, "began")
    anywhere.process.kill()
    wait_until(lambda: not any(map(is_alive, workers)), 15)
    assert sorted(message for message, _ in anywhere.did()) == sorted(messages)
    assert anywhere.left() == 0
    assert "the parent process has died; stopping" in anywhere.text()


@pytest.mark.hazard("G3")
def test_sigterm_under_load_settles_running_messages_and_gives_back_the_rest(
    anywhere: Command,
) -> None:
    anywhere.start("-p", "2", "-t", "4", "--prefetch", "4")
    anywhere.consuming(2)
    messages = anywhere.publish(*["sleep 0.3"] * 40)
    anywhere.wait_done(10)
    begin = time.monotonic()
    assert anywhere.stop() == exit_codes.SUCCESS, anywhere.text()
    assert time.monotonic() - begin < 8
    done = Counter(message for message, _ in anywhere.did())
    assert set(done.values()) == {1}
    wait_until(lambda: len(done) + anywhere.left() == len(messages))
    assert anywhere.left() > 0
    assert anywhere.place.count(dead_letter_queue(anywhere.queue)) == 0


@pytest.mark.hazard("G7")
def test_a_signal_to_the_whole_group_counts_once_for_every_worker(command: Command) -> None:
    command.start("-p", "2", "-t", "1")
    command.consuming(2)
    command.publish("sleep 1")
    command.wait_done(1, "began")
    os.killpg(command.process.pid, signal.SIGINT)  # as Ctrl-C does
    assert command.process.wait(15) == exit_codes.SUCCESS
    assert len(command.did()) == 1
    assert command.left() == 0


@pytest.mark.slow
def test_a_second_signal_ends_all_workers_at_once(command: Command) -> None:
    command.start("-p", "2", "-t", "1")
    workers = command.consuming(2)
    command.publish("sleep 30")
    command.wait_done(1, "began")
    command.process.send_signal(signal.SIGTERM)
    command.wait_for("received SIGTERM; stopping")
    time.sleep(BURST)
    begin = time.monotonic()
    assert command.stop() == exit_codes.KILLED
    assert time.monotonic() - begin < 3
    wait_until(lambda: not any(map(is_alive, workers)))


def test_the_exit_code_reports_messages_that_do_not_finish_in_time(command: Command) -> None:
    command.start("-p", "2", "-t", "1", "--shutdown-timeout", "0.2")
    command.consuming(2)
    command.publish("sleep 30")
    command.wait_done(1, "began")
    assert command.stop() == exit_codes.UNFINISHED
    assert "did not finish within 0.2 s" in command.text()


@pytest.mark.hazard("G7")
def test_processes_are_recycled_after_max_messages_and_nothing_is_lost_or_repeated(
    anywhere: Command,
) -> None:
    anywhere.start("-p", "2", "-t", "2", "--max-messages", "10")
    anywhere.consuming(2)
    messages = anywhere.publish(*["nothing"] * 25)
    anywhere.wait_done(25)
    assert anywhere.stop() == exit_codes.SUCCESS, anywhere.text()
    assert sorted(message for message, _ in anywhere.did()) == sorted(messages)
    by_process = Counter(pid for _, pid in anywhere.did())
    assert max(by_process.values()) <= 10
    assert len(by_process) >= 3
    assert "10 messages processed" in anywhere.text()
    assert "another in" not in anywhere.text()  # there is no back-off
    assert anywhere.left() == 0


@pytest.mark.slow
def test_a_process_that_uses_too_much_memory_is_recycled_after_its_message(
    command: Command,
) -> None:
    command.start("--max-memory", "350M")
    command.consuming(1)
    messages = command.publish("leak 400")
    command.wait_for(r"stopping: memory limit exceeded \([4-9].. MiB\)")
    command.consuming(2)
    messages += command.publish("nothing")
    command.wait_done(2)
    assert command.stop() == exit_codes.SUCCESS
    assert [message for message, _ in command.did()] == messages
    assert len(set(command.did())) == len({pid for _, pid in command.did()}) == 2


@pytest.mark.slow
def test_a_process_is_recycled_at_its_maximum_age_without_losing_its_messages(
    command: Command,
) -> None:
    command.start("-t", "1", "--max-age", "1")
    command.consuming(1)
    messages = command.publish("sleep 1.3")
    command.wait_for("stopping: maximum age reached")
    command.consuming(2)
    assert [message for message, _ in command.did()] == messages
    assert command.left() == 0
    assert command.stop() == exit_codes.SUCCESS


@pytest.mark.parametrize("isolation", [[], ["--isolate", "process"]])
@pytest.mark.slow
def test_a_recycled_worker_lets_its_messages_finish_while_another_consumes(
    command: Command, isolation: list[str]
) -> None:
    command.start("-t", "2", "--max-age", "1", "--shutdown-timeout", "0.2", *isolation)
    command.consuming(1)
    [long] = command.publish("sleep 5")
    command.wait_done(1, "began")
    command.consuming(2)
    [short] = command.publish("nothing")
    command.wait_done(2)
    assert [message for message, _ in command.did()] == [short, long]
    assert [message for message, _ in command.did("began")] == [long]
    command.stop()
    assert "did not finish" not in command.text()


@pytest.mark.parametrize("limit", ["--max-age", "--max-messages"])
@pytest.mark.slow
def test_a_recycled_worker_gives_back_what_it_has_not_begun(anywhere: Command, limit: str) -> None:
    anywhere.start("-t", "1", limit, "1", "--shutdown-timeout", "0.2")
    anywhere.consuming(1)
    messages = anywhere.publish("sleep 8", *["nothing"] * 2)
    anywhere.wait_done(3)
    assert sorted(message for message, _ in anywhere.did()) == sorted(messages)
    assert anywhere.did()[-1][0] == messages[0]
    anywhere.stop()


@pytest.mark.slow
def test_a_worker_that_waits_for_its_last_message_has_a_successor(command: Command) -> None:
    command.start("-t", "2", "--max-messages", "2")
    command.consuming(1)
    [long, *short] = command.publish("sleep 5", *["nothing"] * 5)
    command.wait_done(6)
    done = [message for message, _ in command.did()]
    assert sorted(done) == sorted([long, *short])
    assert done.index(long) > 2
    assert command.stop() == exit_codes.SUCCESS


@pytest.mark.slow
def test_a_stop_ends_a_worker_that_waits_for_its_messages(command: Command) -> None:
    command.start("-t", "2", "--max-age", "1", "--shutdown-timeout", "0.5")
    command.consuming(1)
    command.publish("sleep 60")
    command.wait_done(1, "began")
    command.consuming(2)
    begin = time.monotonic()
    assert command.stop() == exit_codes.UNFINISHED
    assert time.monotonic() - begin < 10
    assert command.left() == 1


def test_wrong_usage_ends_all_workers_with_its_exit_code_and_is_reported_once(
    command: Command,
) -> None:
    command.start("-p", "4", "-Q", "nowhere")
    assert command.process.wait(20) == exit_codes.USAGE
    assert command.text().count("no consumer has the queue 'nowhere'") == 1
    assert len(command.workers()) == 1


def test_sighup_replaces_all_workers_one_by_one(command: Command) -> None:
    command.start("-p", "2", "-t", "1", "--shutdown-timeout", "0.2")
    before = command.consuming(2)
    command.publish("sleep 3")
    command.wait_done(1, "began")
    command.process.send_signal(signal.SIGHUP)
    after = command.consuming(4)[2:]
    wait_until(lambda: not any(map(is_alive, before)), 15)
    assert all(map(is_alive, after))
    assert len(command.did()) == 1
    assert command.left() == 0
    assert command.stop() == exit_codes.SUCCESS


@pytest.mark.slow
def test_workers_are_kept_if_their_replacements_cannot_start(command: Command) -> None:
    command.start("-p", "2", "-t", "1")
    before = command.consuming(2)
    command.write("raise RuntimeError('broken')")
    command.process.send_signal(signal.SIGHUP)
    command.wait_for("the other workers are not replaced")
    assert all(map(is_alive, before))
    command.publish("nothing")
    command.wait_done(1)
    assert len(command.workers()) == 3  # the second is not tried
    assert command.stop() == exit_codes.SUCCESS


@pytest.mark.slow
def test_a_worker_restarts_when_a_source_file_changes(command: Command) -> None:
    command.start("--reload")
    command.consuming(1)
    command.publish("nothing")
    command.wait_done(1)
    module = (command.folder / "work.py").read_text()
    change(command, "this is no Python")
    command.wait_for("waiting for a source file to change")
    handled = "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"  # main thread only
    change(command, handled + module.replace('note("done"', 'note("done-anew"'))
    command.consuming(2)
    command.publish("nothing")
    command.wait_done(1, "done-anew")
    assert command.stop() == exit_codes.SUCCESS, command.text()


def test_a_reloading_worker_finishes_running_messages_on_ctrl_c(
    command: Command,
) -> None:
    command.start("--reload", "-t", "1")
    command.consuming(1)
    command.publish("sleep 0.7")
    command.wait_done(1, "began")
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.process.wait(15) == exit_codes.SUCCESS, command.text()
    assert len(command.did()) == 1
    assert command.left() == 0


def change(command: Command, module: str) -> None:
    command.write(module)
    later = time.time() + 2  # whatever the unit of the file system's times
    os.utime(command.folder / "work.py", (later, later))
