"""The exchange and queues of a proof, and the user of its programs, as the driver reaches them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pika

from outbox.testing.broker import PrivateBroker

__all__ = ["CALLS", "CONSUMED", "PARKED", "Queues"]

CONSUMED = ("orders", "tasks", "charges")
"""The queues of the worker."""
CALLS = "calls"
"""The queue of the tasks."""
PARKED = "outbox.unroutable"
_BOUND = 20  # messages in the queue that fills up
_PASSWORD = "proving"

_MAKE_USER = """
rabbit_auth_backend_internal:add_user(<<"{user}">>, <<"{password}">>, <<"proving">>).
"""
_SET_PERMISSIONS = """
rabbit_auth_backend_internal:set_permissions(
    <<"{user}">>, <<"/">>, <<".*">>, <<"{write}">>, <<".*">>, <<"proving">>).
"""


class Queues:
    """What belongs to one proof on the broker. Thread-safe."""

    def __init__(self, broker: PrivateBroker, name: str) -> None:
        """Prepare the exchange ``name`` and the queues whose names begin with it."""
        self._broker = broker
        self._name = name

    def declare(self, *, parking: bool) -> None:
        """Declare the exchange and the witnesses' queues, and bind these."""
        name = self._name
        full = {"x-max-length": _BOUND, "x-overflow": "reject-publish"}

        def declare(channel: Any) -> None:
            channel.exchange_declare(name, "topic", durable=True)
            # Classic queues: a new quorum queue doesn't always survive a kill of its node.
            channel.queue_declare(f"{name}.ledger", durable=True)
            channel.queue_declare(f"{name}.bounded", durable=True, arguments=full)
            for queue in (*CONSUMED, CALLS):
                dead = f"{name}.{queue}.dead"
                channel.queue_declare(dead, durable=True, arguments={"x-queue-type": "quorum"})
            for topic in ("order.*", "task.*", "charge.*", "invoice.*", "shaky.*"):
                channel.queue_bind(f"{name}.ledger", name, topic)
            channel.queue_bind(f"{name}.bounded", name, "bounded.*")
            if parking:
                channel.queue_declare(PARKED, durable=True, arguments={"x-queue-type": "quorum"})
                channel.queue_purge(PARKED)

        self._on_broker(declare)

    def unbind(self) -> None:
        """Remove the binding that some events need.

        Raises:
            RuntimeError: the broker is unavailable.
        """
        ledger = f"{self._name}.ledger"
        self._on_broker(lambda channel: channel.queue_unbind(ledger, self._name, "shaky.*"))

    def bind(self) -> None:
        """Restore the binding."""
        ledger = f"{self._name}.ledger"
        self._on_broker(lambda channel: channel.queue_bind(ledger, self._name, "shaky.*"))

    def waiting(self, queue: str, tries: int = 100) -> int:
        """Return the number of messages in ``queue``, which must exist."""
        declared = self._on_broker(
            lambda channel: channel.queue_declare(f"{self._name}.{queue}", passive=True), tries
        )
        return int(declared.method.message_count)

    def make_user(self, url: str) -> str:
        """Make a user for the programs; return ``url`` with it."""
        make = _MAKE_USER.format(user=self._name, password=_PASSWORD)
        permit = _SET_PERMISSIONS.format(user=self._name, write=".*")
        self._broker.ctl("eval", f"{make.strip().removesuffix('.')},{permit}")
        before, _, rest = url.partition("://")
        return f"{before}://{self._name}:{_PASSWORD}@{rest.rpartition('@')[2]}"

    def permit(self, *, writing: bool) -> None:
        """Grant the user's permission to publish, or withdraw it.

        The user may always bind queues. What a connection was permitted it may go on doing for a
        while.
        """
        write = ".*" if writing else f"^({self._name}|outbox)[.]"
        self._broker.ctl("eval", _SET_PERMISSIONS.format(user=self._name, write=write))

    def _on_broker(self, action: Callable[[Any], Any], tries: int = 100) -> Any:
        url = self._broker.url
        parameters = pika.URLParameters(url)
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
        raise RuntimeError(f"the broker at {url} is unavailable") from last
