"""Logs connections in with credentials from a function, and keeps those of open ones valid.

With an expired OAuth 2 token RabbitMQ refuses all that is done over a connection, or closes it,
unless the client sends a new one in time (``Connection.UpdateSecret``, an extension of AMQP 0-9-1).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable

import pika

from outbox.credentials import Credentials, CredentialsProvider, credentials_of
from outbox.errors import ConnectFailed
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.pika_errors import one_line

__all__ = ["Login"]

logger = logging.getLogger("outbox.link")

_RENEWED_AFTER = 0.8  # of the time for which credentials are valid
_AGAIN_AFTER = 0.05  # of that time, after a renewal that has failed
_LONGEST = 30.0  # seconds until that
_LEAST = 1.0  # seconds until either, also where tokens have expired by this machine's clock


class Login:
    """The credentials of one link's connections. Only for the link's thread."""

    def __init__(self, provider: CredentialsProvider) -> None:
        """Log in with what ``provider`` returns, asked before each attempt to connect."""
        self._provider = provider
        self._valid_for: float | None = None
        self._asked_at = 0.0

    def prepare(self, parameters: pika.ConnectionParameters, address: str) -> None:
        """Ask for credentials, and put them into ``parameters``. The caller's function may block.

        Raises:
            ConnectFailed: there are none.
        """
        asked_at = time.monotonic()
        try:
            given = credentials_of(self._provider)
        except Exception as error:
            raise ConnectFailed(
                f"cannot connect to {address}: no credentials: {_text(error)}"
            ) from error
        self._note(given, asked_at)
        parameters.credentials = pika.PlainCredentials(given.user, given.password)

    def prepare_beside(
        self,
        parameters: pika.ConnectionParameters,
        loop: pika_connection.Loop,
        prepared: Callable[[], None],
    ) -> None:
        """Do the same without blocking, then call ``prepared``; without any, those in use stay.

        For another connection while one is open, whose heartbeats this thread answers.
        """

        def answered(given: Credentials | BaseException) -> None:
            if isinstance(given, Credentials):
                parameters.credentials = pika.PlainCredentials(given.user, given.password)
            prepared()

        self._ask(loop, answered)

    def keep_valid(
        self, connection: pika_connection.Connection, loop: pika_connection.Loop, address: str
    ) -> None:
        """Send new credentials over ``connection`` before those it has logged in with expire."""
        if self._valid_for is not None:
            age = time.monotonic() - self._asked_at
            self._renew_in(_RENEWED_AFTER * self._valid_for - age, connection, loop, address)

    def _note(self, given: Credentials, asked_at: float) -> None:
        self._valid_for, self._asked_at = given.valid_for, asked_at

    def _renew_in(
        self,
        seconds: float,
        connection: pika_connection.Connection,
        loop: pika_connection.Loop,
        address: str,
    ) -> None:
        reference = weakref.ref(connection)  # or each timer would hold a closed connection

        def renew() -> None:
            if (open_one := reference()) is not None and open_one.is_open:
                self._renew(open_one, loop, address)

        loop.call_later(max(_LEAST, seconds), renew)

    def _renew(
        self, connection: pika_connection.Connection, loop: pika_connection.Loop, address: str
    ) -> None:
        """Replace the credentials of ``connection``."""
        asked_at = time.monotonic()

        def answered(given: Credentials | BaseException) -> None:
            if not connection.is_open:
                return
            if isinstance(given, BaseException):
                logger.warning("cannot renew the credentials for %s: %s", address, _text(given))
                seconds = min(_AGAIN_AFTER * (self._valid_for or 0), _LONGEST)
                self._renew_in(seconds, connection, loop, address)
                return
            self._note(given, asked_at)
            connection.update_secret(given.password, "expires")
            logger.debug("renewed the credentials for %s", address)
            self.keep_valid(connection, loop, address)

        self._ask(loop, answered)

    def _ask(
        self,
        loop: pika_connection.Loop,
        answered: Callable[[Credentials | BaseException], None],
    ) -> None:
        """Ask on a thread for it, and call ``answered`` on this one, which has a connection."""

        def ask() -> None:
            given: Credentials | BaseException
            try:
                given = credentials_of(self._provider)
            except BaseException as error:
                given = error
            loop.add_callback_threadsafe(lambda: answered(given))

        try:
            threading.Thread(target=ask, name="outbox-credentials", daemon=True).start()
        except RuntimeError as error:  # the interpreter exits
            logger.debug("no credentials are asked for any more")
            answered(error)


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__qualname__}: {one_line(str(error))}"
    except Exception:  # an application's exception
        return type(error).__qualname__
