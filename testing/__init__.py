"""Tools for the tests of code that uses outbox; the pytest plugin offers them as fixtures."""

from outbox.testing.collected import CollectedEvents, Matches
from outbox.testing.delivering import Delivered
from outbox.testing.recorder import SimulatedCrash
from outbox.testing.recording import recorded
from outbox.testing.unittest import CollectedEventsMixin

__all__ = [
    "CollectedEvents",
    "CollectedEventsMixin",
    "Delivered",
    "Matches",
    "SimulatedCrash",
    "recorded",
]
