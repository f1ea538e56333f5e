"""The end of an attempt, as a tracer needs it."""

from __future__ import annotations

from outbox.consumers.message.tally import name_of
from outbox.consumers.outcome import Again, Dead, Hold, Outcome
from outbox.telemetry.tracing import Processing

__all__ = ["end_processing"]


def end_processing(processing: Processing, outcome: Outcome | None) -> None:
    """End ``processing`` with ``outcome``; None if the message is left, to be redelivered."""
    match outcome:
        case None:
            processing.end("returned")
        case Hold():
            processing.end("held")
        case Again(error=error):
            processing.end(name_of(outcome), error)
        case Dead(error=error, decisive=decisive):
            processing.end(name_of(outcome), decisive or error, outcome.reason)
        case _:
            processing.end(name_of(outcome))
