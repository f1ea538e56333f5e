"""A private PostgreSQL server: for tests and benchmarks of the durable outbox."""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from outbox.testing.servers import Spawner, find_postgresql, free_ports

__all__ = ["PostgreSQLMissing", "PrivatePostgreSQL"]

_STOP_TIMEOUT = 20.0  # seconds

_CONFIG = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 100
max_prepared_transactions = 10
shared_buffers = 64MB
log_min_messages = error
"""


class PostgreSQLMissing(RuntimeError):
    """No PostgreSQL server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no PostgreSQL server found: install one (Debian and Ubuntu: "
            "sudo apt-get install postgresql)"
        )


class PrivatePostgreSQL:
    """One server of its own, on a free port of 127.0.0.1, with its data in a temporary folder.

    It takes about 2 seconds to start. Anybody on this machine may connect, as ``postgres`` and
    without a password. It ends with this process. Root's runs as the user ``postgres``, since
    PostgreSQL refuses to run as root. Not thread-safe.

    Example:
        with PrivatePostgreSQL() as server:
            create_engine(server.url)
    """

    def __init__(self) -> None:
        """Find a server; nothing is started yet.

        Raises:
            PostgreSQLMissing: there is none.
        """
        programs = find_postgresql()
        if programs is None:
            raise PostgreSQLMissing
        self._programs = programs
        self._user = "postgres" if os.geteuid() == 0 else None
        self._spawner = Spawner()
        self._folder: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.port = 0

    @property
    def url(self) -> str:
        """The URL of the database ``postgres``, for SQLAlchemy."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        """The process id of the server; 0 while it does not run."""
        return self._server.pid if self.running and self._server is not None else 0

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._server is not None and self._server.poll() is None

    def start(self, timeout: float = 30.0) -> Self:
        """Start the server and wait until it answers, at most ``timeout`` seconds.

        A server that runs already is left as it is. One that fails to start leaves nothing behind.

        Raises:
            TimeoutError: it does not answer, or has ended; the message ends with its log.
        """
        if self.running:
            return self
        deadline = time.monotonic() + timeout
        try:
            folder = self._folder or self._prepare()
            with (folder / "server.log").open("ab") as output:
                self._server = self._spawner.spawn(
                    [str(self._programs / "postgres"), "-D", str(folder / "data")],
                    str(folder),
                    output,
                    env=self._environment(),
                    user=self._user,
                    death_signal="QUIT",  # its own children go with it
                )
            while not self._answers():
                status = self._server.poll()
                if status is not None or time.monotonic() > deadline:
                    how = "does not answer" if status is None else f"ended with status {status}"
                    log = (folder / "server.log").read_text(errors="replace")[-4000:]
                    raise TimeoutError(f"PostgreSQL on port {self.port} {how}:\n{log}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """Stop the server as a power cut would, with all its connections; its data stay."""
        if self._server is not None and self.running:
            # Killed outright, its children would hold the port and the data for a while.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server.pid, signal.SIGQUIT)
            self._server.wait(_STOP_TIMEOUT)

    def restart(self, timeout: float = 30.0) -> None:
        """Kill the server if it runs, and start it anew with the same data and port."""
        self.kill()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze the server, every process of it: connections stay, nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._signal_all(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        if self._server is not None and self.running:
            self.resume()
            self.kill()
        self._server = None
        atexit.unregister(self._stop_at_exit)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self) -> Path:
        folder = self._folder = Path(tempfile.mkdtemp(prefix="outbox-postgresql-"))
        self._owner = os.getpid()
        atexit.register(self._stop_at_exit)
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        subprocess.run(
            [
                str(self._programs / "initdb"), "-D", str(folder / "data"), "-U", "postgres",
                "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync",
            ],
            env=self._environment(),
            cwd=folder,
            user=self._user,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )  # fmt: skip
        with free_ports(1) as (port,):
            self.port = port
        with (folder / "data" / "postgresql.conf").open("a") as config:
            config.write(_CONFIG.format(port=port))
        return folder

    def _environment(self) -> dict[str, str]:
        known = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        return {**known, "LC_ALL": "C.UTF-8", "HOME": str(self._folder)}

    def _signal_all(self, number: int) -> None:
        if self._server is None or not self.running:
            return
        # Each of its processes leads a session of its own.
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children")
        found = children.read_text().split() if children.exists() else []
        for pid in [self._server.pid, *map(int, found)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._owner:  # and not a fork of it
            self.stop()

    def _answers(self) -> bool:
        """Return whether it takes connections: it says so before anybody is let in."""
        address = ("127.0.0.1", self.port)
        startup = struct.pack(">I", 196608) + b"user\0postgres\0database\0postgres\0\0"
        with contextlib.suppress(OSError), socket.create_connection(address, 1) as connection:
            connection.sendall(struct.pack(">I", len(startup) + 4) + startup)
            return connection.recv(1) == b"R"  # authentication; an error is "E": still starting
        return False
