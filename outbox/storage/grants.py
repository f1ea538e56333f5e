"""The rights that roles of a database server need, as statements."""

from __future__ import annotations

from sqlalchemy.engine import URL

from outbox.errors import UsageError
from outbox.storage.schema import bindings, events, known_dialect, meta, metadata

__all__ = ["grants"]

_STORING = {bindings.name: "SELECT", meta.name: "SELECT"}
# The number of a new row is read back where an ORM writes it, for which MariaDB asks for the right
# to read all of it. No sequence is needed: it is an identity.
_STORING_EVENTS = {"postgresql": "INSERT, SELECT (seq)", "mariadb": "INSERT, SELECT"}
_WORKING = "SELECT, INSERT, UPDATE, DELETE"


def grants(dialect: str, storing: str | None, working: str | None, schema: str = "") -> list[str]:
    """Return the statements that give roles their rights.

    Args:
        dialect: ``"postgresql"``, ``"mariadb"`` or ``"mysql"``.
        storing: the role of those that only store events, and leave publishing to relays and
            workers; on MariaDB a role or a user, also with its host: ``app@10.0.0.%``. None for no
            such role.
        working: the role of relays and workers, and of those that store events and publish them
            after the commit.
        schema: the schema of the tables; on MariaDB their database. Empty for the current one.

    Raises:
        UsageError: the database has no roles, or none is named.
    """
    known = known_dialect(dialect)
    if known == "sqlite":
        raise UsageError("SQLite has no roles: who may write the file may do everything")
    if storing is None and working is None:
        raise UsageError("no role is named; use --role, --workers, or both")
    storing_rights = {**_STORING, events.name: _STORING_EVENTS[known]}
    prefix = f"{_quoted(known, schema)}." if schema else ""
    statements: list[str] = []
    for role in (storing, working):
        if role is None:
            continue
        grantee = _quoted(known, role) if known == "postgresql" else _account(role)
        if schema and known == "postgresql":
            statements.append(f"GRANT USAGE ON SCHEMA {_quoted(known, schema)} TO {grantee}")
        for table in metadata.sorted_tables:
            rights = _WORKING if role is working else storing_rights.get(table.name)
            if rights is not None:
                statements.append(f"GRANT {rights} ON {prefix}{table.name} TO {grantee}")
    return statements


def _quoted(dialect: str, name: str) -> str:
    quoted: str = URL.create(dialect).get_dialect()().identifier_preparer.quote(name)
    return quoted


def _account(name: str) -> str:
    user, at, host = name.rpartition("@")
    parts = [user, host] if at else [name]
    return "@".join("'{}'".format(part.strip("'").replace("'", "''")) for part in parts)
