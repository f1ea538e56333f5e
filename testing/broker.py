"""A private RabbitMQ node: for tests, demonstrations and benchmarks that want the real thing."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from outbox.testing.servers import (
    PrivateServer,
    ServerMissing,
    find_rabbitmq,
    first_byte,
    free_ports,
)

__all__ = ["BrokerMissing", "PrivateBroker"]

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_EPMD_NAMES = b"\x00\x01n"  # a request for the nodes that it knows: NAMES_REQ
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


class BrokerMissing(ServerMissing):
    """No RabbitMQ server is installed."""

    def __init__(self) -> None:
        super().__init__(
            "no RabbitMQ server found: install one (Debian and Ubuntu: "
            "sudo apt-get install rabbitmq-server; macOS: brew install rabbitmq)"
        )


class PrivateBroker(PrivateServer):
    """A RabbitMQ node with its own name, ports, data and logs, on 127.0.0.1 and in a folder.

    A node takes about 5 seconds to start and one to stop. It and its port mapper (epmd) are
    children of this process and end with it: at its exit, and where there is ``setpriv`` (Linux)
    also when it is killed, which leaves only the temporary folder behind. Not thread-safe.

    Example:
        with PrivateBroker() as broker:
            connect(broker.url)
    """

    _name = "RabbitMQ"

    def __init__(self, *, directory: Path | None = None) -> None:
        """Find a server; nothing is started yet.

        Args:
            directory: where the temporary folder is made; by default the system's place for such.

        Raises:
            BrokerMissing: there is none.
        """
        super().__init__(directory=directory)
        server = find_rabbitmq()
        if server is None:
            raise BrokerMissing
        self._server = server
        self._epmd: subprocess.Popen[bytes] | None = None
        self._epmd_port = 0
        self._empty: list[str] = []
        self._used: list[str] = []

    @property
    def url(self) -> str:
        """The AMQP URL, with the user guest."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def shut_down(self) -> None:
        """Stop the node in an orderly way; its data stay."""
        if self._process is not None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT)
            self.kill()

    def stop(self) -> None:
        """Stop the node and its port mapper, and remove the folder."""
        self.resume()
        self.shut_down()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(_STOP_TIMEOUT)
            self._epmd = None
        super().stop()
        self._empty, self._used = [], []

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl`` against the node and return what it prints; it takes a second or two.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        return self._run([str(self._server.with_name("rabbitmqctl")), *arguments], timeout)

    def empty_url(self) -> str:
        """Return the URL of a virtual host with nothing in it, never returned before.

        They are made sixteen at a time, which takes a second; the other fifteen calls take none.

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
        """Take back a URL of ``empty_url``: its virtual host is deleted when others are made."""
        self._used.append(url)

    def _prepare(self, folder: Path) -> None:
        with free_ports(3) as (self.port, distribution, self._epmd_port):
            pass
        (folder / "rabbitmq.conf").write_text(_CONFIG.format(port=self.port))
        (folder / "plugins").write_text("[].\n")
        paths = {
            "RABBITMQ_CONFIG_FILE": "rabbitmq.conf",
            # There are none of these three: the machine's own, in /etc, are not for this node.
            "RABBITMQ_ADVANCED_CONFIG_FILE": "advanced.config",
            "RABBITMQ_CONFIG_FILES": "conf.d",
            "RABBITMQ_CONF_ENV_FILE": "none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "plugins",
            "RABBITMQ_MNESIA_BASE": "data",
            "RABBITMQ_LOG_BASE": "log",
            "RABBITMQ_PID_FILE": "node.pid",
        }
        self._environment |= {
            **{variable: str(folder / name) for variable, name in paths.items()},
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"outbox-{self.port}@localhost",
            # The script then becomes the Erlang machine, rather than its parent.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput {_SCHEDULERS} {_KERNEL}",
            "RABBITMQ_CTL_ERL_ARGS": _KERNEL,
        }

    def _command(self, folder: Path) -> list[str]:
        return [str(self._server)]

    def _launch(self, folder: Path, deadline: float) -> None:
        if self._epmd is None or self._epmd.poll() is not None:
            self._epmd = self._spawn([shutil.which("epmd") or "epmd"], subprocess.DEVNULL)
        # Nodes look for their port mapper once, when they start.
        self._wait_for(lambda: first_byte(self._epmd_port, _EPMD_NAMES) != b"", deadline)
        super()._launch(folder, deadline)

    def _answers(self) -> bool:
        # A method frame: Connection.Start.
        return first_byte(self.port, _PROTOCOL_HEADER) == b"\x01"
