"""A service's parent, as its faces see it."""

from __future__ import annotations

from outbox import exit_codes
from outbox.service.state import ServiceState

__all__ = ["Service"]


class Service:
    """A parent whose state a test sets."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state

    def leave(self, timeout: float | None = None) -> None:
        raise NotImplementedError

    def stop(self, code: int = exit_codes.SUCCESS) -> None:
        raise NotImplementedError

    def quiet(self) -> None:
        raise NotImplementedError

    def dump(self) -> None:
        raise NotImplementedError
