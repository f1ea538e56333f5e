"""From a ``sqlite://`` URL to the file and how it is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from outbox.errors import UsageError
from outbox.url import BrokerURL

__all__ = ["Location"]

_SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL"}


@dataclass(frozen=True, slots=True)
class Location:
    """Where events are.

    Attributes:
        path: of the file, absolute.
        synchronous: ``FULL``: what is committed outlives a power cut; ``NORMAL``: a power cut may
            take the last transactions.
    """

    path: str
    synchronous: str

    @classmethod
    def of(cls, url: BrokerURL) -> Self:
        """Return what ``sqlite:///file.db?synchronous=full`` names.

        Raises:
            UsageError: it names no file, or has an option that is not known.
        """
        unknown = [name for name in url.options if name != "synchronous"]
        if unknown:
            raise UsageError(
                f"the option {unknown[0]!r} of the sqlite URL is not known; it takes synchronous"
            )
        chosen = url.options.get("synchronous", "full")
        if chosen not in _SYNCHRONOUS:
            raise UsageError(
                f"synchronous={chosen} in the sqlite URL is none of {', '.join(_SYNCHRONOUS)}"
            )
        if url.path in ("", ":memory:"):
            raise UsageError("the sqlite URL names no file; use sqlite:///outbox.db")
        return cls(os.path.abspath(url.path), _SYNCHRONOUS[chosen])

    def __str__(self) -> str:
        return f"sqlite:///{self.path}"
