"""The table of recurring tasks, for a database as the broker; see ``outbox sql ddl``."""

from django.db import migrations

from outbox.django.tables import CompleteTables

RECURRING = (
    "CREATE TABLE IF NOT EXISTS outbox_recurring ("
    "queue VARCHAR(255) NOT NULL, "
    "name VARCHAR(255) NOT NULL, "
    "schedule {} NOT NULL, "
    "next_at_us BIGINT NOT NULL, "
    "last_at_us BIGINT, "
    "seen_at_us BIGINT NOT NULL, "
    "PRIMARY KEY (queue, name))"
)
MARIADB_OPTIONS = "ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin"
UNDONE = ("DROP TABLE outbox_recurring",)


class Migration(migrations.Migration):
    dependencies = (("outbox_events", "0002_bindings"),)
    operations = (
        CompleteTables(
            {
                "postgresql": (RECURRING.format("TEXT"),),
                "sqlite": (RECURRING.format("TEXT"),),
                "mysql": (f"{RECURRING.format('LONGTEXT')} {MARIADB_OPTIONS}",),
            },
            {"postgresql": UNDONE, "sqlite": UNDONE, "mysql": UNDONE},
        ),
    )
