"""A private RabbitMQ node: for tests, demonstrations and benchmarks that want the real thing."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Self

from outbox.testing.servers import Spawner, find_rabbitmq, free_ports

__all__ = ["BrokerMissing", "PrivateBroker"]

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_STOP_TIMEOUT = 20.0  # seconds

_CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
num_acceptors.tcp = 2
loopback_users = none
log.file.level = warning
log.console = false
"""

# Loopback only; and no port mapper but ours: one that Erlang starts by itself outlives the node.
_KERNEL = "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false"
# Two schedulers that sleep at once when there is nothing to do: an idle node costs no CPU.
_SCHEDULERS = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"


_VHOSTS = 16

_MAKE_VHOSTS = """
[ok = rabbit_vhost:delete(Name, <<"outbox">>) || Name <- [{dropped}]],
[begin
    ok = rabbit_vhost:add(Name, <<"outbox">>),
    ok = rabbit_auth_backend_internal:set_permissions(
        <<"guest">>, Name, <<".*">>, <<".*">>, <<".*">>, <<"outbox">>)
end || Name <- [{names}]].
"""


def _names(urls: Sequence[str]) -> str:
    """Return the virtual hosts of ``urls`` as Erlang's binaries."""
    return ", ".join(f'<<"{url.rpartition("/")[2]}">>' for url in urls)


