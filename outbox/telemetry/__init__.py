"""Telemetry: metrics for Prometheus, the probes of a service, and traces for OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox.telemetry.opentelemetry import OutboxInstrumentor
    from outbox.telemetry.prometheus import PrometheusCollector

__all__ = ["OutboxInstrumentor", "PrometheusCollector"]


def __getattr__(name: str) -> Any:  # so that what isn't used need not be installed
    if name == "OutboxInstrumentor":
        from outbox.telemetry.opentelemetry import OutboxInstrumentor

        return OutboxInstrumentor
    if name == "PrometheusCollector":
        from outbox.telemetry.prometheus import PrometheusCollector

        return PrometheusCollector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
