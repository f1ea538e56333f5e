"""The proving ground: a broker behind a proxy, programs, witnesses, and load on the servers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from outbox.testing.broker import PrivateBroker
from proving.cast import SPOOL, free_port, programs
from proving.database import Database
from proving.history import Journal
from proving.load import WRITERS, Load
from proving.processes import Program
from proving.proxy import FaultProxy
from proving.queues import CALLS, CONSUMED, PARKED, Queues
from proving.witness import Witness

__all__ = ["HABITS", "KINDS", "Ground"]

_RELAYS = ("relay", "relay2", "tenants")
KINDS = (*WRITERS, *_RELAYS, "worker", "calls", "pooler")
"""All kinds of programs; ``pooler`` is PgBouncer, before the database of ``relay2``."""
HABITS = ("late", "interrupt", "rotate", "misaddressed", "serializable")
"""What programs can do besides.

- ``late``: threads and tasks enqueue at about the end of their unit of work.
- ``interrupt``: signal handlers raise or publish in the script's main thread.
- ``rotate``: the script calls ``configure()`` every second.
- ``misaddressed``: some events go to an exchange that doesn't exist; needs parking.
- ``serializable``: some transactions are SERIALIZABLE.

Besides, with ``notify`` the durable scripts only notify relays of their events. Usually it doesn't.
"""
_QUIET = 2.5  # seconds within which every retry is back in its queue
_QUIET_CALLS = 5.0  # and every delayed call of a task
_END = 20.0  # seconds, beyond what is left to publish, for an orderly exit


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
        habits: Collection[str] = HABITS,
        bug: str = "",
        parking: bool = True,
        own_user: bool = True,
        patience: float = 90.0,
        drain: float = 90.0,  # longer than several outages in a row
    ) -> None:
        """Prepare a ground; entering it starts everything.

        Args:
            broker: a running broker.
            name: the name of the exchange; the names of the queues begin with it.
            folder: the folder for the history and the programs' logs.
            seed: the seed of everything random.
            kinds: the kinds of programs; ``database`` starts a database without its writer.
            habits: what they do besides, see :data:`HABITS`.
            bug: the bug to plant in all programs, see :mod:`proving.bugs`.
            parking: whether some events are unroutable at times; the broker has only one queue for
                them, so only one ground at a time can use it.
            own_user: whether the programs have a user of the broker, whose permission to publish
                can be withdrawn; making it takes a second.
            patience: the seconds that the worker gets in the end to get on with what is left.
            drain: the seconds that programs get to publish what is left when they end.
        """
        self.broker = broker
        self.name = name
        self.history = Journal(folder, "driver")
        self.proxy = FaultProxy(broker.url)
        self._queues = Queues(broker, name)
        self._database = (
            Database(pooler="pooler" in kinds)
            if {"durable", "django", "caller", "database"} & set(kinds)
            else None
        )
        self._consumed = CONSUMED if self._database is not None else CONSUMED[:2]
        self._parking = parking
        self._own_user = own_user
        self._patience = patience
        self._drain = drain
        self._folder = folder
        self._seed = seed
        self._kinds = kinds
        self._habits = habits
        self._bug = bug
        self._load: Load | None = None
        self._variables: dict[str, str] = {}
        self.programs: dict[str, Program] = {}
        queues = {f"{name}.ledger": "ledger"}
        queues |= {f"{name}.{queue}.dead": "dead" for queue in (*CONSUMED, CALLS)}
        if parking:
            queues[PARKED] = "parked"
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
        self._queues.declare(parking=self._parking)
        url = self._queues.make_user(self.proxy.url) if self._own_user else self.proxy.url
        environment = self._variables = self._environment(url)
        pooler = None
        if self._database is not None:
            self._database.start()
            pooler = self._database.pooler_url
            environment["OUTBOX_DATABASE_URL"] = self._database.proxy.url
        ports = {"wsgi": free_port(), "asgi": free_port()}
        every = programs(environment, self._folder, ports, pooler, self._drain + _END)
        self.programs = {kind: each for kind, each in every.items() if kind in self._kinds}
        self._load = Load(
            self._folder,
            self._queues,
            [queue for _, queues, _ in self._workers() for queue in queues],
            self._database,
            {kind: port for kind, port in ports.items() if kind in self.programs},
            tasks="prefork" in self.programs,
            seed=self._seed,
        )
        for worker, queues, _ in self._workers():
            worker.start()
            for queue in queues:
                self._queues.waiting(queue)  # wait until it exists
        for program in self.programs.values():
            program.start()
        self.ledger.start()
        self.bounded.start()
        self._load.start()
        begin = time.monotonic()
        self._until(lambda: self.ledger.last > begin, begin + 60)
        return self

    def __exit__(self, *_: object) -> None:
        if self._load is not None:
            self._load.stop()
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

        All faults must have ended before. What doesn't arrive in time is left to the checker.
        """
        deadline = time.monotonic() + timeout
        if self._load is not None:
            self._load.stop()
        for kind in WRITERS:
            self.stop(kind, "terminate")
        if "spooled" in self.programs:
            self._drain_spool()
        if self._database is not None:
            database = self._database
            for kind in _RELAYS:
                self.start(kind)
            self._wait_until(lambda: not database.waiting(), deadline)
            database.write_commits(Journal(self._folder, "database"))
            for kind in _RELAYS:
                self.stop(kind, "terminate")
        for worker, its_queues, quiet in self._workers():
            self._let_finish(worker, its_queues, quiet)
        if self._database is not None:
            self._database.write_effects(Journal(self._folder, "effects"))
            self._database.write_results(Journal(self._folder, "results"))
        queues = ("ledger", "bounded", *(f"{queue}.dead" for queue in (*CONSUMED, CALLS)))
        self._wait_until(
            lambda: (
                time.monotonic() - max(self.ledger.last, self.bounded.last) > 1
                and not any(map(self._queues.waiting, queues))
            ),
            max(deadline, time.monotonic() + _END),
        )

    def _drain_spool(self) -> None:
        """Publish what killed processes have left, as an operator does."""
        command = [sys.executable, "-m", "outbox", "spool", "drain"]
        folder = str(self._folder / SPOOL)
        done = subprocess.run(
            [*command, "--spool", folder],
            env={**os.environ, **self._variables},
            capture_output=True,
            text=True,
            timeout=self._drain + _END,
            check=False,
        )
        if done.returncode:
            self.history.write("astray", process="outbox spool drain", how=done.stderr[-1000:])

    def _workers(self) -> list[tuple[Program, Collection[str], float]]:
        """Return the workers, their queues, and the seconds within which all is back in these."""
        found = (("worker", self._consumed, _QUIET), ("calls", (CALLS,), _QUIET_CALLS))
        return [
            (self.programs[kind], queues, quiet)
            for kind, queues, quiet in found
            if kind in self.programs
        ]

    def _let_finish(self, worker: Program, queues: Collection[str], quiet: float) -> None:
        """Wait until the worker's queues are empty, and end it.

        It gets all seconds again whenever fewer are left: on a slow machine it may have thousands.
        """
        waiting, deadline = sys.maxsize, time.monotonic() + self._patience
        while time.monotonic() < deadline:
            worker.start()
            empty_since = time.monotonic()
            while time.monotonic() < min(deadline, empty_since + quiet):
                time.sleep(0.1)
                left = sum(map(self._queues.waiting, queues))
                if left:
                    empty_since = time.monotonic()
                if left < waiting:
                    waiting, deadline = left, time.monotonic() + self._patience
            worker.terminate(self.history)
            time.sleep(quiet)  # it may have had messages in hand, whose retries are on their way
            # Messages that are left were not acked: start the worker again to process them.
            left = sum(map(self._queues.waiting, queues))
            if not left:
                return
        self.history.write("astray", process="the proof", how=f"{left} messages still wait")

    def stop(self, kind: str, way: str) -> None:
        """Kill or terminate the program of ``kind``, if there is one. Thread-safe."""
        program = self.programs.get(kind)
        if program is not None:
            (program.kill if way == "kill" else program.terminate)(self.history)

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
        self._queues.unbind()

    def bind(self) -> None:
        """Restore the binding. Thread-safe."""
        self._queues.bind()

    def permit(self, *, writing: bool) -> None:
        """Grant the programs' permission to publish, or withdraw it. Thread-safe.

        Their connections are cut, since the broker remembers for a while what it has permitted.
        """
        if self._own_user:
            self._queues.permit(writing=writing)
            if not writing:
                self.proxy.cut()

    def _environment(self, url: str) -> dict[str, str]:
        return {
            "OUTBOX_URL": url,
            "OUTBOX_EXCHANGE": self.name,
            "OUTBOX_TIMEOUT": "1",
            "OUTBOX_STALL_TIMEOUT": "3",
            "OUTBOX_CONNECT_TIMEOUT": "2",
            "OUTBOX_HEARTBEAT": "4",
            "OUTBOX_DRAIN_TIMEOUT": f"{self._drain:.0f}",
            "PROVE_NAME": self.name,
            "PROVE_BUG": self._bug,
            "PROVE_WORK": "yes" if "worker" in self._kinds else "",
            "PROVE_KINDS": ",".join(self._event_kinds()),
            "PROVE_HABITS": ",".join(self._habits),
            "PROVE_TENANTS": "yes" if "tenants" in self._kinds else "",
            "PYTHONUNBUFFERED": "1",
        }

    def _event_kinds(self) -> list[str]:
        kinds = ["shaky", "bounded"] if self._parking else ["bounded"]
        if self._parking and "misaddressed" in self._habits:
            kinds.append("misaddressed")
        if "worker" in self._kinds:
            kinds += ["task", "charge"] if self._database is not None else ["task"]
        return kinds

    def _wait_until(self, done: Callable[[], bool], deadline: float) -> bool:
        """Wait until ``done()``, and return whether that was before ``deadline``."""
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _until(self, done: Callable[[], bool], deadline: float) -> None:
        if not self._wait_until(done, deadline):
            logs = "\n".join(program.log() for program in self.programs.values())
            raise RuntimeError(f"nothing has arrived:\n{logs}")
