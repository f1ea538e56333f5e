"""Reports: the fates of the events of a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from outbox.errors import BrokerError
from outbox.event import Event

__all__ = ["PublishFailed", "PublishReport", "Rejection", "Withdrawn"]


class Rejection(NamedTuple):
    """An event that was given up, with the reason."""

    event: Event
    reason: str


class Withdrawn(Rejection):
    """An event given up only because of ``keep=False``: a later attempt may succeed."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class PublishReport:
    """The fate of every event of a chunk: each is in exactly one of the tuples, in chunk order.

    Attributes:
        published: confirmed by the broker, which is responsible for them now.
        kept: not confirmed yet; the publisher keeps and retries them. A retry may deliver an event
            twice, with the same id.
        parked: no queue was bound for them; confirmed in ``outbox.unroutable``.
        ignored: no queue was bound for them, which ``unroutable="ignore"`` allows.
        rejected: given up, with the reason; ``Withdrawn`` if only because of ``keep=False``.
        error: the reason why events are kept or withdrawn, or None.
    """

    published: tuple[Event, ...] = ()
    kept: tuple[Event, ...] = ()
    parked: tuple[Event, ...] = ()
    ignored: tuple[Event, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    error: BrokerError | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was kept and nothing was rejected."""
        return not self.kept and not self.rejected

    def raise_for_failure(self) -> Self:
        """Return the report, if it is ok.

        Raises:
            PublishFailed: events were kept or rejected; its ``report`` is this one.
        """
        if not self.ok:
            raise PublishFailed(self) from self.error
        return self

    def __str__(self) -> str:
        counts = {
            "published": self.published,
            "kept": self.kept,
            "parked": self.parked,
            "ignored": self.ignored,
            "rejected": self.rejected,
        }
        summary = ", ".join(f"{len(events)} {name}" for name, events in counts.items() if events)
        reasons = "; ".join(f"{event.id}: {reason}" for event, reason in self.rejected[:3])
        return (
            (summary or "nothing to publish")
            + (f" ({reasons})" if reasons else "")
            + (f": {self.error}" if self.error is not None else "")
        )


class PublishFailed(BrokerError):
    """Some events of a chunk were not published.

    Attributes:
        report: the :class:`outbox.PublishReport` with every event's fate.
        is_of_message: whether they are follow-on events of a message, published with its worker's
            publisher.
    """

    def __init__(self, report: PublishReport) -> None:
        super().__init__(report)
        self.report = report
        self.is_of_message = False

    def __str__(self) -> str:
        return str(self.report)
