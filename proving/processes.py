"""Starting, stopping and killing of the programs under test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from proving.history import Journal

__all__ = ["Program", "Server"]

# As Celery reports it, which may kill its own children when it is terminated.
_KILLED_CHILD = re.compile(r"pid:(\d+) exited with 'signal 9")
_KILLED = 60.0  # seconds until a killed process is gone, at most


class Program:
    """A program that can be restarted after each end. Thread-safe."""

    def __init__(
        self,
        kind: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        grace: float = 60.0,
    ) -> None:
        """Prepare ``python -m <arguments>``; its output goes to ``<kind>.log`` in ``folder``.

        Args:
            kind: the name of the program.
            arguments: the module and its arguments.
            environment: variables to add to this process's.
            folder: the folder of the history.
            grace: the seconds for an orderly exit, which may have to wait for the broker.
        """
        self._grace = grace
        self.kind = kind
        self._command = [sys.executable, "-m", *arguments]
        self._environment = {**os.environ, **environment, "PROVE_HISTORY": str(folder)}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def start(self) -> None:
        """Start the program, unless it is running."""
        with self._changing:
            if self.running:
                return
            with (self._folder / f"{self.kind}.log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    @property
    def running(self) -> bool:
        """Whether the program is running."""
        return self._process is not None and self._process.poll() is None

    def terminate(self, history: Journal) -> None:
        """Send SIGTERM, and wait until the program has ended.

        If it doesn't end, it is killed. This is written down, as is an exit code other than
        success.
        """
        with self._changing:
            process = self._process
            if process is None or process.poll() is not None:
                return
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(self._grace)
            except subprocess.TimeoutExpired:
                self.end()
                if self._must_end():
                    self._note_astray(history, f"did not end within {self._grace:.0f} s")
                return
            if code not in (0, -signal.SIGTERM):  # uvicorn re-raises the signal
                self._note_astray(history, f"ended with {code}")

    def kill(self, history: Journal) -> None:
        """Kill the processes that do the work, and write that down."""
        with self._changing:
            pids = self._workers()
            for pid in pids:
                history.write("killed", process=f"{self.kind}-{pid}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None and self._process.pid in pids:
                self._process.wait(_KILLED)

    def end(self) -> None:
        """Kill the program with all processes that it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_KILLED)

    def log(self) -> str:
        """Return the last 4,000 characters of its output."""
        path = self._folder / f"{self.kind}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def _note_astray(self, history: Journal, how: str) -> None:
        history.write(
            "astray", process=self.kind, how=f"{how}; its last lines: {self.log()[-1000:]}"
        )

    def _must_end(self) -> bool:
        return True

    def _workers(self) -> list[int]:
        return [self._process.pid] if self._process is not None and self.running else []


class Server(Program):
    """A server or supervisor, which may do its work in child processes."""

    def __init__(
        self,
        kind: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        children: int,
        survives: bool = True,
        grace: float = 60.0,
    ) -> None:
        """Prepare it.

        Args:
            kind: see :class:`Program`, like the next ones.
            arguments: the module and its arguments.
            environment: variables to add to this process's.
            folder: the folder of the history.
            children: the most child processes that a kill hits, or 0 for the server itself.
            survives: whether it must end in order after a child was killed. Celery's pool may wait
                for ever for a lock that the child has held.
            grace: the seconds for an orderly exit.
        """
        super().__init__(kind, arguments, environment, folder, grace=grace)
        self._children = children
        self._survives = survives
        self._has_lost_child = False

    def kill(self, history: Journal) -> None:
        """Kill child processes, or the server itself, and write that down."""
        super().kill(history)
        self._has_lost_child = True

    def _must_end(self) -> bool:
        return self._survives or not self._has_lost_child

    def terminate(self, history: Journal) -> None:
        """Send SIGTERM, and wait; write down which child processes the server has killed itself."""
        super().terminate(history)
        for pid in _KILLED_CHILD.findall(self.log()):
            history.write("killed", process=f"{self.kind}-{pid}")

    def _workers(self) -> list[int]:
        own = super()._workers()
        if not self._children:
            return own
        children = []
        for pid in own:
            for listed in Path(f"/proc/{pid}/task").glob("*/children"):  # those of each thread
                with contextlib.suppress(OSError):  # the thread has ended
                    children += [int(child) for child in listed.read_text().split()]
        return children[: self._children]
