"""The end of a child that a handler forks.

If the child's copy of the handler ends other than by ``os._exit``, it returns into a copy of the
worker, which would process, a second time, all that the worker has in hand.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from outbox.system import process

__all__ = ["end_child"]


def end_child(error: BaseException | None) -> NoReturn:
    """End this process as the interpreter would at the end of a program, but without ``atexit``.

    That would run what the application has registered for the end of the parent. Events that the
    child has published are drained.

    Args:
        error: the exception with which the child's code ended; None if it returned.
    """
    code = 1
    try:
        code = _code_of(error)
        process.run_at_exit()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


def _code_of(error: BaseException | None) -> int:
    """Return the exit code for ``error``, after writing it to standard error."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1
