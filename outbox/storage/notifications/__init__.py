"""PostgreSQL's NOTIFY and LISTEN: hints that there are new rows.

A hint can be lost, so who listens also looks now and then. None is sent in an application's
transaction: PostgreSQL commits those that notify one after the other, each waiting for the disk.
"""

from outbox.storage.notifications.channels import (
    RELAY_CHANNEL,
    RESULTS_CHANNEL,
    can_listen,
    channel_of,
)
from outbox.storage.notifications.listening import Listener
from outbox.storage.notifications.sender import Sender

__all__ = ["RELAY_CHANNEL", "RESULTS_CHANNEL", "Listener", "Sender", "can_listen", "channel_of"]
