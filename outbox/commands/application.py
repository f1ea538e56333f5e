"""What a framework's application says to the commands, where the command line doesn't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from outbox.settings import SettingOverrides

__all__ = ["Application"]


@dataclass(frozen=True, slots=True)
class Application:
    """The application that a command works for; the default is none.

    Attributes:
        prog: how the command is called, for its help.
        url: the broker URL; None for ``OUTBOX_URL``.
        settings: the settings of its publisher.
        database_url: the database with the stored events, or None.
        engine: returns the engine of its database, which the command leaves open, if there is no
            ``database_url``; None for ``OUTBOX_DATABASE_URL``.
        engine_of: returns the engine of the database that ``--database`` names by its alias, with
            None that of the application's; None if ``--database`` takes a URL.
        modules: returns the names of its modules with consumers, or raises a ``UsageError`` if
            there are none; None if only the command line names them.
        consume: the arguments of Python for the command that consumes.
        folder: the folder of its code.
        is_django: whether it is a Django project.
    """

    prog: str = "outbox"
    url: str | None = field(default=None, repr=False)
    settings: SettingOverrides = field(default_factory=SettingOverrides, repr=False)
    database_url: str | None = field(default=None, repr=False)
    engine: Callable[[], Any] | None = None
    engine_of: Callable[[str | None], Any] | None = None
    modules: Callable[[], Sequence[str]] | None = None
    consume: Sequence[str] = ("-m", "outbox.consumers")
    folder: str = "."
    is_django: bool = False
