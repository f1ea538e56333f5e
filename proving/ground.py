"""The proving ground: a broker behind a proxy, programs, witnesses, and load on the servers."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

import pika

from outbox.testing.broker import PrivateBroker
from proving.database import Database
from proving.history import Journal
from proving.pace import Pace
from proving.processes import Program, Server
from proving.proxy import FaultProxy
from proving.witness import Witness

__all__ = ["KINDS", "Ground"]

_WRITERS = ("script", "wsgi", "asgi", "durable")
_RELAYS = ("relay", "relay2")
KINDS = (*_WRITERS, *_RELAYS, "worker")
_PARKED = "outbox.unroutable"
_BOUND = 20  # messages in the queue that fills up
_CONSUMED = ("orders", "tasks", "charges")
_PAUSE = 0.05  # seconds between two requests
_MOST_STORED = 300  # events in the database above which writers slow down
_MOST_CONSUMED = 1_500  # messages in the worker's queues above which writers slow down
_LOOK = 0.5  # seconds between two looks at these numbers
_QUIET = 2.5  # seconds within which every retry is back in its queue


class Ground:
    """Everything that runs during one proof. Not thread-safe, except methods that say so.

    Example:
        with Ground(broker, name, folder, seed=1) as ground:
            time.sleep(10)
            ground.settle()
    """

    def __init__(
        self,
        broker: PrivateBroker,
        name: str,
        folder: Path,
        *,
        seed: int,
        kinds: Collection[str] = KINDS,
        bug: str = "",
        parking: bool = True,
        patience: float = 90.0,
    ) -> None:
        """Prepare a ground; entering it starts everything.

        Args:
            broker: a running broker.
            name: the name of the exchange; the names of the queues begin with it.
            folder: the folder for the history and the programs' logs.
            seed: the seed of everything random.
            kinds: the kinds of programs; ``database`` starts a database without its writer.
            bug: the bug to plant in all programs, see :mod:`proving.bugs`.
            parking: whether some events are unroutable at times; the broker has only one queue for
                them, so only one ground at a time can use it.
            patience: the seconds that the worker gets in the end to finish.
        """
        self.broker = broker
        self.name = name
        self.history = Journal(folder, "driver")
        self.proxy = FaultProxy(broker.url)
        self._database = Database() if {"durable", "database"} & set(kinds) else None
        self._consumed = _CONSUMED if self._database is not None else _CONSUMED[:2]
        self._parking = parking
        self._patience = patience
        self._folder = folder
        self._chance = random.Random(seed)
        self._kinds = kinds
        self._bug = bug
        self._paces = {kind: Pace(folder, kind) for kind in _WRITERS}
        self._stopping = threading.Event()
        self._load: list[threading.Thread] = []
        self.programs: dict[str, Program] = {}
        queues = {f"{name}.ledger": "ledger"}
        queues |= {f"{name}.{queue}.dead": "dead" for queue in _CONSUMED}
        if parking:
            queues[_PARKED] = "parked"
        self.ledger = Witness(broker.url, queues, Journal(folder, "ledger"))
        bounded = {f"{name}.bounded": "bounded"}
        self.bounded = Witness(broker.url, bounded, Journal(folder, "bounded"))

    @property
    def database(self) -> Database:
        """The database of the programs."""
        if self._database is None:
            raise RuntimeError("this ground has no database")
        return self._database

    def __enter__(self) -> Self:
        self.proxy.start()
        self._declare()
        database = {}
        if self._database is not None:
            self._database.start()
            database["OUTBOX_DATABASE_URL"] = self._database.proxy.url
        environment = {
            "OUTBOX_URL": self.proxy.url,
            "OUTBOX_EXCHANGE": self.name,
            "OUTBOX_TIMEOUT": "1",
            "OUTBOX_STALL_TIMEOUT": "3",
            "OUTBOX_CONNECT_TIMEOUT": "2",
            "OUTBOX_HEARTBEAT": "4",
            "OUTBOX_DRAIN_TIMEOUT": "40",
            "PROVE_NAME": self.name,
            "PROVE_BUG": self._bug,
            "PROVE_WORK": "yes" if "worker" in self._kinds else "",
            "PROVE_KINDS": ",".join(self._event_kinds()),
            "PYTHONUNBUFFERED": "1",
            **database,
        }
        ports = _free_port(), _free_port()
        gunicorn = [
            *("gunicorn", "-k", "gthread", "--threads", "3", "--graceful-timeout", "20"),
            *("-b", f"127.0.0.1:{ports[0]}", "proving.programs.wsgi:app", "--log-level", "warning"),
        ]
        uvicorn = [
            *("uvicorn", "--port", str(ports[1]), "proving.programs.asgi:app"),
            *("--log-level", "warning"),
        ]
        consume = ["outbox.consumers", "proving.programs.worker", "-p", "2", "-t", "16"]
        consume += ["--log-level", "WARNING"]
        relay = ["proving.programs.relay"]
        every: dict[str, Callable[[], Program]] = {
            "script": lambda: Program(
                "script", ["proving.programs.script"], environment, self._folder
            ),
            "wsgi": lambda: Server("wsgi", gunicorn, environment, self._folder, children=99),
            "asgi": lambda: Server("asgi", uvicorn, environment, self._folder, children=0),
            "durable": lambda: Program(
                "durable", ["proving.programs.durable"], environment, self._folder
            ),
            "relay": lambda: Program("relay", relay, environment, self._folder),
            "relay2": lambda: Program("relay2", relay, environment, self._folder),
            "worker": lambda: Server("worker", consume, environment, self._folder, children=1),
        }
        self.programs = {kind: every[kind]() for kind in KINDS if kind in self._kinds}
        if "worker" in self.programs:
            self.programs["worker"].start()
            for queue in self._consumed:
                self._waiting(queue)  # wait until it exists
        for program in self.programs.values():
            program.start()
        self.ledger.start()
        self.bounded.start()
        self._load = [
            threading.Thread(target=self._request, args=(kind, port), name=f"load-{kind}")
            for kind, port in zip(("wsgi", "asgi"), ports, strict=True)
            if kind in self.programs
        ]
        self._load.append(threading.Thread(target=self._keep_pace, name="pace"))
        for load in self._load:
            load.start()
        begin = time.monotonic()
        self._until(lambda: self.ledger.last > begin, begin + 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_load()
        for program in self.programs.values():
            program.end()
        self.ledger.stop()
        self.bounded.stop()
        self.proxy.close()
        if self._database is not None:
            self._database.stop()

    def heal(self) -> None:
        """Let all proxies forward everything again."""
        self.proxy.heal()
        if self._database is not None:
            self._database.proxy.heal()

    def settle(self, timeout: float = 120.0) -> None:
        """End the writers, wait until everything has arrived, and end the worker.

        All faults must have ended before.

        Raises:
            RuntimeError: a program doesn't end as it should, or something doesn't arrive.
        """
        deadline = time.monotonic() + timeout
        self._stop_load()
        for kind in _WRITERS:
            if kind in self.programs:
                self.programs[kind].terminate()
        if self._database is not None:
            database = self._database
            for kind in _RELAYS:
                self.start(kind)
            self._until(lambda: not database.waiting(), deadline)
            database.write_commits(Journal(self._folder, "database"))
            for kind in _RELAYS:
                if kind in self.programs:
                    self.programs[kind].terminate()
        worker = self.programs.get("worker")
        if worker is not None:
            self._let_finish(worker)
            if self._database is not None:
                self._database.write_effects(Journal(self._folder, "effects"))
        queues = ("ledger", "bounded", *(f"{queue}.dead" for queue in _CONSUMED))
        self._until(
            lambda: (
                time.monotonic() - max(self.ledger.last, self.bounded.last) > 1
                and not any(map(self._waiting, queues))
            ),
            deadline,
        )

    def _let_finish(self, worker: Program) -> None:
        """Wait until the worker's queues are empty, and end it."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            worker.start()
            empty_since = time.monotonic()
            while time.monotonic() < min(deadline, empty_since + _QUIET):
                time.sleep(0.1)
                if any(map(self._waiting, self._consumed)):
                    empty_since = time.monotonic()
            worker.terminate()
            # Messages that are left were not acked: start the worker again to process them.
            if not any(map(self._waiting, self._consumed)):
                return

    def _event_kinds(self) -> list[str]:
        kinds = ["shaky", "bounded"] if self._parking else ["bounded"]
        if "worker" in self._kinds:
            kinds += ["task", "charge"] if self._database is not None else ["task"]
        return kinds

    def stop(self, kind: str, way: str) -> None:
        """Kill or terminate the program of ``kind``, if there is one. Thread-safe."""
        program = self.programs.get(kind)
        if program is not None and way == "kill":
            program.kill(self.history)
        elif program is not None:
            program.terminate()

    def start(self, kind: str) -> None:
        """Restart the program of ``kind``, if there is one. Thread-safe."""
        if kind in self.programs:
            self.programs[kind].start()

    def delay(self, seconds: float) -> None:
        """Delay every frame. Thread-safe."""
        self.proxy.delay = seconds

    def unbind(self) -> None:
        """Remove the binding that some events need. Thread-safe.

        Raises:
            RuntimeError: the broker is unavailable.
        """
        self._on_broker(
            lambda channel: channel.queue_unbind(f"{self.name}.ledger", self.name, "shaky.*")
        )

    def bind(self) -> None:
        """Restore the binding. Thread-safe."""
        self._on_broker(
            lambda channel: channel.queue_bind(f"{self.name}.ledger", self.name, "shaky.*")
        )

    def _declare(self) -> None:
        ledger, bounded = f"{self.name}.ledger", f"{self.name}.bounded"
        full = {"x-max-length": _BOUND, "x-overflow": "reject-publish"}

        def declare(channel: Any) -> None:
            channel.exchange_declare(self.name, "topic", durable=True)
            # Classic queues: a new quorum queue doesn't always survive a kill of its node.
            channel.queue_declare(ledger, durable=True)
            channel.queue_declare(bounded, durable=True, arguments=full)
            for queue in _CONSUMED:
                dead = f"{self.name}.{queue}.dead"
                channel.queue_declare(dead, durable=True, arguments={"x-queue-type": "quorum"})
            for topic in ("order.*", "task.*", "charge.*", "invoice.*", "shaky.*"):
                channel.queue_bind(ledger, self.name, topic)
            channel.queue_bind(bounded, self.name, "bounded.*")
            if self._parking:
                channel.queue_declare(_PARKED, durable=True, arguments={"x-queue-type": "quorum"})
                channel.queue_purge(_PARKED)

        self._on_broker(declare)

    def _waiting(self, queue: str, tries: int = 100) -> int:
        declared = self._on_broker(
            lambda channel: channel.queue_declare(f"{self.name}.{queue}", passive=True), tries
        )
        return int(declared.method.message_count)

    def _on_broker(self, action: Callable[[Any], Any], tries: int = 100) -> Any:
        parameters = pika.URLParameters(self.broker.url)
        parameters.socket_timeout = parameters.stack_timeout = 2.0
        last: Exception | None = None
        for _ in range(tries):
            try:
                connection = pika.BlockingConnection(parameters)
                try:
                    return action(connection.channel())
                finally:
                    with contextlib.suppress(Exception):
                        connection.close()
            except Exception as error:  # pika also raises exceptions outside its tree
                last = error
                time.sleep(0.2)
        raise RuntimeError(f"the broker at {self.broker.url} is unavailable") from last

    def _until(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(program.log() for program in self.programs.values())
                raise RuntimeError(f"not everything has arrived:\n{logs}")
            time.sleep(0.1)

    def _keep_pace(self) -> None:
        """Slow writers down while too much waits; keep the pace while the numbers are unknown."""
        consumed = self._consumed if "worker" in self._kinds else ()
        while not self._stopping.wait(_LOOK):
            try:
                waiting = sum(self._waiting(queue, tries=1) for queue in consumed)
                stored = self._database.waiting() if self._database is not None else 0
            except Exception:  # one is unavailable; pika also raises exceptions outside its tree
                continue
            for kind, pace in self._paces.items():
                is_late = kind == "durable" and stored > _MOST_STORED
                pace.set(slow=is_late or waiting > _MOST_CONSUMED)

    def _request(self, kind: str, port: int) -> None:
        """Send requests, and abort one in ten in the middle of the response."""
        while not self._stopping.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                response = connection.getresponse()
                response.read(10 if self._chance.random() < 0.1 else None)
            connection.close()
            self._stopping.wait(_PAUSE * self._paces[kind].factor)

    def _stop_load(self) -> None:
        self._stopping.set()
        for thread in self._load:
            thread.join(15)
        self._load = []


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        port: int = candidate.getsockname()[1]
        return port
