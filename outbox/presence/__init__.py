"""Presence: worker and relay processes announce themselves on the broker, for who listens."""

from outbox.presence.announcement import Announcement
from outbox.presence.announcing import announced
from outbox.presence.listener import heard, listen

__all__ = ["Announcement", "announced", "heard", "listen"]
