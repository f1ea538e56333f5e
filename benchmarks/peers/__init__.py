"""Other ways to publish and to consume, each as its own documentation has it done safely.

Every publisher here does the same work: 200 bytes of JSON, persistent, mandatory, confirmed, to the
same topic exchange and queue. Dramatiq differs where it must: it publishes its own, larger messages
to its own classic queue, not mandatory.
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
    """Something that publishes.

    Attributes:
        name: what the table calls it.
        chunks: the sizes of chunks that it is measured with.
        queue: where its messages are to be found, if it is one of its own.
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
