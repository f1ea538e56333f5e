"""Tracebacks as the application's developers read them: without the frames of outbox."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType

from outbox.consumers.outcome import RemoteError

__all__ = ["strip_engine", "strip_import", "traceback_of"]

_ENGINES = ("outbox.consumers.", "outbox.testing.")
_LONGEST = 4_000
_FRAMES = 20


def traceback_of(error: BaseException) -> str:
    """Return the end of the traceback, at most 4,000 characters.

    It includes the exceptions that ``error`` was raised from, and the members of a group.
    """
    try:
        return error.traceback if isinstance(error, RemoteError) else _traceback_of(error)
    except Exception as why:  # an application's exception may fail at anything
        return f"(traceback unavailable: {type(why).__qualname__})"


def strip_engine(error: BaseException) -> None:
    """Remove the engine's frames from the tracebacks of ``error``, its causes and its members.

    So logs, dead letters, callbacks and error trackers begin at the application's code. A bug of
    outbox keeps its frames: then there are no others.
    """
    _strip(error, lambda module: module.startswith(_ENGINES), keeps_bugs=True)


def strip_import(error: BaseException) -> None:
    """Remove outbox's and importlib's frames, likewise, from an error in an imported module."""
    _strip(error, lambda module: module.startswith(("outbox.", "importlib")), keeps_bugs=False)


def _strip(error: BaseException, is_foreign: Callable[[str], bool], *, keeps_bugs: bool) -> None:
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        stripped = _stripped(part.__traceback__, is_foreign)
        is_bug = stripped is None and not type(part).__module__.startswith("outbox.")
        if not (is_bug and keeps_bugs):
            part.__traceback__ = stripped
        pending += [part.__cause__, part.__context__]
        if isinstance(part, BaseExceptionGroup):
            pending += part.exceptions


def _stripped(
    entry: TracebackType | None, is_foreign: Callable[[str], bool]
) -> TracebackType | None:
    kept: list[TracebackType] = []
    while entry is not None:
        if not is_foreign(str(entry.tb_frame.f_globals.get("__name__"))):
            kept.append(entry)
        entry = entry.tb_next
    following: TracebackType | None = None
    for entry in reversed(kept):
        entry.tb_next = following
        following = entry
    return following


def _traceback_of(error: BaseException) -> str:
    whole = traceback.TracebackException.from_exception(error, max_group_width=5, max_group_depth=3)
    pending = [whole]
    while pending:
        part = pending.pop()
        part.stack = traceback.StackSummary.from_list(part.stack[-_FRAMES:])
        pending += [
            other for other in (part.__cause__, part.__context__, *(part.exceptions or ())) if other
        ]
    text = "".join(whole.format()).rstrip()
    return text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}"
