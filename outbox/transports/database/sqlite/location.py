"""The file that a ``sqlite://`` URL names, and how it is written."""

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
    """The place of the events.

    Attributes:
        path: the absolute path of the file.
        synchronous: ``FULL`` if commits survive a power failure; ``NORMAL`` if a power failure may
            undo the last ones.
    """

    path: str
    synchronous: str

    @classmethod
    def of(cls, url: BrokerURL) -> Self:
        """Return the location for a URL such as ``sqlite:///file.db?synchronous=full``.

        Raises:
            UsageError: the URL names no file, or has an unknown option.
        """
        unknown = [name for name in url.options if name != "synchronous"]
        if unknown:
            raise UsageError(
                f"unknown option {unknown[0]!r} in the sqlite URL; the only option is synchronous"
            )
        chosen = url.options.get("synchronous", "full")
        if chosen not in _SYNCHRONOUS:
            raise UsageError(
                f"invalid synchronous={chosen} in the sqlite URL; use {' or '.join(_SYNCHRONOUS)}"
            )
        if url.path in ("", ":memory:"):
            raise UsageError("the sqlite URL names no file; use sqlite:///outbox.db")
        return cls(os.path.abspath(url.path), _SYNCHRONOUS[chosen])

    def check_exists(self) -> None:
        """Raise UsageError if there is no file."""
        if not os.path.exists(self.path):
            raise UsageError(f"no file {self.path}")

    def __str__(self) -> str:
        return f"sqlite:///{self.path}"
