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

from outbox.presence.announcement import ENDED, encoded
from outbox.publisher import Publisher
from outbox.system.last_error import LastError
from outbox.system.version import installed_version

__all__ = ["announced"]

logger = logging.getLogger("outbox.presence")

_EVERY = 10.0
_LONGEST_CLASS = 255
_LOOK = 1.0
"""Seconds between two looks whether there is something to announce: another phase, or the
connection that it takes."""


@contextlib.contextmanager
def announced(
    publisher: Publisher,
    kind: str,
    *,
    id: str | None,
    phase: Callable[[], str],
    describe: Callable[[], Mapping[str, Any]],
) -> Iterator[None]:
    """Announce this process every ten seconds in the block, and its end.

    An announcement is sent only over a connection that publishes, and dropped otherwise.

    Args:
        publisher: the publisher whose connection is used. With a broker that isn't a RabbitMQ, and
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
        thread.join(_LOOK)


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
        self._phase = phase
        self._describe = describe
        self._began = time.monotonic()
        self._own = {
            "process": secrets.token_hex(8),
            "kind": kind,
            "id": id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "app_id": publisher.settings.app_id,
            "interval": _EVERY,
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
                    due, announced = now + _EVERY * random.uniform(0.8, 1.2), phase
            if announced:
                self._announce(ENDED)
        except Exception:  # a worker works without
            logger.exception("cannot announce this process")

    def _announce(self, phase: str) -> None:
        described = dict(self._describe())
        queues = described.pop("queues", ())
        age = round(time.monotonic() - self._began, 1)
        present = {"phase": phase, "age": age, "error": self._error()}
        self._publisher.announce(encoded({**self._own, **present, **described}, queues))

    def _error(self) -> dict[str, Any] | None:
        """Return the class of the last error, or the logger's name, and its age, but no text."""
        found = self.last_error.found
        if found is None:
            return None
        name = found.raised or found.logger
        return {"class": name[:_LONGEST_CLASS], "age": round(time.monotonic() - found.since, 1)}
