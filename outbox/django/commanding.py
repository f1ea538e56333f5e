"""What a Django project says to outbox's commands: its broker, its databases and its consumers."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings as django_settings
from django.db import DatabaseError, connections
from django.utils.module_loading import module_has_submodule

from outbox import Publisher, UsageError
from outbox.commands.application import Application
from outbox.commands.database_access import DatabaseUnavailable, NoDatabase
from outbox.consumers.command.framework import Framework
from outbox.consumers.discovery import with_consumers
from outbox.consumers.tasks.task_table import tasks_of
from outbox.django import project
from outbox.django.connecting import engine_of, vendor_of
from outbox.system.backoff import backoff

if TYPE_CHECKING:
    from outbox.sql import Relay

__all__ = ["NO_URL", "application", "framework", "has_table", "without_djangos"]

logger = logging.getLogger("outbox.django")

NO_URL = (
    "no broker is known: set OUTBOX['URL'] in the settings, or OUTBOX_URL in the environment, or "
    "pass --url"
)
_URL_DEFAULT = "OUTBOX['URL'] of the settings, or OUTBOX_URL"
_STOP_TIMEOUT = 5.0  # seconds for the confirms of a relay that stops beside its worker


def without_djangos(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` without the options of every Django command, which has read them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--settings", "--pythonpath", "--verbosity"):
        parser.add_argument(option)
    for flag in ("--traceback", "--no-color", "--force-color", "--skip-checks"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_known_args(list(arguments))[1]


def application() -> Application:
    """Return what the command ``outbox`` works for.

    Raises:
        UsageError: the setting ``OUTBOX`` is wrong.
    """
    present = project.current()
    overrides: Any = project.settings_of(present)
    return Application(
        "manage.py outbox",
        present.url,
        settings=overrides,
        engine_of=_engine_with_table,
        modules=lambda: _consumers(argparse.Namespace(consumers=())),
        consume=("manage.py", "outbox", "consume"),
        folder=_folder(),
        is_django=True,
    )


def _folder() -> str:
    """Return the folder of ``manage.py``, or the working directory if it isn't what runs."""
    program = sys.argv[0] if sys.argv else ""
    return os.path.dirname(os.path.abspath(program)) if program.endswith("manage.py") else "."


def framework() -> Framework:
    """Return what the project adds to ``outbox-consume``."""
    return Framework(_URL_DEFAULT, NO_URL, _add_arguments, _consumers, _relaying)


def has_table(alias: str, table: str = "outbox_events") -> bool:
    """Return whether a database of the project has a table of outbox.

    Raises:
        DatabaseError: Django's; the database can't be reached.
    """
    connection = connections[alias]
    with connection.cursor() as cursor:
        return table in connection.introspection.table_names(cursor)


def _engine_with_table(alias: str | None) -> Any:
    """Return the engine of a database that has the table; None means that of ``STORE``."""
    if alias is None:
        alias = project.current().store
        if alias is None:
            raise NoDatabase(
                "OUTBOX['STORE'] is None, so nothing is stored; name a database: --database ALIAS"
            )
    if alias not in django_settings.DATABASES:
        known = ", ".join(map(repr, django_settings.DATABASES))
        raise UsageError(f"--database {alias!r} is not in DATABASES ({known})")
    vendor_of(alias)
    try:
        is_there = has_table(alias)
    except DatabaseError as error:
        reason = str(error).strip().partition("\n")[0]
        raise DatabaseUnavailable(f"the database {alias!r} failed: {reason}") from error
    finally:
        if not connections[alias].in_atomic_block:
            connections[alias].close()  # a relay runs for months without it
    if not is_there:
        raise UsageError(
            f"the table outbox_events does not exist in the database {alias!r}; run `manage.py "
            f"migrate outbox_events --database {alias}`"
        )
    return engine_of(alias)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-relay",
        action="store_true",
        help="don't publish stored events beside consuming: `manage.py outbox relay` does it",
    )
    parser.add_argument(
        "--database",
        metavar="ALIAS",
        help="the database whose stored events it publishes (default: OUTBOX['STORE'])",
    )


def _consumers(options: argparse.Namespace) -> Sequence[str]:
    """Return what the command line names, or what the project's apps have.

    These are their modules ``consumers`` and ``tasks``, without those that have no consumer and no
    task of outbox: other packages have consumers and tasks, too. With an app's tasks go its models,
    whose methods can be called later.
    """
    if options.consumers:
        return list(options.consumers)
    named = {
        f"{each.name}.{name}": each
        for name in ("consumers", "tasks")
        for each in apps.get_app_configs()
        if each.module is not None and module_has_submodule(each.module, name)
    }
    found = with_consumers(named)
    if not found:
        looked = f" (there are {', '.join(named)})" if named else ""
        raise UsageError(
            "no app of INSTALLED_APPS has a consumer or a task in its modules consumers and tasks"
            f"{looked}; write one, or name the module: manage.py outbox consume MODULE"
        )
    with_tasks = [named[name] for name in found if tasks_of(sys.modules[name])]
    models = {each.models_module.__name__: None for each in with_tasks if each.models_module}
    return [*found, *models]


@contextlib.contextmanager
def _relaying(options: argparse.Namespace, publisher: Publisher) -> Iterator[None]:
    """Publish stored events while the worker runs."""
    is_asked = options.database is not None
    if options.no_relay or (project.current().store is None and not is_asked):
        yield
        return
    relay = _BesideRelay(options.database, publisher)
    relay.begin()
    try:
        yield
    finally:
        relay.end()


class _BesideRelay:
    """A relay beside a worker, which goes on while the relay's database is unavailable."""

    def __init__(self, alias: str | None, publisher: Publisher) -> None:
        self._alias = alias
        self._publisher = publisher
        self._relay: Relay | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._start_later, name="outbox-relay-start")

    def begin(self) -> None:
        """Start relaying, now or when the database is available.

        Raises:
            UsageError: the database can't be relayed from.
        """
        if not self._start():
            self._thread.daemon = True
            self._thread.start()

    def end(self) -> None:
        """Stop relaying; what was not confirmed is released, and stays stored."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_TIMEOUT)
        if self._relay is not None:
            self._relay.stop(_STOP_TIMEOUT)

    def _start(self) -> bool:
        from outbox.sql import Relay, Store
        from outbox.storage.failures import DatabaseError as SQLDatabaseError
        from outbox.storage.failures import reason_of

        try:
            relay = Relay(Store(_engine_with_table(self._alias)), self._publisher)
            relay.start()
        except (DatabaseUnavailable, SQLDatabaseError) as error:
            logger.warning(
                "stored events wait: %s",
                error if isinstance(error, DatabaseUnavailable) else reason_of(error),
            )
            return False
        self._relay = relay
        return True

    def _start_later(self) -> None:
        tries = 0
        while not self._ending.wait(backoff(tries)):
            tries += 1
            try:
                if self._start():
                    return
            except UsageError as error:
                logger.error("stored events wait: %s", error)
