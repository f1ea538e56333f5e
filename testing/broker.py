"""A private RabbitMQ node for tests, demos and benchmarks."""

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
    rabbitmq_root,
)

__all__ = ["BrokerMissing", "PrivateBroker"]

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_EPMD_NAMES = b"\x00\x01n"  # NAMES_REQ: a request for the registered nodes
_STOP_TIMEOUT = 20.0  # seconds

_CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
num_acceptors.tcp = 2
loopback_users = none
log.file.level = warning
log.console = false
"""

# Another root folder has no /proc, where the node reads how much memory there is and how much it
# uses; without either it would never block publishers.
_CONFIG_WITHOUT_PROC = """\
total_memory_available_override_value = 4GB
vm_memory_calculation_strategy = allocated
"""

# Loopback only, and with our own port mapper: one that Erlang starts would outlive the node.
_KERNEL = "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false"
# Two schedulers without busy waiting, so that an idle node uses no CPU.
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
    """Return the virtual hosts of ``urls`` as Erlang binaries."""
    return ", ".join(f'<<"{url.rpartition("/")[2]}">>' for url in urls)


class BrokerMissing(ServerMissing):
    """No RabbitMQ server is installed."""

    def __init__(self) -> None:
        root = rabbitmq_root()
        super().__init__(
            "no RabbitMQ server found: install one (Debian and Ubuntu: "
            "sudo apt-get install rabbitmq-server; macOS: brew install rabbitmq)"
            if root == Path("/")
            else f"no RabbitMQ server found in {root}, which OUTBOX_TEST_RABBITMQ names: unset it, "
            "or set it to the root folder of a system with RabbitMQ (scripts/rabbitmq-4 makes one)"
        )


class PrivateBroker(PrivateServer):
    """A RabbitMQ node on free ports of 127.0.0.1, with its data and logs in a temporary folder.

    It takes about 5 seconds to start and one to stop. The node and its port mapper (epmd) are
    children of this process and end with it: when it exits and, if ``setpriv`` is installed
    (Linux), also when it is killed, which leaves only the folder behind. Not thread-safe.

    Where the variable OUTBOX_TEST_RABBITMQ names the root folder of another system, the server
    installed there is started instead, with that folder as its root; only root may do so.

    Example:
        with PrivateBroker() as broker:
            connect(broker.url)
    """

    _name = "RabbitMQ"

    def __init__(self, *, directory: Path | None = None) -> None:
        """Find the installed server, without starting it.

        Args:
            directory: the parent of the temporary folder; by default the system's default.

        Raises:
            BrokerMissing: RabbitMQ isn't installed.
            ValueError: ``directory`` is outside of the server's root folder.
        """
        self._root = rabbitmq_root()
        if directory is None and self._root != Path("/"):
            directory = self._root / "tmp"
        if directory is not None and not directory.resolve().is_relative_to(self._root):
            raise ValueError(f"{directory} is outside of {self._root}, the server's root folder")
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
        """Shut the node down cleanly; it keeps its data."""
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
        """Run ``rabbitmqctl`` on the node and return its output; this takes a second or two.

        Raises:
            subprocess.CalledProcessError: the command failed.
        """
        return self._run(self._inside(self._server.with_name("rabbitmqctl"), *arguments), timeout)

    def empty_url(self) -> str:
        """Return the URL of an empty virtual host, a new one at each call.

        They are created sixteen at a time, so one call in sixteen takes a second.

        Raises:
            subprocess.CalledProcessError: the node couldn't create them.
        """
        if not self._empty:
            made = [f"{self.url}{uuid.uuid4().hex}" for _ in range(_VHOSTS)]
            # rabbitmqctl's commands would be two for each host, and each takes a second.
            self.ctl("eval", _MAKE_VHOSTS.format(names=_names(made), dropped=_names(self._used)))
            self._empty, self._used = made, []
        return self._empty.pop()

    def give_back(self, url: str) -> None:
        """Take back a URL of ``empty_url``; creating more virtual hosts deletes this one."""
        self._used.append(url)

    def _prepare(self, folder: Path) -> None:
        with free_ports(3) as (self.port, distribution, self._epmd_port):
            pass
        config = _CONFIG if self._root == Path("/") else _CONFIG + _CONFIG_WITHOUT_PROC
        (folder / "rabbitmq.conf").write_text(config.format(port=self.port))
        (folder / "plugins").write_text("[].\n")
        paths = {
            "RABBITMQ_CONFIG_FILE": "rabbitmq.conf",
            # These three files don't exist: the node must not read the machine's, in /etc.
            "RABBITMQ_ADVANCED_CONFIG_FILE": "advanced.config",
            "RABBITMQ_CONFIG_FILES": "conf.d",
            "RABBITMQ_CONF_ENV_FILE": "none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "plugins",
            "RABBITMQ_MNESIA_BASE": "data",
            "RABBITMQ_LOG_BASE": "log",
            "RABBITMQ_PID_FILE": "node.pid",
        }
        self._environment |= {
            **{variable: self._path_inside(folder / name) for variable, name in paths.items()},
            "HOME": self._path_inside(folder),
            "TMPDIR": self._path_inside(folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"outbox-{self.port}@localhost",
            # With this the script becomes the Erlang VM (exec) instead of its parent.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput {_SCHEDULERS} {_KERNEL}",
            "RABBITMQ_CTL_ERL_ARGS": _KERNEL,
        }

    def _command(self, folder: Path) -> list[str]:
        return self._inside(self._server)

    def _launch(self, folder: Path, deadline: float) -> None:
        if self._epmd is None or self._epmd.poll() is not None:
            self._epmd = self._spawn(self._inside(self._find_epmd()), subprocess.DEVNULL)
        # Nodes look for their port mapper once, when they start.
        self._wait_for(lambda: first_byte(self._epmd_port, _EPMD_NAMES) != b"", deadline)
        super()._launch(folder, deadline)

    def _answers(self) -> bool:
        # A method frame: Connection.Start.
        return first_byte(self.port, _PROTOCOL_HEADER) == b"\x01"

    def _find_epmd(self) -> Path:
        if self._root != Path("/"):
            return self._root / "usr/bin/epmd"
        return Path(shutil.which("epmd") or "epmd")

    def _inside(self, program: Path, *arguments: str) -> list[str]:
        """Return the command that runs one of the server's programs in the server's root folder.

        chroot becomes the program, so that its process id is the one that we know.
        """
        if self._root == Path("/"):
            return [str(program), *arguments]
        return ["chroot", str(self._root), self._path_inside(program), *arguments]

    def _path_inside(self, path: Path) -> str:
        """Return an absolute path as the server sees it."""
        if self._root == Path("/"):
            return str(path)
        return f"/{path.resolve().relative_to(self._root)}"
