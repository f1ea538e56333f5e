"""The table in which processes announce themselves, for a database as the broker."""

from django.db import migrations

from outbox.django.tables import CompleteTables

PRESENCE = (
    "CREATE TABLE IF NOT EXISTS outbox_presence ("
    "process VARCHAR(32) NOT NULL, "
    "announcement {text} NOT NULL, "
    "announced_at {time} NOT NULL, "
    "PRIMARY KEY (process))"
)
MARIADB_OPTIONS = "ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin"
MARIADB = PRESENCE.format(text="LONGTEXT", time="DATETIME(6)")
UNDONE = ("DROP TABLE outbox_presence",)


class Migration(migrations.Migration):
    dependencies = (("outbox_events", "0004_results"),)
    operations = (
        CompleteTables(
            {
                "postgresql": (PRESENCE.format(text="TEXT", time="TIMESTAMP WITH TIME ZONE"),),
                "sqlite": (PRESENCE.format(text="TEXT", time="FLOAT"),),
                "mysql": (f"{MARIADB} {MARIADB_OPTIONS}",),
            },
            {"postgresql": UNDONE, "sqlite": UNDONE, "mysql": UNDONE},
        ),
    )
