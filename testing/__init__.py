"""Tools for testing code that uses outbox; the pytest plugin offers them as fixtures."""

from outbox.testing.assertions import EventAssertions, Matches
from outbox.testing.broker import BrokerMissing, PrivateBroker
from outbox.testing.collected_events import CollectedEvents
from outbox.testing.databases.mariadb import MariaDBMissing, PrivateMariaDB
from outbox.testing.databases.postgresql import PostgreSQLMissing, PrivatePostgreSQL
from outbox.testing.installation import live, recorded
from outbox.testing.live_events import LiveEvents
from outbox.testing.recorded_delivery import Delivered
from outbox.testing.recorder import SimulatedCrash
from outbox.testing.unittest import CollectedEventsMixin

__all__ = [
    "BrokerMissing",
    "CollectedEvents",
    "CollectedEventsMixin",
    "Delivered",
    "EventAssertions",
    "LiveEvents",
    "MariaDBMissing",
    "Matches",
    "PostgreSQLMissing",
    "PrivateBroker",
    "PrivateMariaDB",
    "PrivatePostgreSQL",
    "SimulatedCrash",
    "live",
    "recorded",
]
