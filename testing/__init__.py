"""Tools for the tests of code that uses outbox; the pytest plugin offers them as fixtures."""

from outbox.testing.assertions import EventAssertions, Matches
from outbox.testing.collected import CollectedEvents
from outbox.testing.delivering import Delivered
from outbox.testing.live_events import LiveEvents
from outbox.testing.recorder import SimulatedCrash
from outbox.testing.recording import live, recorded
from outbox.testing.unittest import CollectedEventsMixin

__all__ = [
    "CollectedEvents",
    "CollectedEventsMixin",
    "Delivered",
    "EventAssertions",
    "LiveEvents",
    "Matches",
    "SimulatedCrash",
    "live",
    "recorded",
]
