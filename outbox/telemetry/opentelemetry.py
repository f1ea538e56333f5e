"""The instrumentor, which turns OpenTelemetry's traces of events and messages on and off."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, get_args

from outbox.errors import MissingExtra, UsageError
from outbox.telemetry.tracing import seam

try:
    from outbox.telemetry.spans import Parent, SpanTracer
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("opentelemetry"):
        raise
    raise MissingExtra("traces need OpenTelemetry: pip install 'outbox-events[otel]'") from missing

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["OutboxInstrumentor"]

logger = logging.getLogger("outbox.telemetry")


class OutboxInstrumentor:
    """Instruments outbox in this process. All instances act on the same state.

    ``opentelemetry-instrument`` finds it by its entry point. Thread-safe, but what is under way
    when it is turned on or off may have no span.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the packages that are instrumented, which are none but outbox itself."""
        return ()

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether traces are turned on."""
        return seam.tracer is not None

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        create_spans: bool = False,
        parent: Parent = "auto",
        propagate_baggage: bool = False,
        skip_dep_check: bool = True,
    ) -> None:
        """Turn traces on; where they are on already, only warn.

        Args:
            tracer_provider: the provider of the spans; None for the global one, also if that is
                set later.
            create_spans: whether each event gets a span when it is enqueued.
            parent: when the span of an attempt is a child of the span in which the event was
                enqueued: ``always``, ``never``, or ``auto``: unless the event was delayed or
                replayed, or its first failure was more than 60 s ago. Otherwise it begins a new
                trace. It has a link to that span in any case.
            propagate_baggage: whether events carry the baggage, up to 8 KiB. It gets into the
                broker, the database and dead letters, so it must hold nothing personal.
            skip_dep_check: given by ``opentelemetry-instrument``; it has no effect.

        Raises:
            UsageError: ``parent`` is none of these.
        """
        if parent not in get_args(Parent):
            raise UsageError(f"parent={parent!r} is not one of {', '.join(get_args(Parent))}")
        if seam.tracer is not None:
            logger.warning("outbox is instrumented already; uninstrument() it first")
            return
        seam.tracer = SpanTracer(
            tracer_provider,
            create_spans=create_spans,
            parent=parent,
            propagate_baggage=propagate_baggage,
        )

    def uninstrument(self) -> None:
        """Turn traces off; spans that have begun still end."""
        seam.tracer = None
