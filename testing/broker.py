"""A private RabbitMQ node: for tests, demonstrations and benchmarks that want the real thing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Self

__all__ = ["BrokerMissing", "PrivateBroker", "find_server"]

_LIBRARIES = ("/usr/lib/rabbitmq/lib", "/usr/local/lib/rabbitmq", "/opt/homebrew/opt/rabbitmq")
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_STOP_TIMEOUT = 20.0

_CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
num_acceptors.tcp = 2
loopback_users = none
log.file.level = warning
log.console = false
"""

# Loopback only, also for what Erlang opens between nodes.
_KERNEL = "-kernel inet_dist_use_interface {127,0,0,1}"
# Two schedulers that sleep at once when there is nothing to do: an idle node costs no CPU.
_SCHEDULERS = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"


class BrokerMissing(RuntimeError):
    """No RabbitMQ server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no RabbitMQ server found: install one (Debian and Ubuntu: "
            "sudo apt-get install rabbitmq-server), or set OUTBOX_TEST_AMQP_URL to one that runs"
        )


def find_server() -> Path | None:
    """Return RabbitMQ's own start script, or None.

    Not the wrapper on the PATH, which on Debian switches to the user ``rabbitmq``: the script in
    RabbitMQ's library folder runs as the caller.
    """
    for library in map(Path, _LIBRARIES):
        found = [*library.glob("rabbitmq_server-*/sbin/rabbitmq-server")]
        found += library.glob("sbin/rabbitmq-server")
        if found:
            return max(found)
    return None


class PrivateBroker:
    """One node of its own: name, ports, data and logs, all on 127.0.0.1 and in a temporary folder.

    A node takes about 5 seconds to start. It and its port mapper (epmd) are children of this
    process and end with it, at the latest when it dies. Not thread-safe.

    Example:
        with PrivateBroker() as broker:
            connect(broker.url)
    """

    def __init__(self) -> None:
        """Find a server; nothing is started yet.

        Raises:
            BrokerMissing: there is none.
        """
        server = find_server()
        if server is None:
            raise BrokerMissing
        self._server = server
        # Children are told to die with the thread that started them, so that thread must stay.
        self._spawner = ThreadPoolExecutor(1, "private-broker")
        self._folder: Path | None = None
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
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

        Raises:
            TimeoutError: it does not answer; the message ends with its log.
        """
        if self._folder is None:
            self._prepare()
        if self._epmd is None or self._epmd.poll() is not None:
            self._start_epmd()
        with Path(self._path("node.out")).open("ab") as output:
            self._node = self._spawner.submit(self._spawn, [str(self._server)], output).result()
        deadline = time.monotonic() + timeout
        while not self._answers():
            if not self.running or time.monotonic() > deadline:
                tail = self.log_tail()
                self.stop()
                raise TimeoutError(f"RabbitMQ does not answer on port {self.port}:\n{tail}")
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """Kill the node as a power cut would; its data stay."""
        if self._node is not None:
            self._signal_node(signal.SIGKILL)
            self._node.wait(_STOP_TIMEOUT)

    def restart(self, timeout: float = 60.0) -> None:
        """Kill the node if it runs, and start it anew with the same data and ports."""
        self.kill()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze the node: connections stay, nothing answers."""
        self._signal_node(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen node go on."""
        self._signal_node(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the node and its port mapper, and remove the folder."""
        if self._node is not None and self.running:
            self.resume()
            self._signal_node(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._node.wait(_STOP_TIMEOUT)
            self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(_STOP_TIMEOUT)
        self._node = self._epmd = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

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
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-broker-"))
        with _free_ports(3) as (port, distribution, epmd):
            self.port = port
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

    def _start_epmd(self) -> None:
        # Ours, in the foreground: one that Erlang starts by itself would survive the node.
        command = shutil.which("epmd") or "epmd"
        self._epmd = self._spawner.submit(self._spawn, [command], subprocess.DEVNULL).result()

    def _spawn(self, command: list[str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        # The kernel ends it when the thread that started it ends, however this process dies.
        setpriv = shutil.which("setpriv")
        if setpriv is not None:
            command = [setpriv, "--pdeathsig", "KILL", *command]
        return subprocess.Popen(
            command,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _signal_node(self, number: int) -> None:
        """Signal the node's session: the Erlang machine and the helpers that it started."""
        if self._node is not None and self._node.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._node.pid, number)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(_PROTOCOL_HEADER)
                return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
        except OSError:
            return False


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Yield free loopback ports, taken until the end of the block so that they differ."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            ports.append(taken.getsockname()[1])
        yield ports