class BrokerMissing(RuntimeError):
    """No RabbitMQ server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no RabbitMQ server found: install one (Debian and Ubuntu: "
            "sudo apt-get install rabbitmq-server; macOS: brew install rabbitmq)"
        )


class PrivateBroker:
    """One node of its own: name, ports, data and logs, all on 127.0.0.1 and in a temporary folder.

    A node takes about 5 seconds to start and one to stop. It and its port mapper (epmd) are
    children of this process and end with it: at its exit, and where there is ``setpriv`` (Linux)
    also when it is killed, which leaves the folder alone behind. Not thread-safe.

    Example:
        with PrivateBroker() as broker:
            connect(broker.url)
    """

    def __init__(self, *, directory: Path | None = None) -> None:
        """Find a server; nothing is started yet.

        Args:
            directory: where the temporary folder is made; by default the system's place for such.

        Raises:
            BrokerMissing: there is none.
        """
        server = find_rabbitmq()
        if server is None:
            raise BrokerMissing
        self._server = server
        self._directory = directory
        self._spawner = Spawner()
        self._folder: Path | None = None
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
        self._empty: list[str] = []
        self._used: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        """The AMQP URL, with the user guest."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def pid(self) -> int:
        """The process id of the node's Erlang machine; 0 while it does not run."""
        return self._node.pid if self.running and self._node is not None else 0

    @property
    def running(self) -> bool:
        """Whether the node's process runs."""
        return self._node is not None and self._node.poll() is None

    def start(self, timeout: float = 60.0) -> Self:
        """Start the node and wait until it answers AMQP, at most ``timeout`` seconds.

        A node that runs already is left as it is. One that fails to start leaves nothing behind.

        Raises:
            TimeoutError: it does not answer, or has ended; the message ends with its log.
        """
        if self.running:
            return self
        deadline = time.monotonic() + timeout
        self._node = None
        try:
            if self._folder is None:
                self._prepare()
            if self._epmd is None or self._epmd.poll() is not None:
                self._epmd = self._spawn(shutil.which("epmd") or "epmd", subprocess.DEVNULL)
            # Nodes look for their port mapper once, when they start.
            self._wait_for(self._epmd_answers, deadline)
            with Path(self._path("node.out")).open("ab") as output:
                self._node = self._spawn(str(self._server), output)
            self._wait_for(self._answers, deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """Kill the node as a power cut would; its data stay."""
        if self._node is not None:
            self._signal_node(signal.SIGKILL)
            self._node.wait(_STOP_TIMEOUT)

    def shut_down(self) -> None:
        """Stop the node in an orderly way; its data stay."""
        if self._node is not None:
            self._signal_node(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._node.wait(_STOP_TIMEOUT)
            self.kill()

    def restart(self, timeout: float = 60.0) -> None:
        """Kill the node if it runs, and start it anew with the same data and ports."""
        self.kill()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze the node: connections stay, nothing answers. It is frozen when this returns."""
        self._signal_node(signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_TIMEOUT
        while self.running and time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None:
                return
            time.sleep(0.001)

    def resume(self) -> None:
        """Let a frozen node go on."""
        self._signal_node(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the node and its port mapper, and remove the folder."""
        if self._node is not None and self.running:
            self.resume()
            self.shut_down()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(_STOP_TIMEOUT)
        self._node = self._epmd = None
        atexit.unregister(self._stop_at_exit)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
            self._empty, self._used = [], []

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl`` against the node and return what it prints; it takes a second or two.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        command = [str(self._server.with_name("rabbitmqctl")), *arguments]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, timeout=timeout, check=True
        )
        return done.stdout.decode()

    def empty_url(self) -> str:
        """Return the URL of a virtual host with nothing in it, never returned before.

        They are made sixteen at a time, which takes a second, and the rest nothing.

        Raises:
            subprocess.CalledProcessError: the node could not make them.
        """
        if not self._empty:
            made = [f"{self.url}{uuid.uuid4().hex}" for _ in range(_VHOSTS)]
            # rabbitmqctl's own commands would be two for each, and a second each.
            self.ctl("eval", _MAKE_VHOSTS.format(names=_names(made), dropped=_names(self._used)))
            self._empty, self._used = made, []
        return self._empty.pop()

    def give_back(self, url: str) -> None:
        """Have a virtual host that ``empty_url`` has returned deleted, when others are made."""
        self._used.append(url)

    def log_tail(self, size: int = 4000) -> str:
        """Return the last ``size`` characters of what the node has printed and logged."""
        if self._folder is None:
            return ""
        logs = [self._folder / "node.out", *sorted((self._folder / "log").glob("*.log"))]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())[-size:]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-broker-", dir=self._directory))
        self._owner = os.getpid()
        atexit.register(self._stop_at_exit)
        with free_ports(3) as (port, distribution, epmd):
            self.port = port
        self._epmd_port = epmd
        Path(self._path("rabbitmq.conf")).write_text(_CONFIG.format(port=port))
        Path(self._path("plugins")).write_text("[].\n")
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ},
            "LC_ALL": "C.UTF-8",
            "HOME": str(self._folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd),
            "RABBITMQ_NODENAME": f"outbox-{port}@localhost",
            # The script then becomes the Erlang machine, rather than its parent.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONFIG_FILE": self._path("rabbitmq.conf"),
            # There are none of these three: the machine's own, in /etc, are not for this node.
            "RABBITMQ_ADVANCED_CONFIG_FILE": self._path("advanced.config"),
            "RABBITMQ_CONFIG_FILES": self._path("conf.d"),
            "RABBITMQ_CONF_ENV_FILE": self._path("none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": self._path("plugins"),
            "RABBITMQ_MNESIA_BASE": self._path("data"),
            "RABBITMQ_LOG_BASE": self._path("log"),
            "RABBITMQ_PID_FILE": self._path("node.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput {_SCHEDULERS} {_KERNEL}",
            "RABBITMQ_CTL_ERL_ARGS": _KERNEL,
        }

    def _path(self, name: str) -> str:
        if self._folder is None:
            raise RuntimeError("the broker was not started, or has been stopped")
        return str(self._folder / name)

    def _spawn(self, program: str, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        return self._spawner.spawn([program], self._path(""), output, env=self._environment)

    def _signal_node(self, number: int) -> None:
        """Signal the node's session: the Erlang machine and the helpers that it started."""
        if self._node is not None and self._node.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._node.pid, number)

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._owner:  # and not a fork of it
            self.stop()

    def _wait_for(self, answers: Callable[[], bool], deadline: float) -> None:
        while not answers():
            status = None if self._node is None else self._node.poll()
            if status is not None or time.monotonic() > deadline:
                how = "does not answer" if status is None else f"ended with status {status}"
                raise TimeoutError(f"RabbitMQ on port {self.port} {how}:\n{self.log_tail()}")
            time.sleep(0.02)

    def _epmd_answers(self) -> bool:
        address = ("127.0.0.1", self._epmd_port)
        with contextlib.suppress(OSError), socket.create_connection(address, 1):
            return True
        return False

    def _answers(self) -> bool:
        address = ("127.0.0.1", self.port)
        with contextlib.suppress(OSError), socket.create_connection(address, 1) as connection:
            connection.sendall(_PROTOCOL_HEADER)
            return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
        return False
