"""Announces this process while its command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outbox.errors import BrokerError, UsageError
from outbox.presence.announcement import ENDED, encoded
from outbox.publisher import Publisher
from outbox.system.last_error import LastError
from outbox.system.version import installed_version
from outbox.transports.presence_records import PresenceRecords
from outbox.transports.registry import open_presence_records

__all__ = ["announced"]

logger = logging.getLogger("outbox.presence")

_EVERY = 10.0
_LONGEST_CLASS = 255
_LOOK = 1.0
"""Seconds between two looks whether there is something to announce: another phase, or the
connection that it takes."""
_END_WITHIN = 2.0
"""Seconds for which the end of a process waits until that is announced."""


@contextlib.contextmanager
def announced(
    publisher: Publisher,
    kind: str,
    *,
    id: str | None,
    phase: Callable[[], str],
    describe: Callable[[], Mapping[str, Any]],
) -> Iterator[None]:
    """Announce this process in the block every ten seconds, or thirty in a database, and its end.

    It is announced only while the publisher has a connection, and otherwise not at all.

    Args:
        publisher: the publisher for the broker. RabbitMQ gets the announcements over its
            connection, and the database of a server as a row. With a SQLite file and in memory, and
            with its setting ``presence`` off, nothing is announced.
        kind: ``worker`` or ``relay``.
        id: the id that the command was given.
        phase: returns the phase of the process; called on another thread, likewise:
        describe: returns further members of the announcement, among them ``queues``.
    """
    if publisher.settings.presence == "off":
        yield
        return
    announcing = _Announcing(publisher, kind, id, phase, describe)
    thread = threading.Thread(target=announcing.run, name="outbox-presence", daemon=True)
    announcing.last_error.listen()
    thread.start()
    try:
        yield
    finally:
        announcing.stopping.set()
        announcing.last_error.end()
        thread.join(_END_WITHIN)


class _Announcing:
    def __init__(
        self,
        publisher: Publisher,
        kind: str,
        id: str | None,
        phase: Callable[[], str],
        describe: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.stopping = threading.Event()
        self.last_error = LastError()
        self._publisher = publisher
        self._records: PresenceRecords | None = open_presence_records(publisher.settings)
        self._every = _EVERY if self._records is None else self._records.every
        self._refusal = ""
        self._phase = phase
        self._describe = describe
        self._began = time.monotonic()
        self._own: dict[str, Any] = {
            "process": secrets.token_hex(8),
            "kind": kind,
            "id": id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "app_id": publisher.settings.app_id,
            "interval": self._every,
            "outbox": installed_version(),
            "python": platform.python_version(),
        }

    def run(self) -> None:
        """Announce until the process is to stop."""
        try:
            due, announced = 0.0, ""
            while not self.stopping.wait(_LOOK):
                phase, now = self._phase(), time.monotonic()
                if (phase != announced or now >= due) and self._publisher.connected:
                    self._announce(phase)
                    due, announced = now + self._every * random.uniform(0.8, 1.2), phase
            if announced:
                self._announce(ENDED)
        except Exception:  # a worker works without
            logger.exception("cannot announce this process")

    def _announce(self, phase: str) -> None:
        described = dict(self._describe())
        queues = described.pop("queues", ())
        age = round(time.monotonic() - self._began, 1)
        present = {"phase": phase, "age": age, "error": self._error()}
        body = encoded({**self._own, **present, **described}, queues)
        if self._records is None:
            self._publisher.announce(body)
        else:
            self._write(self._records, body)

    def _write(self, records: PresenceRecords, body: bytes) -> None:
        try:
            records.write(self._own["process"], body.decode())
            self._refusal = ""
        except (BrokerError, UsageError) as error:
            level = logging.DEBUG if str(error) == self._refusal else logging.INFO
            self._refusal = str(error)
            logger.log(level, "this process isn't announced: %s", error)

    def _error(self) -> dict[str, Any] | None:
        """Return the class of the last error, or the logger's name, and its age, but no text."""
        found = self.last_error.found
        if found is None:
            return None
        name = found.raised or found.logger
        return {"class": name[:_LONGEST_CLASS], "age": round(time.monotonic() - found.since, 1)}
