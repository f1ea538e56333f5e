"""A child process that ends when its parent does, seen from both sides.

The child inherits two descriptors. The lifeline is the reading end of a pipe that closes when the
parent dies, however that happens; until then it carries the parent's words, one a line, which may
arrive at any time. The channel carries messages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

from outbox import exit_codes
from outbox.system import process

__all__ = ["ChildProcess", "Parent"]

_VARIABLE = "_OUTBOX_PARENT"

_children: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def _leave_children() -> None:
    for child in list(_children):
        child.let_go()
    _children.clear()


process.after_fork(_leave_children)


class ChildProcess:
    """A child, seen from its parent.

    It runs in a fresh interpreter: a fork would inherit locks that the parent's threads hold and
    connections that its libraries have open, and on macOS it crashes.
    """

    def __init__(
        self,
        command: Sequence[str],
        channel: int,
        *,
        with_input: bool = False,
        leads_group: bool = False,
        shared: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        """Start ``command``, whose program finds its parent with ``Parent.inherited()``.

        Args:
            command: the program and its arguments.
            channel: the child's end of the channel; closed here in any case.
            with_input: whether the child gets the parent's standard input, for a debugger.
            leads_group: whether it leads a process group, which includes the processes it starts.
            shared: further descriptors that it inherits; they stay open here.
            variables: additions to its environment.
            folder: its working directory; by default the parent's.

        Raises:
            OSError: it cannot be started.
        """
        self._leads_group = leads_group
        self._held = -1
        _children.add(self)
        inherited = [channel]
        try:
            lifeline, self._held = os.pipe()
            os.set_blocking(self._held, False)
            inherited.append(lifeline)
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **(variables or {}), _VARIABLE: f"{lifeline}:{channel}"},
                pass_fds=[*inherited, *shared],
                stdin=None if with_input else subprocess.DEVNULL,
                process_group=0 if leads_group else None,
            )
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in inherited:
                os.close(descriptor)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def code(self) -> int | None:
        """Return the exit code, the negative number of a signal, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, at most ``timeout`` seconds; return what ``code()`` returns."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.returncode

    def say(self, word: bytes) -> None:
        """Send the child a word, without a newline; see ``Parent.when_gone``.

        It is lost if the child has ended, or has not read thousands of words.
        """
        if self._held >= 0:
            with contextlib.suppress(OSError):
                os.write(self._held, word + b"\n")

    def kill(self) -> None:
        """Kill the child, with its process group if it leads one."""
        if self._leads_group:
            # The group first: until its leader is waited for, the number can't be reused.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()

    def let_go(self) -> None:
        """Let go of the lifeline in a forked child, which doesn't keep its parent's children up."""
        if self._held >= 0:
            process.vacate(self._held)

    def close(self) -> None:
        """Close the lifeline: a child that still runs ends as if this process had died."""
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)


class Parent:
    """The parent, seen from its child.

    Attributes:
        channel: the descriptor of the child's end of the channel.
    """

    def __init__(self, lifeline: int, channel: int) -> None:
        """Take the descriptors over; processes started from here don't inherit them."""
        os.set_inheritable(lifeline, False)
        os.set_inheritable(channel, False)
        self._lifeline = lifeline
        self.channel = channel
        process.after_fork(self._leave)

    @classmethod
    def inherited(cls) -> Parent | None:
        """Return the parent if this process was started as a child, else None; only once."""
        descriptors = os.environ.pop(_VARIABLE, "")
        if not descriptors:
            return None
        lifeline, _, channel = descriptors.partition(":")
        return cls(int(lifeline), int(channel))

    def _leave(self) -> None:
        """Let go of the pipes in a forked child: its end isn't this process's."""
        process.vacate(self.channel)
        process.vacate(self._lifeline)

    def when_gone(
        self, action: Callable[[], object], on_word: Callable[[bytes], object] = lambda _: None
    ) -> None:
        """Call ``action`` on a thread when the parent dies, then exit this process at once.

        Args:
            action: the function to call.
            on_word: the function to call, on the same thread, with each word of the parent.
        """

        def watch() -> None:
            begun = b""
            while chunk := os.read(self._lifeline, 4096):
                *words, begun = (begun + chunk).split(b"\n")
                for word in words:
                    on_word(word)
            action()
            os._exit(exit_codes.KILLED)

        threading.Thread(target=watch, name="outbox-parent", daemon=True).start()
