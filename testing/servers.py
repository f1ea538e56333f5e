"""What private servers have in common: where they are installed, their ports, their processes.

Imports nothing of outbox: the scripts ask it before anything is installed.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

__all__ = ["Spawner", "find_postgresql", "find_rabbitmq", "free_ports"]

_RABBITMQ = ("/usr/lib/rabbitmq/lib", "/usr/local/lib/rabbitmq", "/opt/homebrew/opt/rabbitmq")
_POSTGRESQL = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt")

# Below what systems give to outgoing connections (Linux from 32768, others from 49152): while a
# server is dead, none of those can take its port, nor a client connect to itself there.
_PORTS = range(20000, 32768)


def find_rabbitmq() -> Path | None:
    """Return RabbitMQ's own start script, or None.

    Not the wrapper on the PATH, which on Debian switches to the user ``rabbitmq``: the script in
    RabbitMQ's library folder runs as the caller.
    """
    for library in map(Path, _RABBITMQ):
        found = [*library.glob("rabbitmq_server-*/sbin/rabbitmq-server")]
        found += library.glob("sbin/rabbitmq-server")
        if found:
            return max(found)
    return None


def find_postgresql() -> Path | None:
    """Return the folder of PostgreSQL's programs, of the newest version there is, or None."""
    for library in map(Path, _POSTGRESQL):
        found = [*library.glob("bin/initdb"), *library.glob("*/bin/initdb")]
        if found:
            return max(found, key=lambda path: _number(path.parent.parent.name)).parent
    return None


def _number(name: str) -> float:
    digits = "".join(one for one in name.rpartition("@")[2] if one.isdigit() or one == ".")
    return float(digits or 0)


class Spawner:
    """Starts processes that end with this one, however it dies, where there is ``setpriv`` (Linux).

    The kernel ends them when the *thread* that started them ends, so one is kept for that.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._thread = ThreadPoolExecutor(1, "private-server")

    def spawn(
        self,
        command: Sequence[str],
        folder: str,
        output: IO[bytes] | int,
        *,
        env: Mapping[str, str],
        user: str | None = None,
        death_signal: str = "KILL",
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` in ``folder``, in a session of its own, with ``output`` for both."""
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", death_signal] if setpriv else []
        return self._thread.submit(
            subprocess.Popen,
            [*prefix, *command],
            env=dict(env),
            cwd=folder,
            user=user,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).result()


@contextlib.contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Yield free loopback ports, taken until the end of the block so that they differ."""
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
