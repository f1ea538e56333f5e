"""The set-up that is examined: its parts are opened when the first check asks, and once."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from outbox import configuration
from outbox.consumers.definition import Consumer
from outbox.consumers.discovery import load
from outbox.doctor.finding import NotApplicable, NotChecked
from outbox.errors import ConnectFailed, OutboxError, UsageError
from outbox.messages.delivery import QueueSpec
from outbox.settings import SettingOverrides, Settings
from outbox.url import BrokerURL

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outbox.doctor.broker_probe import BrokerProbe, WriteAttempts
    from outbox.doctor.management_api import ManagementAPI

__all__ = ["Examined", "Loaded", "SetUp"]

T = TypeVar("T")

_DATABASE_ANSWERS = 10.0  # seconds, at the most


class _Once(Generic[T]):
    """The result of a function that is called once; what it raised is raised again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        if self._error is not None:
            raise self._error.with_traceback(None)
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._error = error
                raise
        return self._made[0]

    @property
    def made(self) -> Sequence[T]:
        """The result, if there is one."""
        return self._made


@dataclass(frozen=True, slots=True)
class SetUp:
    """What the command line and the application say.

    Attributes:
        modules: names of consumers, as ``outbox-consume`` takes them.
        url: the broker URL of the command line, or None.
        application_url: that of the application, or None for ``OUTBOX_URL``.
        settings: the application's settings.
        open_engine: returns the engine of the database with the stored events, and whether to leave
            it open; None if there is no database.
        management: the URL of RabbitMQ's management API, or None.
        arguments: the command line of the process.
        more_modules: returns the application's modules with consumers, if ``modules`` is empty.
    """

    modules: Sequence[str] = ()
    url: str | None = field(default=None, repr=False)
    application_url: str | None = field(default=None, repr=False)
    settings: SettingOverrides = field(default_factory=SettingOverrides, repr=False)
    open_engine: Callable[[], tuple[Any, bool]] | None = None
    management: str | None = field(default=None, repr=False)
    arguments: Sequence[str] = field(default=(), repr=False)
    more_modules: Callable[[], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The consumers, and what was logged while they were loaded."""

    consumers: Sequence[Consumer]
    warnings: Sequence[str]
    disabled_loggers: bool


class Examined:
    """The parts of a set-up. For one thread; close it at the end.

    A part that can't be opened raises the same error for each check that asks for it: a
    ``NotChecked``, unless a check is about just that.
    """

    def __init__(self, set_up: SetUp) -> None:
        self.set_up = set_up
        self._url_before = configuration.overriding_url()
        self.load = _Once(self._load)
        self.read_settings = _Once(self._read_settings)
        self.open_probe = _Once(self._open_probe)
        self.open_engine = _Once(self._open_engine)
        self.reach_database = _Once(self._reach_database)
        self._open_management = _Once(self._connect_management)
        self._write_attempts = _Once(self._attempt_writes)

    def close(self) -> None:
        """Close what is open."""
        configuration.override_url(self._url_before)
        for probe in self.open_probe.made:
            probe.close()
        for engine, leave_open in self.open_engine.made:
            if not leave_open:
                engine.dispose()

    @property
    def settings(self) -> Settings:
        """The publisher's settings."""
        try:
            return self.read_settings()
        except OutboxError:
            raise NotChecked("the settings are wrong (OBX101)") from None

    @property
    def url(self) -> BrokerURL:
        """The broker URL."""
        url = self.settings.url
        if not url:
            raise NotChecked("no broker is known (OBX101)")
        try:
            return BrokerURL.parse(url)
        except UsageError:
            raise NotChecked("the broker URL is wrong (OBX101)") from None

    @property
    def is_rabbitmq(self) -> bool:
        """Whether the broker is a RabbitMQ."""
        return self.url.scheme in ("amqp", "amqps")

    @property
    def probe(self) -> BrokerProbe:
        """A connection to RabbitMQ."""
        if not self.is_rabbitmq:
            raise NotApplicable
        try:
            return self.open_probe()
        except OutboxError:
            raise NotChecked("the broker can't be connected to (OBX102, OBX103)") from None

    @property
    def written(self) -> WriteAttempts:
        """The broker's answers to publishing, of which no event comes."""
        if self.probe.product != "RabbitMQ":
            raise NotChecked("it is tried only where RabbitMQ's order of checks is known (OBX104)")
        return self._write_attempts()

    @property
    def management(self) -> ManagementAPI:
        """RabbitMQ's management API."""
        if not self.is_rabbitmq:
            raise NotApplicable
        return self._open_management()

    @property
    def consumers(self) -> Sequence[Consumer]:
        """The consumers."""
        try:
            return self.load().consumers
        except NotChecked:
            raise
        except Exception:  # the application's code may raise anything
            raise NotChecked("the consumers can't be loaded (OBX301)") from None

    @property
    def specs(self) -> Sequence[QueueSpec]:
        """The queues of the consumers."""
        return [consumer.spec(self.settings.exchange) for consumer in self.consumers]

    @property
    def engine(self) -> Engine:
        """The engine of the database with the stored events; read-only if it is SQLite."""
        try:
            return self.reach_database()
        except NotChecked:
            raise
        except Exception:  # the driver's
            raise NotChecked("the database can't be used (OBX201)") from None

    def _load(self) -> Loaded:
        if self.set_up.url is not None:
            configuration.override_url(self.set_up.url)
        names = list(self.set_up.modules)
        if not names and self.set_up.more_modules is not None:
            with contextlib.suppress(UsageError):  # it has none
                names = list(self.set_up.more_modules())
        if not names:
            raise NotChecked("no module with consumers is named")
        with _warnings_of("outbox.consumer") as lines:
            consumers = load(names)
        disabled = [line for line in lines if "logging.config has disabled" in line]
        return Loaded(consumers, [line for line in lines if line not in disabled], bool(disabled))

    def _read_settings(self) -> Settings:
        # First the application's code, which may call configure().
        with contextlib.suppress(Exception):  # OBX301 says so
            self.load()
        configured = configuration.configured_publisher()
        if configured is not None:
            return configured.settings
        return Settings.load(self.set_up.url or self.set_up.application_url, self.set_up.settings)

    def _open_probe(self) -> BrokerProbe:
        from outbox.doctor.broker_probe import BrokerProbe

        return BrokerProbe.open(self.url, self.settings)

    def _attempt_writes(self) -> WriteAttempts:
        exchanges = dict.fromkeys([self.settings.exchange, ""])
        with contextlib.suppress(NotChecked):
            exchanges |= dict.fromkeys(spec.exchange for spec in self.specs)
        return self.probe.attempt_writes(list(exchanges))

    def _connect_management(self) -> ManagementAPI:
        from outbox.doctor.management_api import ManagementAPI

        url, probe = self.url, self.probe
        user, password = probe.login
        url = dataclasses.replace(url, user=user or url.user, password=password or url.password)
        return ManagementAPI.open(self.set_up.management, url, probe.cluster)

    def _open_engine(self) -> tuple[Engine, bool]:
        if self.set_up.open_engine is None:
            raise NotChecked("no database is named: --database, or OUTBOX_DATABASE_URL")
        if importlib.util.find_spec("sqlalchemy") is None:
            raise NotChecked("SQLAlchemy is not installed: pip install 'outbox-events[sql]'")
        from outbox.doctor.read_only import read_only

        engine, leave_open = self.set_up.open_engine()
        if engine.dialect.name != "sqlite":
            return engine, leave_open
        if not leave_open:
            engine.dispose()
        return read_only(engine.url), False

    def _reach_database(self) -> Engine:
        """Open the engine, and connect once: else each check would wait for a silent server."""
        engine = self.open_engine()[0]
        if engine.dialect.name != "sqlite":
            _connect(engine)
        return engine


def _connect(engine: Engine) -> None:
    """Connect on a thread for it: what an application's engine waits for may have no end.

    Raises:
        ConnectFailed: there is no answer.
        Exception: the driver's or the application's, if connecting fails.
    """
    errors: list[Exception] = []

    def connect() -> None:
        try:
            engine.connect().close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, name="outbox-doctor", daemon=True)
    thread.start()
    thread.join(_DATABASE_ANSWERS)
    if thread.is_alive():
        raise ConnectFailed(f"no answer within {_DATABASE_ANSWERS:.0f} s")
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger in a block, instead of letting them be logged."""
    lines: list[str] = []

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collecting(logging.WARNING)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def database_variable_is_set() -> bool:
    """Return whether the environment names a database."""
    return bool(os.environ.get("OUTBOX_DATABASE_URL", "").strip())
