"""The fixture ``collected_events`` for test cases of ``unittest`` and Django."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Iterator

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

    # Around the whole test, and not in setUp(): a class whose own setUp() doesn't call it would
    # publish to the real broker.

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        """Run the test, its ``setUp()`` and its cleanups included, collecting its events."""
        with self._collecting():
            return super().run(result)

    def debug(self) -> None:
        """Run the test without collecting its errors."""
        with self._collecting():
            super().debug()

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        with recorded(self.id(), strict=self.strict_events) as self.collected_events:
            yield

    def _callTestMethod(self, method: object) -> None:
        super()._callTestMethod(method)  # type: ignore[misc]
        self.collected_events.check_strict()
