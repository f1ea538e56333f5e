"""The extension: what an application has of outbox, and where events of its contexts go."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app, has_app_context

from outbox import serializer, surroundings
from outbox.configuration import default_publisher, overriding_url, provide
from outbox.errors import UsageError
from outbox.flask import context_units
from outbox.flask.app_config import AppConfig
from outbox.flask.command_group import outbox_group
from outbox.flask.message_context import message_context
from outbox.middleware.wsgi import OutboxMiddleware
from outbox.observer import Observer, seam
from outbox.publisher import Publisher
from outbox.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

__all__ = ["AppOutbox", "Outbox"]

_NAME = "outbox"


class Outbox:
    """The Flask extension: each application gets a publisher, which its contexts use.

    One object may serve several applications, and any number of threads.

        outbox = Outbox(db=db)  # db: of Flask-SQLAlchemy, if events are to be stored


        def create_app():
            app = Flask(__name__)
            app.config["OUTBOX_URL"] = "amqp://..."
            db.init_app(app)
            outbox.init_app(app)
            return app
    """

    def __init__(self, app: Flask | None = None, *, db: Any = None) -> None:
        """Create the extension, and set up ``app`` if it is given; see :meth:`init_app`."""
        self._db = db
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, *, db: Any = None) -> None:
        """Set up ``app``, without connecting to anything.

        Its requests become units of work, as with ``OutboxMiddleware``, and so do its contexts
        outside of requests (``with app.app_context()``, commands). Events that are enqueued in them
        go to the publisher of ``app``, whose settings are the keys ``OUTBOX_URL``,
        ``OUTBOX_EXCHANGE`` and so on of ``app.config``, then those of the environment. They are
        read at the first event.

        Args:
            app: the application. Its keys ``OUTBOX_*`` are checked now, and again when read.
            db: the ``SQLAlchemy`` of Flask-SQLAlchemy; the default is that of the constructor. With
                it each event is a row of ``db.session``'s transaction, unless it is enqueued with
                ``session=None``, and the tables of outbox are part of ``db.metadata``. None:
                events are published when the request, command or context has succeeded.

        Raises:
            UsageError: ``app`` has an ``Outbox`` already, ``db`` isn't Flask-SQLAlchemy's, or a
                setting is unknown or invalid.
            MissingExtra: ``db`` is given, and its SQLAlchemy is too old.
        """
        if _NAME in app.extensions:
            raise UsageError(f"the application {app.name!r} has an Outbox already: use that one")
        db = self._db if db is None else db
        AppConfig.of(app.config)
        if db is not None:
            _bind(db)
        app.extensions[_NAME] = AppOutbox(app.config, stores=db is not None)
        application: WSGIApplication = app.wsgi_app
        app.wsgi_app = OutboxMiddleware(application)  # type: ignore[method-assign]
        context_units.watch(app)
        app.cli.add_command(outbox_group)
        provide(_publisher_here, _settings_here, is_here=_is_here)
        surroundings.provide(_surroundings_here)

    @property
    def publisher(self) -> Publisher:
        """The publisher of the current application.

        Raises:
            UsageError: there is no current application, or it has no ``Outbox``.
            NotConfigured: neither its configuration nor the environment names a URL.
        """
        if _here() is None:
            raise UsageError(
                "there is no current application with an Outbox; use `with app.app_context():`"
                + (f" after init_app() of {current_app.name!r}" if has_app_context() else "")
            )
        return default_publisher()


class AppOutbox:
    """What one application has of outbox: ``app.extensions["outbox"]``. Thread-safe.

    Attributes:
        stores: whether events are stored in the session of its Flask-SQLAlchemy.
    """

    def __init__(self, config: dict[str, Any], *, stores: bool) -> None:
        """Create it, without reading ``config`` yet."""
        self.stores = stores
        self._config = config
        self._publishers: dict[Observer | None, Publisher] = {}
        self._settings: Settings | None = None

    def config(self) -> AppConfig:
        """Return what the application's configuration says now."""
        return AppConfig.of(self._config)

    def publisher_if_any(self) -> Publisher | None:
        """Return the application's publisher, or None if it has no URL.

        A test that records events needs none: it gets a publisher in memory.

        Raises:
            UsageError: a setting is unknown or invalid.
        """
        publisher = self._publishers.get(None)
        if publisher is not None:
            return publisher
        config = self.config()
        url = overriding_url() or config.url or os.environ.get("OUTBOX_URL", "").strip() or None
        observer = None
        if url is None:
            observer = seam.observer
            if observer is None:
                return None
            publisher = self._publishers.get(observer)
            if publisher is not None:
                return publisher
            self._publishers.clear()  # those of earlier tests
        publisher = Publisher(url or "memory://", **config.overrides)
        serializer.register(publisher.settings.serializer)
        # Without a lock, which a child could inherit taken: a second thread's publisher, which has
        # opened nothing yet, is thrown away.
        return self._publishers.setdefault(observer, publisher)

    def settings_to_store(self) -> Settings:
        """Return the settings of events that are stored without a URL.

        Raises:
            UsageError: a setting is unknown or invalid.
        """
        if self._settings is None:
            self._settings = Settings.load(None, self.config().overrides)
        return self._settings


def _here() -> AppOutbox | None:
    """Return the current application's, or None."""
    if not current_app:
        return None
    found: AppOutbox | None = current_app.extensions.get(_NAME)
    return found


def _is_here() -> bool:
    return _here() is not None


def _publisher_here() -> Publisher | None:
    present = _here()
    return None if present is None else present.publisher_if_any()


def _settings_here() -> Settings:
    """Return the settings of an event that is stored where no publisher is known."""
    present = _here()
    return _settings_of_environment() if present is None else present.settings_to_store()


@functools.cache
def _settings_of_environment() -> Settings:
    return Settings.load(None, {})


def _surroundings_here() -> surroundings.Surroundings | None:
    present = _here()
    if present is None:
        return None
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return functools.partial(message_context, app, stores=present.stores)


def _bind(db: Any) -> None:
    """Store events in the session of the current application, and add the tables to ``db``."""
    import outbox.sql as storing

    metadata = getattr(db, "metadata", None)
    if metadata is None or not hasattr(db, "session"):
        raise UsageError(f"db is {db!r}, not the SQLAlchemy() of Flask-SQLAlchemy")
    for table in storing.metadata.tables.values():
        if table.key not in metadata.tables:
            table.to_metadata(metadata)
    storing.bind(_session_here, begin=True)


def _session_here() -> Any:
    """Return the session of the current application, or None if it stores no events."""
    present = _here()
    if present is None or not present.stores:
        return None
    db = current_app.extensions.get("sqlalchemy")
    if db is None:
        raise UsageError(
            f"the application {current_app.name!r} stores events, but has no Flask-SQLAlchemy: "
            "call db.init_app(app)"
        )
    return db.session()
