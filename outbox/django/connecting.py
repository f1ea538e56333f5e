"""SQLAlchemy engines for Django's databases, with which relays and the fast path reach them.

An engine connects as Django would, with everything that ``DATABASES`` says: it has a copy of
Django's connection make each new one. Django's own connections belong to their threads and are
never used, nor is the application's connection pool, whose places may be few.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.db import connections

from outbox import UsageError
from outbox.django.environment import is_test_environment
from outbox.system import process

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["can_hand_over", "engine_of", "vendor_of"]

_VENDORS = {"postgresql": "postgresql", "sqlite": "sqlite", "mysql": "mysql"}
_engines: dict[tuple[str, str], Engine] = {}
_lock = threading.Lock()


def vendor_of(alias: str) -> str:
    """Return the vendor of a database: ``postgresql``, ``sqlite`` or ``mysql``.

    Raises:
        UsageError: outbox can't store events there.
    """
    vendor: str = connections[alias].vendor
    if vendor not in _VENDORS:
        raise UsageError(
            f"events cannot be stored in {vendor!r}, the database {alias!r}; only in PostgreSQL, "
            "SQLite and MariaDB"
        )
    return vendor


def engine_of(alias: str) -> Engine:
    """Return an engine for a database of the project, as its settings are now; thread-safe.

    Raises:
        UsageError: it is an SQLite database in memory, which a second connection can't reach, or
            outbox can't store events there.
        MissingExtra: SQLAlchemy is not installed.
    """
    wrapper = connections[alias]
    # A test run changes NAME after the start.
    key = alias, repr(sorted(wrapper.settings_dict.items(), key=str))
    found = _engines.get(key)
    if found is None:
        with _lock:
            found = _engines.get(key) or _engines.setdefault(key, _make(alias, wrapper))
    return found


def can_hand_over(alias: str) -> bool:
    """Return whether this process may publish rows of a database while it writes others.

    On SQLite only if the application's transactions begin with the lock: one that has read first
    fails at once if another connection has written meanwhile.
    """
    wrapper = connections[alias]
    if wrapper.vendor != "sqlite":
        return True
    if _is_in_memory(wrapper):
        return False
    mode = str(wrapper.settings_dict.get("OPTIONS", {}).get("transaction_mode", "")).upper()
    return mode in ("IMMEDIATE", "EXCLUSIVE")


def _is_in_memory(wrapper: Any) -> bool:
    name = str(wrapper.settings_dict["NAME"])
    return name in ("", ":memory:") or "mode=memory" in name


def _make(alias: str, wrapper: Any) -> Engine:
    from outbox.storage.engines import open_engine  # reports a missing extra

    vendor = vendor_of(alias)
    from sqlalchemy import URL, NullPool, QueuePool, create_engine

    if vendor == "sqlite":
        if _is_in_memory(wrapper):
            raise UsageError(
                f"the database {alias!r} is in memory, where no other connection finds it"
            )
        path = Path(str(wrapper.settings_dict["NAME"])).absolute()
        return open_engine(URL.create("sqlite", database=str(path)), pool=NullPool)

    # Not the wrapper itself: its connection would stay open for as long as the engine lives.
    unconnected = wrapper.copy()
    unconnected.settings_dict["OPTIONS"].pop("pool", None)

    def connect() -> Any:
        copy = unconnected.copy()
        copy.connect()  # with its time zone, its role, and what connection_created does
        copy.set_autocommit(False)
        return copy.connection

    return create_engine(
        URL.create(f"{vendor}+{_driver_of(wrapper)}"),
        creator=connect,
        pool_pre_ping=True,
        # A test run drops its databases, which must have no connection then.
        poolclass=NullPool if is_test_environment() else QueuePool,
    )


def _driver_of(wrapper: Any) -> str:
    """Return SQLAlchemy's name for the driver that Django uses."""
    if wrapper.vendor == "postgresql":
        from django.db.backends.postgresql.psycopg_any import is_psycopg3

        return "psycopg" if is_psycopg3 else "psycopg2"
    driver: Any = sys.modules.get("MySQLdb")
    return "pymysql" if getattr(driver, "__name__", "") == "pymysql" else "mysqldb"


def _forget_inherited() -> None:
    global _lock
    _lock = threading.Lock()
    for engine in _engines.values():
        engine.dispose(close=False)  # its connections are the parent's
    _engines.clear()


process.after_fork(_forget_inherited)
