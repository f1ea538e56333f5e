"""Other ways to publish and to consume, each as safe as its documentation describes.

Every publisher does the same work: 200 bytes of JSON, persistent, mandatory, confirmed, to the same
topic exchange and queue. Dramatiq differs where it must: it publishes its own, larger messages to
its own classic queue, without the mandatory flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["BODY", "EXCHANGE", "TARGET", "Peer"]

EXCHANGE = "bench"
TARGET = "bench.event"
BODY = b'{"order_id":12345,"padding":"' + b"x" * 169 + b'"}'
assert len(BODY) == 200


class Peer(Protocol):
    """A contender that publishes.

    Attributes:
        name: its name in the table.
        chunks: the chunk sizes that it is measured with.
        queue: the queue of its messages, if it isn't the common one.
    """

    name: str
    chunks: Sequence[int]
    queue: str | None

    def publish(self, chunk: int, times: int) -> float:
        """Publish ``times`` chunks, each confirmed before the next; return the seconds taken."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...
