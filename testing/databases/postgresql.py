"""A private PostgreSQL server for tests and benchmarks of the durable outbox."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from pathlib import Path

from outbox.testing.servers import (
    PrivateServer,
    ServerMissing,
    find_postgresql,
    first_byte,
    free_ports,
)

__all__ = ["PostgreSQLMissing", "PrivatePostgreSQL"]

_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack(">II", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS  # protocol 3.0

_CONFIG = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 100
max_prepared_transactions = 10
shared_buffers = 64MB
log_min_messages = error
"""


class PostgreSQLMissing(ServerMissing):
    """No PostgreSQL server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no PostgreSQL server found: install one (Debian and Ubuntu: "
            "sudo apt-get install postgresql)"
        )


class PrivatePostgreSQL(PrivateServer):
    """A PostgreSQL server on a free port of 127.0.0.1, with its data in a temporary folder.

    It takes about 2 seconds to start, and ends with this process. Every user of this machine can
    connect as ``postgres`` without a password. Started by root, it runs as the user ``postgres``,
    since PostgreSQL refuses to run as root. Not thread-safe.

    Example:
        with PrivatePostgreSQL() as server:
            create_engine(server.url)
    """

    _name = "PostgreSQL"
    # After SIGKILL its child processes would hold the port and the data for a while.
    _kill_with = signal.SIGQUIT

    def __init__(self) -> None:
        """Find the installed server, without starting it.

        Raises:
            PostgreSQLMissing: PostgreSQL isn't installed.
        """
        super().__init__(user="postgres" if os.geteuid() == 0 else None)
        programs = find_postgresql()
        if programs is None:
            raise PostgreSQLMissing
        self._programs = programs

    @property
    def url(self) -> str:
        """The URL of the database ``postgres``, for SQLAlchemy."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def _prepare(self, folder: Path) -> None:
        data = folder / "data"
        options = ["-U", "postgres", "--auth", "trust", "--encoding", "UTF8", "--no-locale"]
        self._run([str(self._programs / "initdb"), "-D", str(data), *options, "--no-sync"])
        with free_ports(1) as (port,):
            self.port = port
        with (data / "postgresql.conf").open("a") as config:
            config.write(_CONFIG.format(port=port))

    def _command(self, folder: Path) -> list[str]:
        return [str(self._programs / "postgres"), "-D", str(folder / "data")]

    def _answers(self) -> bool:
        """Return whether it requests authentication ("R"); while starting, it answers "E"."""
        return first_byte(self.port, _STARTUP) == b"R"

    def _signal(self, number: int) -> None:
        super()._signal(number)
        if number in (signal.SIGSTOP, signal.SIGCONT):
            # Each child leads its own session, and the server doesn't pass these two signals on.
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
            for pid in children.read_text().split() if children.exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
