"""A private MariaDB server for tests and benchmarks of the durable outbox."""

from __future__ import annotations

import os
from pathlib import Path

from outbox.testing.servers import (
    PrivateServer,
    ServerMissing,
    find_mariadb,
    first_byte,
    free_ports,
)

__all__ = ["MariaDBMissing", "PrivateMariaDB"]

_CONFIG = """\
[mariadbd]
datadir = {data}
bind-address = 127.0.0.1
port = {port}
socket = {folder}/mariadb.sock
pid-file = {folder}/mariadb.pid
init-file = {folder}/account.sql
# Apart from other servers, since one that starts deletes what it finds there of temporary tables.
tmpdir = {folder}
max_connections = 100
skip-name-resolve
innodb_buffer_pool_size = 64M
innodb_log_file_size = 32M
# As on servers that were set up long ago: the tables must not depend on it.
character-set-server = latin1
collation-server = latin1_swedish_ci
"""

# Executed at every start, before the server takes clients. No password opens the accounts of the
# installation.
_ACCOUNT = """\
CREATE USER IF NOT EXISTS outbox@127.0.0.1;
GRANT ALL PRIVILEGES ON *.* TO outbox@127.0.0.1 WITH GRANT OPTION;
CREATE DATABASE IF NOT EXISTS outbox;
"""


class MariaDBMissing(ServerMissing):
    """No MariaDB server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no MariaDB server found: install one (Debian and Ubuntu: "
            "sudo apt-get install mariadb-server)"
        )


class PrivateMariaDB(PrivateServer):
    """A MariaDB server on a free port of 127.0.0.1, with its data in a temporary folder.

    It takes about 3 seconds to start, and ends with this process. Every user of this machine can
    connect as ``outbox`` without a password. Started by root, it runs as the user ``mysql``. Not
    thread-safe.

    Example:
        with PrivateMariaDB() as server:
            create_engine(server.url)
    """

    _name = "MariaDB"

    def __init__(self) -> None:
        """Find the installed server, without starting it.

        Raises:
            MariaDBMissing: MariaDB isn't installed.
        """
        super().__init__(user="mysql" if os.geteuid() == 0 else None)
        program = find_mariadb()
        if program is None:
            raise MariaDBMissing
        self._program = program

    @property
    def url(self) -> str:
        """The URL of the database ``outbox``, for SQLAlchemy with PyMySQL."""
        return f"mariadb+pymysql://outbox@127.0.0.1:{self.port}/outbox"

    def _prepare(self, folder: Path) -> None:
        data = folder / "data"
        with free_ports(1) as (port,):
            self.port = port
        config = folder / "mariadb.cnf"
        config.write_text(_CONFIG.format(data=data, folder=folder, port=port))
        (folder / "account.sql").write_text(_ACCOUNT)
        self._run(
            [
                str(self._program.parent.parent / "bin" / "mariadb-install-db"),
                f"--defaults-file={config}",
                "--auth-root-authentication-method=socket",
                "--skip-test-db",
            ]
        )

    def _command(self, folder: Path) -> list[str]:
        return [str(self._program), f"--defaults-file={folder / 'mariadb.cnf'}"]

    def _answers(self) -> bool:
        """Return whether it greets clients; a server that is full or starting says "ff"."""
        return first_byte(self.port, b"", skip=4) == b"\x0a"
