"""Taps: watch the events that pass through RabbitMQ, without taking any away."""

from outbox.tap.event_tap import Tap

__all__ = ["Tap"]
