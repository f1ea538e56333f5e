"""The pulse of a process: which of its parts still answer. Seen from inside the process."""

from __future__ import annotations

from collections.abc import Callable

from outbox.service.health.judge import LONGEST_STEP

__all__ = ["Ask", "Pulse"]

Ask = Callable[[Callable[[], None]], bool]
"""Has a function called soon on some thread; returns False if that thread can't be asked now."""


class Pulse:
    """Asks a thread for an answer, again and again. Used by one thread.

    Only steps are added up, each of at most some seconds: a process that was stopped for an hour
    has not waited an hour for the answer.
    """

    def __init__(self, ask: Ask) -> None:
        """Ask with ``ask``, from the first step on."""
        self._ask = ask
        self._question: object = None
        self._silence = 0.0

    def step(self, seconds: float) -> float | None:
        """Let ``seconds`` go by.

        Returns:
            How long the thread has owed an answer, in seconds; None if it can't be asked.
        """
        if self._question is not None:
            self._silence += min(seconds, LONGEST_STEP)
            return self._silence
        self._silence = 0.0
        question = self._question = object()

        def answer() -> None:
            if self._question is question:
                self._question = None

        if not self._ask(answer):
            self._question = None
            return None
        return 0.0
