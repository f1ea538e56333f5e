"""Private servers: finding installed ones, choosing free ports, starting and stopping.

Imports nothing from outbox, since the scripts use it before anything is installed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Self

__all__ = [
    "PrivateServer",
    "ServerMissing",
    "find_mariadb",
    "find_postgresql",
    "find_rabbitmq",
    "first_byte",
    "free_ports",
    "rabbitmq_root",
]

_RABBITMQ = ("/usr/lib/rabbitmq/lib", "/usr/local/lib/rabbitmq", "/opt/homebrew/opt/rabbitmq")
_MARIADB = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin")
_POSTGRESQL = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt")

# Below the ports of outgoing connections (Linux from 32768, others from 49152): while a server is
# dead, none of those can take its port, and no client can connect to itself there.
_PORTS = range(20000, 32768)

_OUTPUT = "server.log"
_STOP_TIMEOUT = 20.0  # seconds
_CAN_AWAIT_STOP = hasattr(os, "waitid")  # not on macOS before Python 3.13


def rabbitmq_root() -> Path:
    """Return the root folder of the system whose RabbitMQ is used: / unless another one is named.

    The variable OUTBOX_TEST_RABBITMQ names it, such as the one that scripts/rabbitmq-4 prints.
    """
    return Path(os.environ.get("OUTBOX_TEST_RABBITMQ") or "/").resolve()


def find_rabbitmq() -> Path | None:
    """Return RabbitMQ's own start script in :func:`rabbitmq_root`, or None.

    It isn't the wrapper on the PATH, which on Debian switches to the user ``rabbitmq``: the script
    in RabbitMQ's library folder runs as the caller.
    """
    root = rabbitmq_root()
    for library in (root / folder.lstrip("/") for folder in _RABBITMQ):
        scripts = [*library.glob("rabbitmq_server-*/sbin/rabbitmq-server")]
        scripts += library.glob("sbin/rabbitmq-server")
        if scripts:
            return max(scripts)
    return None


def find_postgresql() -> Path | None:
    """Return the folder with the programs of the newest PostgreSQL installed, or None."""
    for library in map(Path, _POSTGRESQL):
        programs = [*library.glob("bin/initdb"), *library.glob("*/bin/initdb")]
        if programs:
            return max(programs, key=lambda path: _number(path.parent.parent.name)).parent
    return None


def find_mariadb() -> Path | None:
    """Return the program of the MariaDB server that is installed, or None."""
    found = shutil.which("mariadbd", path=os.pathsep.join(_MARIADB))
    return None if found is None else Path(found)


def _number(name: str) -> float:
    digits = "".join(char for char in name.rpartition("@")[2] if char.isdigit() or char == ".")
    return float(digits or 0)


@contextlib.contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Yield free loopback ports, bound until the end of the block so that they differ."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(ports) == count:
                break
            candidate = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                ports.append(port)
        yield ports


def first_byte(port: int, request: bytes, *, skip: int = 0) -> bytes:
    """Send ``request`` to a local server; return the byte behind ``skip`` others, b"" if none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
        link.sendall(request)
        return link.recv(skip + 1, socket.MSG_WAITALL)[skip:]
    return b""


class ServerMissing(RuntimeError):
    """A server is not installed; the message says how to install it."""


