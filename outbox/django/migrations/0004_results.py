"""The table of the results of tasks; see ``outbox sql ddl``."""

from django.db import migrations

from outbox.django.tables import CompleteTables

RESULTS = (
    "CREATE TABLE IF NOT EXISTS outbox_results ("
    "id VARCHAR(255) NOT NULL, "
    "task VARCHAR(255) DEFAULT '' NOT NULL, "
    "queue VARCHAR(255) DEFAULT '' NOT NULL, "
    "status VARCHAR(10) NOT NULL, "
    "args {text}, "
    "value {text}, "
    "is_typed SMALLINT DEFAULT 0 NOT NULL, "
    "attempt INTEGER DEFAULT 0 NOT NULL, "
    "error_type VARCHAR(255), "
    "error {text}, "
    "traceback {text}, "
    "token VARCHAR(36), "
    "worker VARCHAR(255) DEFAULT '' NOT NULL, "
    "enqueued_at {time}, "
    "started_at {time}, "
    "attempted_at {time}, "
    "running_until {time}, "
    "ended_at {time}, "
    "kept_until {time} NOT NULL, "
    "PRIMARY KEY (id))"
)
KEPT = "CREATE INDEX IF NOT EXISTS outbox_results_kept ON outbox_results (kept_until)"
MARIADB_OPTIONS = "ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin"
POSTGRESQL = RESULTS.format(text="TEXT", time="TIMESTAMP WITH TIME ZONE")
MARIADB = RESULTS.format(text="LONGTEXT", time="DATETIME(6)")
UNDONE = ("DROP TABLE outbox_results",)


class Migration(migrations.Migration):
    dependencies = (("outbox_events", "0003_recurring"),)
    operations = (
        CompleteTables(
            {
                "postgresql": (POSTGRESQL, KEPT),
                "sqlite": (RESULTS.format(text="TEXT", time="FLOAT"), KEPT),
                "mysql": (f"{MARIADB} {MARIADB_OPTIONS}", KEPT),
            },
            {"postgresql": UNDONE, "sqlite": UNDONE, "mysql": UNDONE},
        ),
    )
