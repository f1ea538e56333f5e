"""The fixture ``collected_events`` for test cases of ``unittest`` and Django."""

from __future__ import annotations

import unittest

from outbox.testing.collected_events import CollectedEvents
from outbox.testing.installation import recorded

__all__ = ["CollectedEventsMixin"]


class CollectedEventsMixin(unittest.TestCase):
    """A mixin: ``self.collected_events`` collects each test's events instead of publishing them.

    Example:
        class OrderTest(CollectedEventsMixin, TestCase):
            def test_an_order_is_announced(self):
                place_order()
                self.collected_events.assert_published("order.placed")

    Attributes:
        collected_events: see :class:`outbox.testing.CollectedEvents`.
        strict_events: whether a test fails if a published event was matched by no assertion.
    """

    collected_events: CollectedEvents
    strict_events = False

    def setUp(self) -> None:
        """Start collecting events."""
        super().setUp()
        block = recorded(self.id(), strict=self.strict_events)
        self.collected_events = block.__enter__()
        self.addCleanup(block.__exit__, None, None, None)

    def _callTestMethod(self, method: object) -> None:
        super()._callTestMethod(method)  # type: ignore[misc]
        self.collected_events.check_strict()
