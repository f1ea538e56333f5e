"""The name of the running program."""

from __future__ import annotations

import os
import sys

__all__ = ["program_name"]

_LONGEST = 255  # bytes: AMQP's short strings hold no more


def program_name() -> str:
    """Return the name of the running program, at most 255 bytes in UTF-8.

    It is the name of its file without ``.py`` or ``.pyz``, or what ``python -m`` was given. Empty
    where there is none: at a prompt, for ``python -c``, in an interpreter that is embedded without
    arguments.
    """
    name = _module() or _file()
    return name.encode(errors="replace")[:_LONGEST].decode(errors="ignore")


def _module() -> str:
    """Return the module that ``python -m`` runs, a package without its ``__main__``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name: str = getattr(spec, "name", None) or ""
    if name.startswith("outbox.consumers"):  # also the processes that a worker starts
        return "outbox-consume"
    # A folder or an archive that is run has the name "__main__" alone.
    return name.removesuffix("__main__").removesuffix(".")


def _file() -> str:
    arguments: list[str] = getattr(sys, "argv", [])  # an embedded interpreter may have none
    path = str(arguments[0]) if arguments else ""  # programs put a Path there
    if path == "-m":  # the package of the module is still being imported; its arguments follow it
        return sys.orig_argv[-len(arguments)].removeprefix("-m")
    if path in ("", "-", "-c"):
        return ""
    folder, name = os.path.split(path)
    if name in ("", ".", "..", "__main__.py"):
        # Only here, as it needs the working directory, which may have been removed.
        try:
            folder, name = os.path.split(os.path.abspath(path))
        except OSError:
            return ""
    if name == "__main__.py":  # a process of multiprocessing inherits the path, not the module
        name = os.path.basename(folder)
    return name.removesuffix(".py").removesuffix(".pyz")
