"""A Django project in the tests' own process, with databases of each vendor.

Django is set up once. Each test gets new databases, and leaves the process as it found it: other
tests of the process know nothing of Django.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pymysql
import pytest
from asgiref.sync import SyncToAsync
from django.apps import apps
from django.conf import settings
from django.core.management import call_command
from django.core.signals import setting_changed
from django.db import connections
from django.test import override_settings
from sqlalchemy import NullPool, create_engine, inspect
from sqlalchemy.engine import make_url

from outbox import configuration, sinks
from outbox.django import project as outbox_project
from outbox.testing.databases.mariadb import PrivateMariaDB
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from tests.conftest import new_database, new_mariadb_database

if not settings.configured:
    settings.configure(
        SECRET_KEY="tests",
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.messages",
            "django.contrib.sessions",
            "outbox.django",
            "tests.django.shop",
        ],
        DATABASES={
            alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
            for alias in ("default", "other")
        },
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        ROOT_URLCONF="tests.django.shop.urls",
        MIGRATION_MODULES=dict.fromkeys(("admin", "auth", "contenttypes", "sessions")),
        OUTBOX={},
        TASKS={  # from Django 6.0
            "default": {"BACKEND": "outbox.django.TaskBackend", "QUEUES": ["default", "mails"]},
            "now": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
        },
        USE_TZ=True,
    )
    django.setup()
    # What ready() has set up is for the tests of this folder alone.
    configuration.provide(None)
    sinks.sink_using = None
    sinks.inbox = None
    sinks.framework = None


@pytest.fixture(autouse=True)
def outbox_in_django() -> Iterator[None]:
    """outbox.django is set up, with ``OUTBOX = {}``."""
    apps.get_app_config("outbox_events").ready()
    outbox_project.forget()
    yield
    configuration.provide(None)
    sinks.sink_using = None
    sinks.inbox = None
    sinks.framework = None
    setting_changed.disconnect(dispatch_uid="outbox.django")
    outbox_project.forget()
    for publisher in outbox_project._publishers.values():
        publisher.close(0)
    outbox_project._publishers.clear()


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The databases ``default`` and ``other``, migrated, of the vendor that is the value."""
    vendor: str = request.param
    template = request.getfixturevalue(f"{vendor}_template")
    before = dict(connections.settings)
    with contextlib.ExitStack() as stack:
        for alias in before:
            if vendor == "sqlite":
                path = tmp_path / f"{alias}.sqlite3"
                shutil.copy(template, path)
                use_database(alias, sqlite_settings(path))
            elif vendor == "mariadb":
                server = request.getfixturevalue("mariadb")
                url = stack.enter_context(new_mariadb_database(server))
                copy_mariadb_tables(template, url)
                use_database(alias, mariadb_settings(url))
            else:
                server = request.getfixturevalue("postgresql")
                url = stack.enter_context(new_database(server, template=template))
                use_database(alias, postgresql_settings(url))
        yield vendor
        for alias, its_settings in before.items():
            use_database(alias, its_settings)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database to copy."""
    path = tmp_path_factory.mktemp("django") / "template.sqlite3"
    migrate(sqlite_settings(path))
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql: PrivatePostgreSQL) -> Iterator[str]:
    """The name of a migrated database to copy."""
    with new_database(postgresql) as url:
        migrate(postgresql_settings(url))
        yield str(make_url(url).database)


@pytest.fixture(scope="session")
def mariadb_template(mariadb: PrivateMariaDB) -> Iterator[str]:
    """The name of a migrated database to copy."""
    with new_mariadb_database(mariadb) as url:
        migrate(mariadb_settings(url))
        yield str(make_url(url).database)


def copy_mariadb_tables(template: str, url: str) -> None:
    """Make the tables of ``template`` in an empty database, without their foreign keys."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        for table in inspect(connection).get_table_names(schema=template):
            connection.exec_driver_sql(f"CREATE TABLE {table} LIKE {template}.{table}")
        for table in ("django_migrations", "outbox_meta"):
            connection.exec_driver_sql(f"INSERT INTO {table} SELECT * FROM {template}.{table}")


def migrate(its_settings: dict[str, Any]) -> None:
    """Create the tables of all apps in a database."""
    before = dict(connections.settings)["default"]
    use_database("default", its_settings)
    call_command("migrate", verbosity=0, interactive=False, run_syncdb=True)
    use_database("default", before)


def sqlite_settings(path: Path) -> dict[str, Any]:
    """Django's settings of a file, whose transactions begin with the lock."""
    own = django.VERSION >= (5, 1)
    return {
        "ENGINE": "django.db.backends.sqlite3" if own else "tests.django.sqlite_immediate",
        "NAME": str(path),
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
    }


def postgresql_settings(url: str) -> dict[str, Any]:
    """Django's settings of a database of the private server."""
    parts = make_url(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.database,
        "USER": parts.username,
        "HOST": parts.host,
        "PORT": str(parts.port),
    }


def mariadb_settings(url: str) -> dict[str, Any]:
    """Django's settings of a database of the private server, with PyMySQL as its driver."""
    pymysql.install_as_MySQLdb()
    parts = make_url(url)
    return {
        "ENGINE": "django.db.backends.mysql",
        "NAME": parts.database,
        "USER": parts.username,
        "HOST": parts.host,
        "PORT": str(parts.port),
        "OPTIONS": {"charset": "utf8mb4"},
    }


def use_database(alias: str, its_settings: dict[str, Any]) -> None:
    """Have ``alias`` mean a database from now on, in this thread and in that of sync_to_async()."""
    connections.settings[alias] = its_settings
    connections.configure_settings(connections.settings)
    _forget_connection(alias)
    SyncToAsync.single_thread_executor.submit(_forget_connection, alias).result()


def _forget_connection(alias: str) -> None:
    connections[alias].close()
    del connections[alias]


@pytest.fixture
def outbox_setting() -> Iterator[Any]:
    """A function that sets ``OUTBOX`` for the rest of the test."""
    overriding: list[Any] = []

    def use(**keys: Any) -> None:
        override = override_settings(OUTBOX=keys)
        override.enable()
        overriding.append(override)

    yield use
    while overriding:
        overriding.pop().disable()
