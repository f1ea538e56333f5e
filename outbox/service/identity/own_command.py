"""The command line that starts the present program again, after a deployment the new code.

A deployment often consists of a new folder and a link that leads to it: ``current``. Python
resolves such links early: in the working directory, and so in a relative path of the interpreter.
A console script's first line holds the path of an interpreter, which may be in the old folder. So
what is written down is what was given, as far as it can be found out.
"""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["own_command", "working_directory"]


def own_command() -> tuple[str, ...]:
    """Return the command line that starts this program again in ``working_directory()``."""
    interpreter, *arguments = sys.orig_argv or [sys.executable]
    if arguments and _is_run_by_first_line(arguments[0], interpreter):
        return tuple(arguments)
    return (_executable(), *arguments)


def working_directory() -> str:
    """Return the working directory, with the links in its path if the shell has them."""
    given = os.environ.get("PWD", "")
    try:
        real = os.getcwd()
    except OSError:  # it was removed
        return given or os.sep
    with contextlib.suppress(OSError):
        if os.path.isabs(given) and os.path.samefile(given, real):
            return given
    return real


def _executable() -> str:
    with contextlib.suppress(OSError):
        real, given = os.getcwd(), working_directory()
        if sys.executable.startswith(f"{real}{os.sep}"):
            return given + sys.executable[len(real) :]
    return sys.executable


def _is_run_by_first_line(script: str, interpreter: str) -> bool:
    """Return whether the kernel has chosen the interpreter by the first line of the script."""
    with contextlib.suppress(OSError):
        if os.sep in script and os.access(script, os.X_OK):
            with open(script, "rb") as file:
                line = file.readline(512)
            words = line[2:].split() if line.startswith(b"#!") else []
            return bool(words) and words[-1] == os.fsencode(interpreter)
    return False
