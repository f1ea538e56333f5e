"""Publishers in child processes, and their kept events when those end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proving.proxy import FaultProxy
from tests.amqp import Inspector

METHODS = ("fork", "forkserver", "spawn")

PROGRAM = """
import multiprocessing, os, sys, warnings
from concurrent.futures import ProcessPoolExecutor

from outbox import auto_publishing, configure, enqueue_event

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads; on purpose here
_, url, exchange, how, method, timeout, drain_timeout = sys.argv
configure(
    url, exchange=exchange, timeout=float(timeout), drain_timeout=float(drain_timeout)
)


def publish(who):
    with auto_publishing() as block:
        print(enqueue_event(who, "x").id, flush=True)
    return block.report.ok


if __name__ == "__main__":
    publish("parent, before")
    if how == "os":
        child = os.fork()
        if not child:
            publish("child")
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
    elif how == "process":
        child = multiprocessing.get_context(method).Process(target=publish, args=("child",))
        child.start()
        child.join()
        assert child.exitcode == 0
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            pool.submit(publish, "child").result()
    publish("parent, after")
"""

WAYS = [("os", "fork"), *(("process", method) for method in METHODS), ("pool", "forkserver")]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.hazard("A7")
@pytest.mark.parametrize(("how", "method"), WAYS)
def test_a_child_publishes_over_its_own_connection_and_does_not_harm_its_parents(
    proxy: FaultProxy, inspector: Inspector, name: str, tmp_path: Path, how: str, method: str
) -> None:
    queue = inspector.queue(name, name)
    program = start(tmp_path, proxy.url, name, how, method, "10", "5")
    _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (0, "")
    assert sorted(message.payload for message in inspector.messages(queue, 3)) == [
        "child",
        "parent, after",
        "parent, before",
    ]
    assert proxy.accepted == 2  # one each: the parent's has outlived the child


@pytest.mark.hazard("A7")
@pytest.mark.parametrize(("how", "method"), WAYS)
@pytest.mark.slow
def test_a_child_drains_what_it_keeps_when_it_ends(
    proxy: FaultProxy, inspector: Inspector, name: str, tmp_path: Path, how: str, method: str
) -> None:
    queue = inspector.queue(name, name)
    proxy.delay = 0.04  # longer than callers wait: at its end the child's event is on its way
    program = start(tmp_path, proxy.url, name, how, method, "0.05", "15")
    output, errors = program.communicate(timeout=45)
    assert program.returncode == 0, errors
    assert "lost" not in errors
    arrived = {message.id for message in inspector.messages(queue, 3)}
    assert arrived == set(output.split())


@pytest.mark.hazard("A7")
@pytest.mark.parametrize(("how", "method"), WAYS)
def test_a_child_that_cannot_drain_names_the_lost_events(
    proxy: FaultProxy, name: str, tmp_path: Path, how: str, method: str
) -> None:
    proxy.refuse()
    program = start(tmp_path, proxy.url, name, how, method, "0.05", "0.3")
    output, errors = program.communicate(timeout=30)
    assert program.returncode == 0, errors
    before, child, after = output.split()
    assert f"1 event(s) lost, never confirmed: '{child}'" in errors
    assert f"2 event(s) lost, never confirmed: '{before}', '{after}'" in errors
