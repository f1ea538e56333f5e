"""Which queues an event goes to."""

from __future__ import annotations

from collections.abc import Sequence

from outbox.topics import matches
from outbox.transports.sqlite.bindings import Binding, of_queue

__all__ = ["Routes"]

_CACHED = 10_000  # addresses; targets may be made of user data


class Routes:
    """Routes as a topic exchange does, and the exchange ``""`` to queues by their names.

    For one thread; no I/O.
    """

    def __init__(self) -> None:
        self._bindings: frozenset[Binding] = frozenset()
        self._by_exchange: dict[str, list[Binding]] = {}
        self._cache: dict[tuple[str, str], tuple[str, ...]] = {}

    def update(self, bindings: Sequence[Binding]) -> None:
        """Route by these from now on."""
        found = frozenset(bindings)
        if found == self._bindings:
            return
        self._bindings = found
        self._by_exchange = {}
        for one in found:
            self._by_exchange.setdefault(one.exchange, []).append(one)
        self._cache.clear()

    def has_queue(self, name: str) -> bool:
        """Return whether there is a queue of this name."""
        return of_queue(name) in self._bindings

    def queues(self, exchange: str, target: str) -> tuple[str, ...]:
        """Return the queues that get an event, each once, by name; empty if none does."""
        if not exchange:
            return (target,) if self.has_queue(target) else ()
        address = (exchange, target)
        found = self._cache.get(address)
        if found is None:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            bound = self._by_exchange.get(exchange, ())
            found = tuple(sorted({one.queue for one in bound if matches(one.pattern, target)}))
            self._cache[address] = found
        return found
