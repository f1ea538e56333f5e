"""Publishers in programs whose threads are greenlets of gevent or eventlet."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from proving.proxy import FaultProxy
from tests.amqp import Inspector

LIBRARIES = {
    "gevent": """
from gevent import monkey
monkey.patch_all()
from gevent import Timeout, sleep, spawn
wait = lambda greenlet: greenlet.get()
""",
    "eventlet": """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # eventlet's, of itself and of forks
import eventlet
eventlet.monkey_patch()
from eventlet import Timeout, sleep, spawn
wait = lambda greenlet: greenlet.wait()
""",
}

BEGINNING = """
import os, sys, time
from outbox import auto_publishing, configure, enqueue_event

_, url, exchange = sys.argv

def publish(*payloads, target="x"):
    with auto_publishing() as block:
        for payload in payloads:
            enqueue_event(payload, target)
            sleep(0)  # all others' turn
    return block.report
"""


def start(program: str, url: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, url, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(program: subprocess.Popen[str], timeout: float = 30) -> tuple[str, str]:
    """Return what it wrote to its standard output, and to its standard error."""
    try:
        output, errors = program.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(OSError):
            program.kill()
    assert program.returncode == 0, errors
    return output, errors


@pytest.fixture(params=LIBRARIES)
def beginning(request: pytest.FixtureRequest) -> str:
    """The first lines of a program whose threads are greenlets."""
    library: str = request.param
    return LIBRARIES[library] + BEGINNING


@pytest.mark.hazard("A17")
def test_concurrent_greenlets_publish_their_own_events(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    program = """
configure(url, exchange=exchange)

def work(who):
    report = publish(*[[who, n] for n in range(5)])
    assert [event.payload for event in report.published] == [[who, n] for n in range(5)]

for greenlet in [spawn(work, who) for who in range(20)]:
    wait(greenlet)
"""
    finish(start(beginning + program, proxy.url, name))
    found = [message.payload for message in inspector.messages(queue, 100)]
    for who in range(20):
        assert [n for owner, n in found if owner == who] == list(range(5))
    assert inspector.all(queue) == []
    assert proxy.accepted == 1


@pytest.mark.hazard("A17")
def test_after_an_interrupted_flush_later_reports_are_about_their_own_events(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name, topics=("x",))
    proxy.delay = 0.05
    program = """
configure(url, exchange=exchange, timeout=15, unroutable="fail")
assert publish("connected").ok
try:
    with Timeout(0.03):
        publish("interrupted")
except Timeout:
    pass
else:
    sys.exit("it was not interrupted")
report = publish("nowhere", target="nowhere")
assert [rejection.event.payload for rejection in report.rejected] == ["nowhere"], report
report = publish("after")
assert [event.payload for event in report.published] == ["after"], report
"""
    _, errors = finish(start(beginning + program, proxy.url, name))
    assert "lost" not in errors
    found = [message.payload for message in inspector.messages(queue, 3)]
    assert found == ["connected", "interrupted", "after"]
    assert inspector.all(queue) == []


def test_a_greenlet_that_times_out_at_its_first_event_leaves_the_publisher_usable(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    program = """
configure(url, exchange=exchange)
try:
    with Timeout(0.01):
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass
        publish("in time")  # the time limit strikes at the first switch of greenlets
except Timeout:
    pass
else:
    sys.exit("it was not interrupted")
assert publish("after").ok
"""
    finish(start(beginning + program, proxy.url, name))
    found = [message.payload for message in inspector.all(queue)]
    assert found in (["in time", "after"], ["after"])
    assert inspector.all(queue) == []
    assert proxy.accepted == 1


@pytest.mark.hazard("A17")
@pytest.mark.slow
def test_while_greenlets_idle_the_publisher_answers_heartbeats(
    proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    program = """
publisher = configure(url, exchange=exchange, heartbeat=1)
assert publish("before").ok
sleep(3.5)
assert publisher.connected
assert publish("after").ok
"""
    running = [start(text + BEGINNING + program, proxy.url, name) for text in LIBRARIES.values()]
    for one in running:
        finish(one)
    assert len(inspector.messages(queue, 4)) == 4
    assert proxy.accepted == len(running)


@pytest.mark.hazard("A17")
def test_a_greenlet_that_waits_for_confirms_does_not_stop_others(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    proxy.delay = 0.05
    program = """
configure(url, exchange=exchange, timeout=15)
assert publish("connected").ok
begin = time.monotonic()
waiting = [spawn(publish, n) for n in range(25)]
turns = 0
while not all(waits.dead for waits in waiting):
    turns += 1
    sleep(0.005)
took = time.monotonic() - begin
assert all(wait(waits).ok for waits in waiting)
print(turns, took)
"""
    output, _ = finish(start(beginning + program, proxy.url, name))
    turns, took = map(float, output.split())
    assert 0.1 <= took < 1.2, "one after the other they would take 2.5 seconds"
    assert turns >= 5


def test_events_in_flight_are_waited_for_at_exit(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    proxy.delay = 0.05
    program = """
configure(url, exchange=exchange, timeout=0.02, drain_timeout=15)
report = publish("first")  # not even connected
assert [event.payload for event in report.kept] == ["first"], report
"""
    _, errors = finish(start(beginning + program, proxy.url, name))
    assert "lost" not in errors
    assert inspector.get(queue).payload == "first"


def test_events_that_cannot_be_published_are_named_at_exit(
    beginning: str, proxy: FaultProxy, name: str
) -> None:
    proxy.refuse()
    program = """
configure(url, exchange=exchange, timeout=0.02, drain_timeout=0.3)
[event] = publish("first").kept
print(event.id)
"""
    output, errors = finish(start(beginning + program, proxy.url, name), timeout=15)
    assert f"1 event(s) lost, never confirmed: '{output.strip()}'" in errors


def test_a_forked_child_does_not_touch_its_parents_connection(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    """A forked child has the parent's greenlets too, also the one that reads from the broker."""
    queue = inspector.queue(name, name)
    proxy.delay = 0.01  # the child finds time to read what the parent waits for
    program = """
publisher = configure(url, exchange=exchange, timeout=2)
assert publish("before").ok
child = os.fork()
who = "parent" if child else "child"
for n in range(20):
    assert publish([who, n]).ok, who
    sleep(0.01)
assert publisher.stats().reconnects == 0
if not child:
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
"""
    _, errors = finish(start(beginning + program, proxy.url, name))
    assert "outbox" not in errors
    assert "KeyError" not in errors
    found = [message.payload for message in inspector.messages(queue, 41)]
    assert found[0] == "before"
    for who in ("parent", "child"):
        assert [payload[1] for payload in found[1:] if payload[0] == who] == list(range(20))
    assert proxy.accepted == 2


def test_a_publisher_made_before_the_program_was_patched_works(
    beginning: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    made = """
import sys
import outbox
outbox.configure(sys.argv[1], exchange=sys.argv[2])
"""
    program = """
assert publish("x").ok
"""
    finish(start(made + beginning + program, proxy.url, name))
    assert inspector.get(queue).payload == "x"
    assert proxy.accepted == 1


def test_without_patching_real_threads_publish(
    proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    program = """
import threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import eventlet, gevent, gevent.monkey
from time import sleep
"""
    work = """
configure(url, exchange=exchange)
threads = [threading.Thread(target=publish, args=range(5)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(10)
"""
    finish(start(program + BEGINNING + work, proxy.url, name))
    assert len(inspector.messages(queue, 20)) == 20
    assert inspector.all(queue) == []
    assert proxy.accepted == 1
