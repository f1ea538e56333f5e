"""A private PgBouncer in front of a PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.testing.servers import PrivateServer, ServerMissing, first_byte, free_ports

__all__ = ["PrivatePgBouncer"]

_SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"

_CONFIG = """\
[databases]
* = host=127.0.0.1 port={server} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
"""


class PrivatePgBouncer(PrivateServer):
    """A pooler in transaction mode: each transaction runs on one of 4 connections to the server."""

    _name = "PgBouncer"
    _kill_with = signal.SIGKILL

    def __init__(self, server: PrivatePostgreSQL) -> None:
        super().__init__(user="postgres" if os.geteuid() == 0 else None)
        program = shutil.which("pgbouncer", path="/usr/sbin:" + os.environ.get("PATH", ""))
        if program is None:
            raise ServerMissing("no PgBouncer found (Debian and Ubuntu: apt-get install pgbouncer)")
        self._program = program
        self._server = server

    def _prepare(self, folder: Path) -> None:
        with free_ports(1) as (port,):
            self.port = port
        config = _CONFIG.format(server=self._server.port, port=port)
        (folder / "pgbouncer.ini").write_text(config)
        (folder / "pgbouncer.ini").chmod(0o644)

    def _command(self, folder: Path) -> list[str]:
        return [self._program, str(folder / "pgbouncer.ini")]

    def _answers(self) -> bool:
        return first_byte(self.port, _SSL_REQUEST) == b"N"
