"""The duties of a container's first process, its PID 1.

The kernel makes it the parent of every process whose own parent has ended, and only it can wait for
their ends. And a signal that it has no handler for has no effect on it, such as SIGTERM while it
imports an application. A program that starts others of an application can't wait for all: it would
take away the ends that the application waits for itself. So the work is left to a child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

__all__ = ["leave_work_to_child", "serve"]

_PASSED_ON = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTSTP,
}


def leave_work_to_child() -> None:
    """Return in a child if this is the first process, which ends as the child does.

    It does nothing in other processes, and after threads were started, which a child wouldn't have.
    Signals reach the child, and react there as they would in any other process.
    """
    if os.getpid() == 1 and threading.active_count() == 1:
        serve()


def serve() -> None:
    """Return in a child; wait here for all children, and exit when that one has ended.

    The exit code is the child's, or 128 plus the number of the signal that ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    awaited = {*_PASSED_ON, signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    while True:
        number = signal.sigwait(awaited)
        if number == signal.SIGCHLD:
            _wait_for_children(child)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def _wait_for_children(child: int) -> None:
    """Wait for the children that have ended; if ``child`` is one of them, exit."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if not pid:
            return
