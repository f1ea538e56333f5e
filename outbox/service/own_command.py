"""The command line that starts the present program again, after a deployment the new code.

A deployment often consists of a new folder and a link that leads to it: ``current``. The kernel
resolves such links early: in the working directory, and so in a relative path of the interpreter.
A console script's first line holds the path of an interpreter, which may be in the old folder. So
what is kept is what was given, as far as it can be found out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["own_command", "working_directory"]


def own_command() -> tuple[str, ...]:
    """Return the command line that starts this program again in ``working_directory()``."""
    interpreter, *arguments = sys.orig_argv or [sys.executable]
    if arguments and _is_run_by_first_line(arguments[0], interpreter):
        return tuple(arguments)
    return (_executable(), *arguments)


def working_directory() -> str:
    """Return the working directory, by the links through which it was given.

    They are known from the shell, which leaves ``PWD``, or from an absolute path to the program on
    the command line. A service manager sets neither of itself.
    """
    try:
        real = os.getcwd()
    except OSError:  # it was removed
        return os.environ.get("PWD", "") or os.sep
    for given in (os.environ.get("PWD", ""), *_on_command_line(real)):
        with contextlib.suppress(OSError, ValueError):
            if os.path.isabs(given) and os.path.samefile(given, real):
                return given
    return real


def _on_command_line(real: str) -> Iterator[str]:
    """Yield the working directory by the links in paths to the program."""
    for path in filter(os.path.isabs, sys.orig_argv[:2]):
        for folder in map(str, Path(path).parents):
            resolved = os.path.realpath(folder)
            if resolved != folder and f"{real}{os.sep}".startswith(f"{resolved}{os.sep}"):
                yield folder + real[len(resolved) :]


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
