"""The duties of a container's first process, in a process that inherits orphans like it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_CHILD_SUBREAPER")

PROGRAM = """
import ctypes, os, pathlib, signal, subprocess, sys, time
from outbox.system.first_process import serve

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
first = os.getpid()
mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
print("once")
serve()
assert os.getppid() == first
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask

def states():
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == first and int(path.parent.name) != os.getpid():
            found.append(state)
    return found
"""


def run(program: str, number: int | None = None) -> tuple[int, str]:
    """Run ``program`` in the child; send a signal when it has written a line after the first."""
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        if number is not None:
            child.stdout.readline()
            child.stdout.readline()
            child.send_signal(number)
        output, _ = child.communicate(timeout=20)
        return child.returncode, output


def test_it_waits_for_orphans_and_exits_as_its_child() -> None:
    assert run("""
for _ in range(5):
    subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"], check=True)
assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3
print(len(states()) > 0)
deadline = time.monotonic() + 10
while states() and time.monotonic() < deadline:
    time.sleep(0.05)
print(states())
sys.exit(7)
""") == (7, "once\nTrue\n[]\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_it_passes_signals_on(number: int) -> None:
    handle = f"signal.signal({int(number)}, lambda number, frame: sys.exit(number + 50))\n"
    # Not one long sleep: a signal just before it would be handled after it.
    wait = "print('ready', flush=True)\nfor _ in range(400):\n    time.sleep(0.05)\n"
    code, _ = run(handle + wait, number)
    assert code == number + 50


def test_its_exit_code_names_the_signal_that_ended_its_child() -> None:
    assert run("print('ready', flush=True)\ntime.sleep(20)\n", signal.SIGTERM)[0] == 143
