"""``outbox-consume`` and signals: bursts, whole groups, and the children of handlers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.messages.delivery import dead_letter_queue
from outbox.system.signals import BURST
from tests.amqp import Inspector
from tests.consuming import Command
from tests.places import RabbitMQPlace, SQLitePlace
from tests.waiting import wait_until

MODULE = """
import asyncio, multiprocessing, os, signal, subprocess, sys, time
from outbox.consumers import Reject, consumer


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


@consumer("{name}")
def work(event):
    command, _, argument = event.payload["do"].partition(" ")
    note("began", event.id, os.getpid())
    if command == "sleep":
        time.sleep(float(argument))
    elif command == "program":
        subprocess.run(["sleep", argument], check=True)
    elif command == "reject":
        time.sleep(float(argument))
        raise Reject("as asked")
    elif command == "terminate":  # a child of multiprocessing
        context = multiprocessing.get_context(argument)
        child = context.Process(target=time.sleep, args=(30,))
        child.start()
        child.terminate()
        child.join(10)
        note("ended", child.exitcode)
        child.kill()
    elif command == "pool":
        with multiprocessing.get_context(argument).Pool(2) as pool:
            note("ended", pool.map(abs, [-1]))
    elif command == "signal":  # a program
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            program = subprocess.Popen(["sleep", "30"])
            program.send_signal(number)
            try:
                note("ended", program.wait(5))
            finally:
                program.kill()
    elif command == "fork":
        child = os.fork()
        if not child:
            end_as(argument)
            return
        note("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    elif command == "orphan":
        subprocess.run(["sh", "-c", "sleep 0.1 & exit 0"], check=True)
        note("ended", subprocess.run(["sh", "-c", "exit 3"]).returncode)
    elif command == "leave":  # a child that lives longer than this process
        child = os.fork()
        if not child:
            time.sleep(float(argument))
            os._exit(0)
        note("child", event.id, child)
        time.sleep(float(argument))
    note("done", event.id, os.getpid())


def end_as(how):
    if how == "raise":
        raise RuntimeError("in the child")
    elif how == "exit":
        sys.exit(7)
    elif how == "interrupt":
        raise KeyboardInterrupt
    elif how == "check":
        handlers = [signal.getsignal(number) for number in range(1, signal.NSIG)]
        os._exit(
            handlers != HANDLERS
            or signal.pthread_sigmask(signal.SIG_BLOCK, ()) != MASK
            or signal.set_wakeup_fd(-1) != -1
        )


@consumer("{name}-tasks")
async def tasks(event):
    note("began", event.id, os.getpid())
    how = event.payload["do"]
    if how in ("sleep", "long"):
        await asyncio.sleep(4 if how == "long" else 0.5)
    else:
        waited_for = asyncio.get_running_loop().create_future()
        child = os.fork()
        if not child:
            if how == "wait":
                await waited_for
            end_as(how)
            return
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            await asyncio.sleep(0.01)
        note("ended", os.waitstatus_to_exitcode(ended[1]))
    note("done", event.id, os.getpid())
"""

USUAL = """
import signal
HANDLERS = [signal.getsignal(number) for number in range(1, signal.NSIG)]
HANDLERS[signal.SIGINT - 1] = signal.default_int_handler
for number in signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGUSR1:
    HANDLERS[number - 1] = signal.SIG_DFL
MASK = signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""

ALONE: list[str] = []
SUPERVISED = ["-p", "1"]
ISOLATED = ["--isolate", "process"]


@pytest.fixture
def command(tmp_path: Path, name: str) -> Iterator[Command]:
    command = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    command.write(USUAL + MODULE.format(name=name))
    yield command
    command.close()


def signal_all(command: Command, number: int) -> None:
    """Signal every process of the command, whatever its group, as a service manager does."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").resolve() == command.folder:
                os.kill(int(process.name), number)
        except OSError:
            continue


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGINT),  # by the terminal, and by a runner that passes it on
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGHUP),  # systemd with SendSIGHUP=
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_signals_in_a_burst_count_as_one(
    command: Command, arguments: list[str], numbers: tuple[signal.Signals, ...]
) -> None:
    command.start(*arguments)
    command.publish("sleep 1")
    command.wait_done(1, "began")
    for number in numbers:
        command.process.send_signal(number)
        time.sleep(0.05)
    assert command.process.wait(20) == exit_codes.SUCCESS
    assert len(command.did()) == 1


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
def test_a_signal_after_a_burst_stops_at_once(command: Command, arguments: list[str]) -> None:
    command.start(*arguments)
    command.publish("sleep 30")
    command.wait_done(1, "began")
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(BURST + 0.2)
    assert command.stop(signal.SIGINT, 5) == exit_codes.KILLED


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED, ISOLATED])
def test_a_message_whose_program_is_ended_by_the_stop_is_redelivered(
    command: Command, arguments: list[str]
) -> None:
    command.start(*arguments)
    command.publish("program 30")
    command.wait_done(1, "began")
    time.sleep(0.3)  # for the program
    signal_all(command, signal.SIGTERM)
    assert command.process.wait(20) == exit_codes.SUCCESS
    assert not command.did()
    assert command.left() == 1
    assert command.place.count(dead_letter_queue(command.queue)) == 0


def test_a_rejected_message_is_dead_lettered_while_the_worker_stops(command: Command) -> None:
    command.start()
    command.publish("reject 1")
    command.wait_done(1, "began")
    assert command.stop() == exit_codes.SUCCESS
    assert command.left() == 0
    assert command.place.count(dead_letter_queue(command.queue)) == 1


def ends(command: Command) -> list[str]:
    """Return what handlers have noted about the ends of their children."""
    path = command.folder / "done"
    rows = [line.split(" ", 1) for line in path.read_text().splitlines()]
    return [row[1] for row in rows if row[0] == "ended"]


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED, ISOLATED])
def test_the_children_of_handlers_react_to_signals(command: Command, arguments: list[str]) -> None:
    command.start("-t", "1", *arguments)
    ways = ["terminate fork", "terminate spawn", "signal", "fork check", "pool fork"]
    command.publish(*ways)
    command.wait_done(len(ways))
    assert command.stop() == exit_codes.SUCCESS
    assert ends(command) == ["-15", "-15", "-15", "-2", "-1", "0", "[1]"]


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED, ISOLATED])
def test_a_forked_child_ends_where_its_handler_ends(command: Command, arguments: list[str]) -> None:
    command.start("-t", "1", *arguments)
    ways = ["return", "raise", "exit", "interrupt"]
    messages = command.publish(*(f"fork {way}" for way in ways), *["sleep 0.05"] * 10)
    command.wait_done(len(messages))
    assert command.stop() == exit_codes.SUCCESS
    assert sorted(message for message, _ in command.did("began")) == sorted(messages)
    assert len({pid for _, pid in command.did("began")}) == 1
    assert ends(command) == ["0", "1", "7", "1"]


def test_a_child_forked_by_a_coroutine_does_not_run_its_loop(command: Command) -> None:
    command.queue += "-tasks"
    command.start()
    ways = ["return", "raise", "exit", "wait", *["sleep"] * 10]
    messages = command.publish(*ways)
    command.wait_done(len(messages))
    assert command.stop() == exit_codes.SUCCESS
    assert sorted(message for message, _ in command.did("began")) == sorted(messages)
    assert sorted(message for message, _ in command.did()) == sorted(messages)
    assert sorted(ends(command)) == ["0", "1", "1", "7"]
    assert "can't wait in its parent's loop" in command.text()
    assert "could not handle" not in command.text()  # copies of other tasks


@pytest.mark.slow
def test_a_recycled_worker_lets_its_coroutines_finish(command: Command) -> None:
    command.queue += "-tasks"
    command.start("--max-age", "1", "--shutdown-timeout", "0.2")
    command.consuming(1)
    [message] = command.publish("long")
    command.wait_done(1)
    assert [done for done, _ in command.did("began")] == [message]
    command.consuming(2)


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
def test_a_child_left_by_a_killed_worker_does_not_keep_its_messages(
    amqp_url: str, inspector: Inspector, tmp_path: Path, name: str, arguments: list[str]
) -> None:
    command = Command(tmp_path, RabbitMQPlace(amqp_url, name, inspector), name)
    command.write(USUAL + MODULE.format(name=name))
    inspector.clean_up(queue=f"{name}-tasks")
    inspector.clean_up(queue=f"{name}-tasks.dead")
    command.start(*arguments)
    try:
        command.publish("leave 15")
        command.wait_done(1, "child")
        [(_, worker)] = command.did("began")
        os.kill(worker, signal.SIGKILL)
        if arguments == ALONE:
            wait_until(lambda: command.left() == 1, 5)
        else:  # its successor gets it
            wait_until(lambda: len(command.did("began")) == 2, 10)
    finally:
        for _, child in command.did("child"):
            os.kill(child, signal.SIGKILL)
        command.close()


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def container() -> list[str]:
    """The beginning of a command line whose program becomes the first process of a namespace."""
    if shutil.which(UNSHARE[0]) is None or subprocess.run([*UNSHARE, "true"]).returncode:
        pytest.skip("needs unshare, and the right to make a PID namespace")
    return UNSHARE


def children_of(pid: int) -> dict[int, str]:
    """Return the children of a process, each with its state."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid:
                children[int(path.parent.name)] = state
    return children


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
def test_the_first_process_of_a_container_leaves_no_zombies(
    command: Command, container: list[str], arguments: list[str]
) -> None:
    command.start(*arguments, wrapped_in=container)
    command.publish(*["orphan"] * 10)
    command.wait_done(10)
    [first] = children_of(command.process.pid)
    wait_until(lambda: len(children_of(first)) == 1, 5)  # its work
    assert ends(command) == ["3"] * 10
    os.kill(first, signal.SIGTERM)
    assert command.process.wait(20) == exit_codes.SUCCESS


@pytest.mark.parametrize(("arguments", "code"), [(ALONE, 143), (SUPERVISED, 0)])
def test_the_first_process_of_a_container_can_be_stopped_while_it_imports(
    command: Command, container: list[str], arguments: list[str], code: int
) -> None:
    command.write("import pathlib, time; pathlib.Path('done').touch(); time.sleep(60)")
    command.start(*arguments, wrapped_in=container)
    wait_until(lambda: (command.folder / "done").exists(), 20)
    [first] = children_of(command.process.pid)
    os.kill(first, signal.SIGTERM)
    assert command.process.wait(10) == code
