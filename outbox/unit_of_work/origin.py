"""Where an event was enqueued, and whether the work that enqueued it is still running."""

from __future__ import annotations

import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

__all__ = ["Origin", "application_frame", "warn_at"]

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


class Origin:
    """The place where the first event was enqueued that a collector holds.

    Attributes:
        filename: the file of the application's line.
        line: its number.
    """

    __slots__ = ("_globals", "_stack", "_thread", "filename", "line")

    def __init__(self) -> None:
        """Note the innermost line outside outbox."""
        frame = application_frame()
        self.filename = frame.f_code.co_filename
        self.line = frame.f_lineno
        self._globals = frame.f_globals
        self._thread = threading.get_ident()
        self._stack = _stack(frame)

    def warn(self, message: str) -> None:
        """Warn in that line."""
        warn_at(message, self.filename, self.line, self._globals)

    def has_ended(self) -> bool:
        """Return whether the work that enqueued the event has ended, and other work goes on.

        Frames say so: if no function of the application that was running then is running now, only
        a library's loop is common to both, such as that of a thread pool's threads. In another
        thread, on an event loop (whose tasks have separate contexts) and at a console the answer
        is no.
        """
        asyncio: Any = sys.modules.get("asyncio")
        if (
            hasattr(sys, "ps1")
            or self._thread != threading.get_ident()
            or (asyncio is not None and asyncio._get_running_loop() is not None)
        ):
            return False
        now = set(_stack(application_frame()))
        common = next((entry for entry in self._stack if entry in now), None)
        return common is None or _is_library(common[1].co_filename)


def application_frame() -> FrameType:
    """Return the innermost frame outside outbox."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_own(frame):
        frame = frame.f_back
    return frame


def warn_at(message: str, filename: str, line: int, namespace: dict[str, Any]) -> None:
    """Issue a RuntimeWarning in ``line`` of the module that has this ``namespace``."""
    warnings.warn_explicit(
        message,
        RuntimeWarning,
        filename,
        line,
        module=namespace.get("__name__"),
        registry=namespace.setdefault("__warningregistry__", {}),
    )


def _stack(frame: FrameType) -> tuple[tuple[int, CodeType], ...]:
    """Return what identifies ``frame`` and its callers, innermost first.

    The frames themselves would keep their variables alive. Another frame of the same function may
    get the same address later: then the work seems to be running, and a warning is missed.
    """
    return tuple((id(frame), frame.f_code) for frame in _callers(frame))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_own(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == _PACKAGE or name.startswith(_PACKAGE + ".")


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES) or filename.startswith("<frozen")
