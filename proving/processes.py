"""Starts, stops and kills the programs under proof."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from proving.history import Journal

__all__ = ["Program", "Server"]

_GRACE = 60.0  # seconds for an orderly end: it may have to wait for the broker


class Program:
    """One program, which is started again after each end. Thread-safe."""

    def __init__(
        self, kind: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        """Prepare ``python -m <arguments>``; its output goes to ``<kind>.log`` in ``folder``."""
        self.kind = kind
        self._command = [sys.executable, "-m", *arguments]
        self._environment = {**os.environ, **environment, "PROVE_HISTORY": str(folder)}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def start(self) -> None:
        """Start it, unless it runs."""
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
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """Ask it to end, and wait for that.

        Raises:
            RuntimeError: it does not end, or not with a success.
        """
        with self._changing:
            process = self._process
            if process is None or process.poll() is not None:
                return
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self.end()
                raise RuntimeError(f"{self.kind} did not end on SIGTERM: {self.log()}") from None
            if code not in (0, -signal.SIGTERM):  # uvicorn ends by the signal it has handled
                raise RuntimeError(f"{self.kind} ended with {code}: {self.log()}")

    def kill(self, history: Journal) -> None:
        """Kill the process that does the work, and write that down."""
        with self._changing:
            pids = self._workers()
            for pid in pids:
                history.write("killed", process=f"{self.kind}-{pid}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None and self._process.pid in pids:
                self._process.wait(_GRACE)

    def end(self) -> None:
        """End it whatever it does, with all processes that it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_GRACE)

    def log(self) -> str:
        """Return the end of its output."""
        return (self._folder / f"{self.kind}.log").read_text(errors="replace")[-4000:]

    def _workers(self) -> list[int]:
        return [self._process.pid] if self._process is not None and self.running else []


class Server(Program):
    """A server, or a supervisor, which may do its work in children of its own."""

    def __init__(
        self,
        kind: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        children: int,
    ) -> None:
        """Prepare it; up to so many ``children`` are killed in its place, and it replaces them."""
        super().__init__(kind, arguments, environment, folder)
        self._children = children

    def _workers(self) -> list[int]:
        own = super()._workers()
        if not self._children:
            return own
        found = []
        for pid in own:
            listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            found += [int(child) for child in listed.split()]
        return found[: self._children]