class PrivateServer(ABC):
    """A server on free ports of 127.0.0.1, with its data in a temporary folder.

    It ends with this process: when that exits and, if ``setpriv`` is installed (Linux), also when
    it is killed, which leaves only the folder behind. Not thread-safe.

    A subclass names the server and its command, writes its configuration (``_prepare``), and checks
    whether it is up (``_answers``).

    Attributes:
        port: the port that it listens on; 0 before the first start.
    """

    _name: str
    """The server's name for messages and, in lower case, for the folder."""
    _kill_with = signal.SIGKILL
    """The signal that ends the server and all its child processes at once."""

    def __init__(self, *, directory: Path | None = None, user: str | None = None) -> None:
        """Make a server, not started yet.

        Args:
            directory: the parent of the temporary folder; by default the system's default.
            user: the user that the server runs as, if not the caller's; only root can choose.
        """
        self._directory = directory
        self._user = user
        # The kernel ends the server when the *thread* that started it ends, so keep that thread.
        self._starter = ThreadPoolExecutor(1, "private-server")
        self._folder: Path | None = None
        self._owner = 0
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def pid(self) -> int:
        """The server's process id; 0 while it isn't running."""
        return self._process.pid if self._process is not None and self.running else 0

    @property
    def running(self) -> bool:
        """Whether the server's process is running."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 60.0) -> Self:
        """Start the server and wait until it answers, at most ``timeout`` seconds.

        A server that is already running is left as it is. One that fails to start leaves nothing
        behind.

        Raises:
            TimeoutError: it didn't answer, or has exited; the message ends with its log.
        """
        if not self.running:
            self._process = None
            try:
                self._launch(self._folder or self._make_folder(), time.monotonic() + timeout)
            except BaseException:
                self.stop()
                raise
        return self

    def kill(self) -> None:
        """Stop the server as a power cut would; it keeps its data."""
        if self._process is not None:
            self._signal(self._kill_with)
            self._process.wait(_STOP_TIMEOUT)

    def restart(self, timeout: float = 60.0) -> None:
        """Kill the server if it runs, and start it again with the same data and ports."""
        self.kill()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze the server, and return once it is: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_TIMEOUT
        while _CAN_AWAIT_STOP and self.running and time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None:
                return
            time.sleep(0.001)

    def resume(self) -> None:
        """Let a frozen server continue."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        self.resume()
        self.kill()
        self._process = None
        atexit.unregister(self._stop_at_exit)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def log_tail(self, size: int = 4000) -> str:
        """Return the last ``size`` characters of the server's output and logs."""
        if self._folder is None:
            return ""
        logs = [self._folder / _OUTPUT, *sorted((self._folder / "log").glob("*.log"))]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())[-size:]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------- what differs between servers

    @abstractmethod
    def _prepare(self, folder: Path) -> None:
        """Choose the ports, and write configuration and empty data into a new ``folder``."""

    @abstractmethod
    def _command(self, folder: Path) -> list[str]:
        """Return the command line of the server."""

    @abstractmethod
    def _answers(self) -> bool:
        """Return whether the server accepts clients."""

    def _launch(self, folder: Path, deadline: float) -> None:
        """Start the server and wait until it answers."""
        with (folder / _OUTPUT).open("ab") as output:
            self._process = self._spawn(self._command(folder), output)
        self._wait_for(self._answers, deadline)

    def _signal(self, number: int) -> None:
        """Send a signal to the server's session: its process, and those that it started."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)  # self.pid may be 0 by now: our own group

    # ---------------------------------------------------------------------- for the subclasses

    def _spawn(self, command: Sequence[str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        """Start a process in a new session; it ends when this process does."""
        setpriv = shutil.which("setpriv")
        death_signal = self._kill_with.name.removeprefix("SIG")
        prefix = [setpriv, "--pdeathsig", death_signal] if setpriv else []
        return self._starter.submit(
            subprocess.Popen,
            [*prefix, *command],
            env=self._environment,
            cwd=self._folder,
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).result()

    def _run(self, command: Sequence[str], timeout: float = 60.0) -> str:
        """Run one of the server's programs to completion, and return its output.

        Raises:
            subprocess.CalledProcessError: the program failed.
        """
        return subprocess.run(
            command,
            env=self._environment,
            cwd=self._folder,
            user=self._user,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=True,
        ).stdout.decode()

    def _wait_for(self, answers: Callable[[], bool], deadline: float) -> None:
        while not answers():
            status = None if self._process is None else self._process.poll()
            if status is not None or time.monotonic() > deadline:
                how = "does not answer" if status is None else f"exited with status {status}"
                raise TimeoutError(f"{self._name} on port {self.port} {how}:\n{self.log_tail()}")
            time.sleep(0.02)

    # -------------------------------------------------------------------------------- internal

    def _make_folder(self) -> Path:
        prefix = f"outbox-{self._name.lower()}-"
        folder = self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._directory))
        self._owner = os.getpid()
        atexit.register(self._stop_at_exit)
        if self._user is not None:
            shutil.chown(folder, self._user)
        known = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        self._environment = {**known, "LC_ALL": "C.UTF-8", "HOME": str(folder)}
        self._prepare(folder)
        return folder

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._owner:  # not in a fork, which must leave the server running
            self.stop()
