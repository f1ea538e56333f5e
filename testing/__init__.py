"""Tools for the tests of code that uses outbox; the pytest plugin offers them as fixtures."""

from outbox.testing.collected import CollectedEvents, Matches

__all__ = ["CollectedEvents", "Matches"]
