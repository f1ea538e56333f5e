"""The tables for a database as the broker, and an index for tasks; see ``outbox sql ddl``."""

from django.db import migrations

from outbox.django.tables import CompleteTables

BINDINGS = (
    "CREATE TABLE IF NOT EXISTS outbox_bindings ("
    "queue VARCHAR(255) NOT NULL, "
    "exchange VARCHAR(255) NOT NULL, "
    "pattern VARCHAR(255) NOT NULL, "
    "PRIMARY KEY (queue, exchange, pattern))"
)
META = (
    "CREATE TABLE IF NOT EXISTS outbox_meta ("
    "id VARCHAR(36) NOT NULL, "
    "schema_version INTEGER NOT NULL, "
    "PRIMARY KEY (id))"
)
MARIADB_OPTIONS = "ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin"
TASKS = "CREATE INDEX IF NOT EXISTS outbox_events_tasks ON outbox_events (id)"
ROW = (
    "INSERT INTO outbox_meta (id, schema_version) SELECT {}, 1 {} "
    "WHERE NOT EXISTS (SELECT 1 FROM outbox_meta)"
)
UNDONE = ("DROP TABLE outbox_meta", "DROP TABLE outbox_bindings")


class Migration(migrations.Migration):
    dependencies = (("outbox_events", "0001_initial"),)
    operations = (
        CompleteTables(
            {
                "postgresql": (
                    BINDINGS,
                    META,
                    ROW.format("gen_random_uuid()", ""),
                    f"{TASKS} WHERE strpos(headers, '\"outbox-task\"') > 0",
                    "ALTER TABLE outbox_events SET "
                    "(autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)",
                ),
                "sqlite": (
                    f"{BINDINGS} WITHOUT ROWID",
                    META,
                    ROW.format("lower(hex(randomblob(16)))", ""),
                    f"{TASKS} WHERE instr(headers, '\"outbox-task\"') > 0",
                ),
                "mysql": (
                    f"{BINDINGS} {MARIADB_OPTIONS}",
                    f"{META} {MARIADB_OPTIONS}",
                    ROW.format("UUID()", "FROM DUAL"),
                    TASKS,
                ),
            },
            {
                "postgresql": (
                    "ALTER TABLE outbox_events RESET "
                    "(autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold)",
                    "DROP INDEX outbox_events_tasks",
                    *UNDONE,
                ),
                "sqlite": ("DROP INDEX outbox_events_tasks", *UNDONE),
                "mysql": ("DROP INDEX outbox_events_tasks ON outbox_events", *UNDONE),
            },
        ),
    )
