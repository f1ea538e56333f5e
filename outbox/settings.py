"""The settings, their bounds, and where their values come from.

A value given in code wins over ``OUTBOX_<NAME>`` in the environment, which wins over the default.
White space around a value in the environment is not part of it.
"""

from __future__ import annotations

import datetime
import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args
from urllib.parse import quote

from outbox.credentials import CredentialsProvider, checked_provider, imported
from outbox.errors import BrokerError, UsageError
from outbox.event import Event, HeadersSource, Unroutable
from outbox.serializer import JSONSerializer, Serializer
from outbox.system.program_name import program_name
from outbox.url import BrokerURL, masked

__all__ = ["MIB", "Declare", "Envelope", "SettingOverrides", "Settings", "suggestion"]

MIB = 1024 * 1024

Declare = Literal["create", "passive", "never"]
AfterCommit = Literal["publish", "notify", "nothing"]
Envelope = Literal["outbox", "cloudevents", "cloudevents-amqp"]
Presence = Literal["on", "off"]
EventsHook = Callable[[tuple[Event, ...]], object]
RejectionHook = Callable[[Event, str], object]
ConfirmedHook = Callable[[int, float], object]
ConnectedHook = Callable[[str], object]
DisconnectedHook = Callable[[BrokerError], object]


def suggestion(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return what to say of an unknown name: the one that was probably meant, or all.

    Args:
        name: the name, without ``prefix``.
        known: the known names, without ``prefix``.
        prefix: what all names begin with, which says nothing of their likeness.
    """
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    return f"known: {', '.join(prefix + each for each in known)}"


class SettingOverrides(TypedDict, total=False):
    """The keyword arguments of :class:`outbox.Publisher` and :func:`outbox.configure`."""

    exchange: str
    timeout: float
    stall_timeout: float
    drain_timeout: float
    connect_timeout: float
    heartbeat: int
    max_kept: int
    max_kept_bytes: int
    spool: str | os.PathLike[str]
    spool_max_bytes: int
    keep_published: float | datetime.timedelta
    max_events: int
    max_bytes: int
    max_body_bytes: int
    unroutable: Unroutable
    declare: Declare
    after_commit: AfterCommit
    envelope: Envelope
    source: str
    credentials: CredentialsProvider | None
    app_id: str
    connection_name: str
    presence: Presence
    tasks_queue: str
    tasks_max_priority: int
    unknown_task_after: float
    task_session: Callable[[], Any] | None
    results: Any
    serializer: Serializer
    headers: HeadersSource | Sequence[HeadersSource] | None
    on_kept: EventsHook | None
    on_parked: EventsHook | None
    on_rejected: RejectionHook | None
    on_cleared: EventsHook | None
    on_confirmed: ConfirmedHook | None
    on_connected: ConnectedHook | None
    on_disconnected: DisconnectedHook | None


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a publisher and of the collectors that use it.

    ``repr()`` masks the password of the URL; the attribute ``url`` holds it.

    Attributes:
        url: see :meth:`outbox.url.BrokerURL.parse`.
        exchange: the topic exchange of events whose ``enqueue_event`` doesn't name one.
        timeout: seconds a caller of ``publish()`` waits for the confirms, 0 or more.
        stall_timeout: seconds without any progress after which the connection counts as dead: no
            confirm has arrived, and the broker has taken no more data.
        drain_timeout: seconds that ``close()`` and the exit of the process wait for kept events.
        connect_timeout: seconds for one attempt to open a connection, the handshakes included.
        heartbeat: seconds proposed in AMQP's negotiation; 0 disables heartbeats.
        max_kept: the number of kept events at which ``enqueue_event()`` raises ``CollectorFull``.
        max_kept_bytes: the same, in bytes as they are sent to RabbitMQ, headers included; of their
            bodies in an SQLite file.
        spool: a folder on a local disk to which kept events are written before they are reported as
            kept, so that they survive the end of the process; made with mode 0700, and of one
            user. Empty for none. Held as an absolute path. ``max_kept`` and ``max_kept_bytes``
            then limit only what can't be written.
        spool_max_bytes: the bytes of this publisher's events in the spool at which
            ``enqueue_event()`` raises ``CollectorFull``, as it does when the disk has less than
            256 MiB left, or 5 % of a small one; 0 for no limit but the disk's.
        keep_published: how long rows of a database are kept, in ``outbox_published``, after they
            were published by a relay or the process that stored them, or processed where the
            database is the broker: seconds, or a ``timedelta``; held as seconds. With 0 they are
            deleted.
        max_events: the limit of one collector, in events.
        max_bytes: the limit of one collector, in bytes of their bodies and headers.
        max_body_bytes: the limit of one body; RabbitMQ 4 refuses more than 16 MiB by default.
        unroutable: what to do with an event that no queue is bound for: ``park``, ``fail`` or
            ``ignore``; an event's own setting wins.
        declare: whether the exchange is created (``create``), must exist (``passive``), or is not
            checked (``never``).
        after_commit: what this process does after committing stored events: publish them
            (``publish``), notify listening relays (``notify``, PostgreSQL only), or ``nothing``:
            relays find them by polling.
        envelope: ``outbox`` for outbox's own headers alone; ``cloudevents`` to publish every event
            as a CloudEvent besides, with the headers ``ce-id`` and so on that the binding for
            RabbitMQ has; ``cloudevents-amqp`` with ``cloudEvents_id`` and so on, for readers over
            AMQP 1.0.
        source: the attribute ``source`` of CloudEvents, a URI reference such as
            ``https://shop.example/orders``, at most 255 bytes; ``load`` takes ``//<app_id>`` where
            it is empty and the envelope needs it.
        credentials: returns what to log in to RabbitMQ with, instead of the URL's user and
            password: :class:`outbox.Credentials`, (user, password) or a token. It is called before
            each attempt to connect, on the thread of the connection, and should return within
            seconds; what it raises is a failed attempt. In the environment it is
            ``MODULE:FUNCTION``.
        app_id: AMQP's ``app-id`` of every message, at most 255 bytes; empty leaves it out. Where
            neither code nor the environment sets it, ``load`` takes the name of the program:
            ``shop`` for ``python shop.py`` and ``python -m shop``, ``gunicorn`` for every
            application under gunicorn; empty at a prompt and for ``python -c``.
        connection_name: the connection's name in the broker's management UI.
        presence: whether worker and relay processes announce themselves on the broker (``on``,
            ``off``).
        tasks_queue: the queue of tasks that name none, 1 to 250 bytes; several services on one
            broker need different ones.
        tasks_max_priority: the highest priority that has an effect in queues of tasks, 1 to 255, as
            for a consumer; the queues are then classic ones. 0 leaves priorities to the broker.
        unknown_task_after: seconds, 0 or more, for which a worker puts back a task whose name it
            doesn't know, before that is a dead letter: another worker may know it.
        task_session: returns a new session of SQLAlchemy, a ``sessionmaker`` or an
            ``async_sessionmaker``, in which a worker loads the instances that tasks are called
            with; without one it uses what was given to ``outbox.sql.bind()``.
        results: the database in which the results of tasks are kept: a URL, or an engine of
            SQLAlchemy, for PostgreSQL, MariaDB or SQLite; empty for that of the queues, where a
            database holds them; ``off`` for none.
        serializer: the serializer of payloads.
        headers: called without arguments for each event that is enqueued, in the caller's thread
            and context; what it returns, a mapping or None, is added to the event's headers. Given
            as a function or a sequence of functions, of which the later ones win, as the caller's
            own headers do over all of them; held as a tuple.
        on_kept: called with the events of a chunk that had to be kept.
        on_parked: called with events that were parked.
        on_rejected: called with an event and the reason it was given up.
        on_cleared: called with events that a rollback or ``clear_events()`` dropped, on the thread
            that dropped them.
        on_confirmed: called for each chunk that the broker confirmed, with the number of its
            events and the seconds since it was submitted.
        on_connected: called with the broker's address once a connection can publish.
        on_disconnected: called with the error when that connection is lost.
    """

    url: str | None = None
    exchange: str = "outbox"
    timeout: float = 5.0
    stall_timeout: float = 30.0
    drain_timeout: float = 5.0
    connect_timeout: float = 5.0
    heartbeat: int = 20
    max_kept: int = 10_000
    max_kept_bytes: int = 64 * MIB
    spool: str = ""
    spool_max_bytes: int = 1024 * MIB
    keep_published: float = 0.0
    max_events: int = 100_000
    max_bytes: int = 64 * MIB
    max_body_bytes: int = 16 * MIB
    unroutable: Unroutable = "park"
    declare: Declare = "create"
    after_commit: AfterCommit = "publish"
    envelope: Envelope = "outbox"
    source: str = ""
    credentials: CredentialsProvider | None = None
    app_id: str = ""
    connection_name: str = "outbox"
    presence: Presence = "on"
    tasks_queue: str = "tasks"
    tasks_max_priority: int = 0
    unknown_task_after: float = 900.0
    task_session: Callable[[], Any] | None = None
    results: Any = ""
    serializer: Serializer = JSONSerializer()  # noqa: RUF009  it is stateless
    headers: tuple[HeadersSource, ...] = ()
    on_kept: EventsHook | None = None
    on_parked: EventsHook | None = None
    on_rejected: RejectionHook | None = None
    on_cleared: EventsHook | None = None
    on_confirmed: ConfirmedHook | None = None
    on_connected: ConnectedHook | None = None
    on_disconnected: DisconnectedHook | None = None

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in _NAMES} | {"url": masked(self.url)}
        if isinstance(self.results, str) and "://" in self.results:
            shown["results"] = "***"
        if self.credentials is not None:
            shown["credentials"] = "***"  # the repr of a partial has its arguments
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def load(
        cls,
        url: str | None,
        overrides: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Return the settings from ``overrides``, the environment and the defaults.

        Args:
            url: the broker URL; None for ``OUTBOX_URL``. One that is given is not checked here.
            overrides: the settings that are given in code, by name.
            environ: the environment; None for that of the process.

        Raises:
            UsageError: a name is unknown, the URL is invalid, or a value is out of bounds; the
                message names the setting or the environment variable.
        """
        for name in overrides:
            if name not in _NAMES or name == "url":
                raise UsageError(f"{name!r} is not a setting; {suggestion(name, _NAMES)}")
        values: dict[str, Any] = {}
        for name in _FROM_ENVIRONMENT:
            # No variable holds os.environ: pytest and Sentry show those of a traceback's frames.
            text = (os.environ if environ is None else environ).get(f"OUTBOX_{name.upper()}")
            if text is not None and name not in overrides:
                values[name] = _from_text(name, text.strip())
        provider = (
            (os.environ if environ is None else environ).get("OUTBOX_CREDENTIALS", "").strip()
        )
        if provider and "credentials" not in overrides:
            where = "the environment variable OUTBOX_CREDENTIALS"
            values["credentials"] = _checked("credentials", imported(provider, where), where)
        for name, value in overrides.items():
            values[name] = _checked(name, value, f"the setting {name!r}")
        if url is None:
            url = _url_of(os.environ if environ is None else environ)
        if "app_id" not in values:
            values["app_id"] = program_name()
        if values.get("envelope", "outbox") != "outbox" and not values.get("source"):
            values["source"] = _default_source(values["app_id"])
        return replace(cls(), url=url, **values)


_DEFAULTS = Settings()
_NAMES = [setting.name for setting in fields(Settings)]
_FROM_ENVIRONMENT = [name for name in _NAMES if type(getattr(_DEFAULTS, name)) in (str, int, float)]
_MOST_BYTES = (1 << 53) - 1
_MOST_SECONDS = 1_000_000_000  # less than the 292 years that a thread can wait
_MOST = {"heartbeat": 65_535, "tasks_max_priority": 255}  # AMQP 0-9-1, Connection.TuneOk
_CHOICES: dict[str, tuple[str, ...]] = {
    "unroutable": get_args(Unroutable),
    "declare": get_args(Declare),
    "after_commit": get_args(AfterCommit),
    "envelope": get_args(Envelope),
    "presence": get_args(Presence),
}


def _url_of(environ: Mapping[str, str]) -> str | None:
    """Return the broker URL in the environment; an empty variable counts as unset.

    Raises:
        UsageError: it is invalid.
    """
    url = environ.get("OUTBOX_URL", "").strip()
    try:
        if url:
            BrokerURL.parse(url)
    except UsageError as error:
        del url, environ  # as above
        raise UsageError(f"the environment variable OUTBOX_URL is invalid: {error}") from None
    return url or None


def _default_source(app_id: str) -> str:
    """Return the source of CloudEvents where none is set.

    Raises:
        UsageError: there is no name to make it of.
    """
    if not app_id:
        raise UsageError(
            "a CloudEvent needs a source: set source='https://shop.example/orders' "
            "(OUTBOX_SOURCE), or app_id"
        )
    return f"//{quote(app_id, safe='')}"


def _from_text(name: str, text: str) -> Any:
    where = f"the environment variable OUTBOX_{name.upper()}"
    kind = type(getattr(_DEFAULTS, name))
    value: Any = text
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(f"{where} is {text!r:.80}, not a number ({kind.__name__})") from None
    return _checked(name, value, where)


def _checked(name: str, value: Any, where: str) -> Any:
    default = getattr(_DEFAULTS, name)
    if name == "keep_published" and isinstance(value, datetime.timedelta):
        value = value.total_seconds()
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(f"{where} is {value!r}, not one of {', '.join(_CHOICES[name])}")
    if name.startswith("on_"):
        if value is not None and not callable(value):
            raise UsageError(f"{where} is {value!r}, not callable")
    elif name == "task_session":
        if value is not None and not callable(value):
            raise UsageError(f"{where} is {value!r:.80}, not a function that returns a session")
    elif name == "results":
        return _results(value, where)
    elif name == "tasks_queue":
        if not isinstance(value, str) or not value or not _is_short(f"{value}.dead"):
            raise UsageError(f"{where} is {value!r:.80}, not the name of a queue")
    elif name == "spool":
        return _folder(value, where)
    elif name == "credentials":
        checked_provider(value, where)
    elif name == "source" and isinstance(value, str) and not _is_reference(value):
        raise UsageError(f"{where} is {value!r:.80}, not a URI reference; percent-encode it")
    elif isinstance(default, str):
        if not isinstance(value, str) or not _is_short(value):
            raise UsageError(f"{where} is {value!r:.80}, not a string of at most 255 bytes")
    elif isinstance(default, int | float):
        numbers = (int,) if isinstance(default, int) else (int, float)
        most = _MOST.get(name, _MOST_BYTES if numbers == (int,) else _MOST_SECONDS)
        if isinstance(value, bool) or not isinstance(value, numbers) or not 0 <= value <= most:
            raise UsageError(f"{where} is {value!r:.80}, not a number from 0 to {most}")
    elif name == "headers":
        return _sources(value, where)
    elif name == "serializer" and not _is_serializer(value):
        raise UsageError(
            f"{where} is {value!r:.80}, which has no content_type (a string of at most 255 "
            "bytes), encode() and decode()"
        )
    return value


def _folder(value: Any, where: str) -> str:
    """Return the absolute path of a folder; "" for none."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or "://" in path or "\0" in path:
        raise UsageError(f"{where} is {value!r:.80}, not the path of a folder")
    return os.path.abspath(path) if path else ""


def _results(value: Any, where: str) -> Any:
    """Return the database of results; no message quotes a URL, which may hold a password."""
    if isinstance(value, str):
        value = value.strip()
        if value and value != "off" and "://" not in value:
            raise UsageError(f"{where} is neither the URL of a database nor 'off'")
        return value
    engine = getattr(value, "sync_engine", value)
    if not hasattr(engine, "dialect") or not hasattr(engine, "connect"):
        raise UsageError(f"{where} is a {type(value).__name__}, not a URL or an engine")
    return engine


def _sources(value: Any, where: str) -> tuple[HeadersSource, ...]:
    if value is None:
        return ()
    sources = tuple(value) if isinstance(value, list | tuple) else (value,)
    for source in sources:
        if not callable(source):
            raise UsageError(
                f"{where} is {value!r:.80}, not a function that returns headers, nor a list of such"
            )
        call = getattr(source, "__call__", None)  # noqa: B004  it may be a coroutine function
        if inspect.iscoroutinefunction(source) or inspect.iscoroutinefunction(call):
            raise UsageError(
                f"{where} has the coroutine function {source!r:.80}, which enqueue_event() can't "
                "await; use a plain function that reads a ContextVar"
            )
    return sources


def _is_reference(text: str) -> bool:
    """Return whether ``text`` has only characters that a URI reference can have (RFC 3986)."""
    return text.isascii() and text.isprintable() and not set(text) & set(' "<>\\^`{|}')


def _is_short(text: str) -> bool:
    try:
        return len(text.encode()) <= 255
    except UnicodeEncodeError:  # the environment may hold bytes that are not UTF-8
        return False


def _is_serializer(value: Any) -> bool:
    content_type = getattr(value, "content_type", None)
    return (
        isinstance(content_type, str)
        and _is_short(content_type)
        and callable(getattr(value, "encode", None))
        and callable(getattr(value, "decode", None))
    )
