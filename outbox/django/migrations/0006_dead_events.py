"""An index for dead events; see ``outbox sql ddl``."""

from django.db import migrations

from outbox.django.tables import CompleteTables

DEAD = (
    "CREATE INDEX IF NOT EXISTS outbox_events_dead ON outbox_events (seq) WHERE dead_at IS NOT NULL"
)
UNDONE = ("DROP INDEX outbox_events_dead",)


class Migration(migrations.Migration):
    dependencies = (("outbox_events", "0005_presence"),)
    operations = (
        CompleteTables(
            # MariaDB has no partial indexes: there dead events are found by when they are due.
            {"postgresql": (DEAD,), "sqlite": (DEAD,), "mysql": ()},
            {"postgresql": UNDONE, "sqlite": UNDONE, "mysql": ()},
        ),
    )
