"""The operation that creates outbox's tables in a migration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.db import router
from django.db.migrations.operations.base import Operation

from outbox import UsageError

__all__ = ["CompleteTables", "CreateTables"]


class CreateTables(Operation):
    """Creates tables by statements of each vendor, which ``sqlmigrate`` prints.

    Django's own statements for the models would lack the defaults that are the database's, and the
    types that outbox needs. A table that is there already, from ``outbox sql create``, is taken
    over with all its rows if it has all columns.
    """

    reversible = True

    def __init__(self, statements: Mapping[str, Sequence[str]]) -> None:
        """Make the operation of the statements of each vendor; each names the table it is for."""
        self.statements = statements

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Change nothing: the migration says what the models are."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Create the tables that the database lacks.

        Raises:
            UsageError: a table is there, but lacks columns; or the database is of a vendor in
                which outbox can't store events.
        """
        connection = schema_editor.connection
        models = list(to_state.apps.get_app_config(app_label).get_models())
        if not all(router.allow_migrate_model(connection.alias, model) for model in models):
            return
        if connection.vendor not in self.statements:
            raise UsageError(
                f"events cannot be stored in {connection.vendor!r}, the database "
                f"{connection.alias!r}; keep the app out of it with a router's allow_migrate()"
            )
        present = set() if schema_editor.collect_sql else _present(connection, models)
        for statement in self.statements[connection.vendor]:
            if not any(table in statement.split() for table in present):
                # Without parameters: schema_editor would look for placeholders in the text.
                schema_editor.execute(statement, params=None)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Drop the tables, with all events that wait in them."""
        # Django gives the states in the order of time here: the models are in the former.
        models = list(from_state.apps.get_app_config(app_label).get_models())
        if all(router.allow_migrate_model(schema_editor.connection.alias, each) for each in models):
            for model in models:
                quoted = schema_editor.quote_name(model._meta.db_table)
                schema_editor.execute(f"DROP TABLE {quoted}", params=None)

    def describe(self) -> str:
        """Return what it does, for Django's output."""
        return "Create the tables of outbox"


class CompleteTables(Operation):
    """Adds what a later version of outbox needs, by statements of each vendor.

    Each may find that ``outbox sql create`` or ``outbox sql upgrade`` has done its work.
    """

    reversible = True

    def __init__(
        self, statements: Mapping[str, Sequence[str]], undone: Mapping[str, Sequence[str]]
    ) -> None:
        """Make the operation of the statements of each vendor, and of those that undo it."""
        self.statements = statements
        self.undone = undone

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Change nothing: no model is about it."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Execute the statements of the database's vendor."""
        self._execute(self.statements, app_label, schema_editor, to_state)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Execute those that undo it."""
        self._execute(self.undone, app_label, schema_editor, from_state)

    @staticmethod
    def _execute(
        statements: Mapping[str, Sequence[str]], app_label: str, schema_editor: Any, state: Any
    ) -> None:
        connection = schema_editor.connection
        models = state.apps.get_app_config(app_label).get_models()
        if all(router.allow_migrate_model(connection.alias, model) for model in models):
            for statement in statements[connection.vendor]:
                # Without parameters: schema_editor would look for placeholders in the text.
                schema_editor.execute(statement, params=None)

    def describe(self) -> str:
        """Return what it does, for Django's output."""
        return "Complete the tables of outbox"


def _present(connection: Any, models: Any) -> set[str]:
    """Return the tables that are there.

    Raises:
        UsageError: one of them lacks columns.
    """
    present = set()
    with connection.cursor() as cursor:
        names = connection.introspection.table_names(cursor)
        for model in models:
            table = model._meta.db_table
            if table not in names:
                continue
            present.add(table)
            found = {
                each.name for each in connection.introspection.get_table_description(cursor, table)
            }
            missing = [each.column for each in model._meta.fields if each.column not in found]
            if missing:
                raise UsageError(
                    f"the table {table} in the database {connection.alias!r} lacks the columns "
                    f"{', '.join(missing)}; rename or drop it, or add them (`outbox sql ddl`)"
                )
    return present
