"""Whether Django's tests run."""

from __future__ import annotations

from django.core import mail

__all__ = ["is_test_environment"]


def is_test_environment() -> bool:
    """Return whether Django's ``setup_test_environment()`` has run and was not undone."""
    return hasattr(mail, "outbox")  # it exists for exactly that time
