"""Presence: worker and relay processes announce themselves on the broker, to be seen by others."""

from outbox.presence.announcement import Announcement
from outbox.presence.announcing import announced
from outbox.presence.listener import heard, listen

__all__ = ["Announcement", "announced", "heard", "listen"]
