"""A child process that ends when its parent does, as either of the two knows the other.

The child inherits two descriptors. One is the reading end of a pipe to which nothing is ever
written: it ends with the parent, however that dies. Over the other, the channel, they talk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence

from outbox import exit_codes

__all__ = ["ChildProcess", "Parent"]

_VARIABLE = "_OUTBOX_PARENT"


class ChildProcess:
    """A child, as its parent knows it.

    It runs in a fresh interpreter: a fork would take over what the parent's threads hold and what
    its libraries have open, and on macOS ends in a crash.
    """

    def __init__(
        self,
        command: Sequence[str],
        channel: int,
        *,
        with_input: bool = False,
        leads_group: bool = False,
    ) -> None:
        """Start ``command``, whose program finds its parent with ``Parent.inherited()``.

        Args:
            command: the program and its arguments.
            channel: the child's end of the channel; closed here in any case.
            with_input: whether the child gets the parent's standard input, for a debugger.
            leads_group: whether it leads a process group, in which is what it starts.

        Raises:
            OSError: it cannot be started.
        """
        self._leads_group = leads_group
        self._held = -1
        inherited = [channel]
        try:
            lifeline, self._held = os.pipe()
            inherited.append(lifeline)
            self._process = subprocess.Popen(
                command,
                env={**os.environ, _VARIABLE: f"{lifeline}:{channel}"},
                pass_fds=inherited,
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
        """Its process id."""
        return self._process.pid

    def code(self) -> int | None:
        """Return what it has exited with, a signal's number as a negative one, or None."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end, at most ``timeout`` seconds; return what ``code`` does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.returncode

    def kill(self) -> None:
        """End it at once, with its process group if it leads one."""
        if self._leads_group:
            # First: as long as its leader was not waited for, its number is not used again.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()

    def close(self) -> None:
        """Let go of it: if it still runs, it ends as if this process had died."""
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)


class Parent:
    """The parent, as its child knows it.

    Attributes:
        channel: the descriptor of the child's end of the channel.
    """

    def __init__(self, lifeline: int, channel: int) -> None:
        """Take over the descriptors; processes that are started from here do not inherit them."""
        os.set_inheritable(lifeline, False)
        os.set_inheritable(channel, False)
        self._lifeline = lifeline
        self.channel = channel

    @classmethod
    def inherited(cls) -> Parent | None:
        """Return the parent that has started this process as a child, or None; only once."""
        descriptors = os.environ.pop(_VARIABLE, "")
        if not descriptors:
            return None
        lifeline, _, channel = descriptors.partition(":")
        return cls(int(lifeline), int(channel))

    def tell(self, what: bytes) -> None:
        """Write ``what`` to the channel."""
        with contextlib.suppress(OSError):  # the parent is dead: when_gone() notices that
            os.write(self.channel, what)

    def when_gone(self, action: Callable[[], object]) -> None:
        """When the parent dies, call ``action`` on a thread, and then end this process at once."""

        def watch() -> None:
            os.read(self._lifeline, 1)
            action()
            os._exit(exit_codes.KILLED)

        threading.Thread(target=watch, name="outbox-parent", daemon=True).start()
