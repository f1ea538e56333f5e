"""The folder in which the services of a user keep their pid files, states and logs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from outbox.system.disk.private_folder import private_folder

__all__ = ["default_folder", "open_folder"]

_VARIABLE = "OUTBOX_PID_DIR"


def default_folder() -> Path:
    """Return ``OUTBOX_PID_DIR``, else systemd's runtime directory, else one in the user's name.

    The last, ``<tmp>/outbox-<uid>``, is the same for all applications of the user, so that a
    command finds the services without being given a folder. ``XDG_RUNTIME_DIR`` is not used: it is
    removed with the user's last login.
    """
    named = os.environ.get(_VARIABLE) or os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(named) if named else Path(tempfile.gettempdir()) / f"outbox-{os.geteuid()}"


def open_folder(path: Path, *, create: bool = True) -> Path:
    """Return the absolute path of the folder, after making and checking it.

    Args:
        path: the folder; it is made with mode 0700.
        create: whether to make it; a missing one is not checked.

    Raises:
        UsageError: see :func:`private_folder`.
    """
    return private_folder(path, f"choose another: --pid-dir, or {_VARIABLE}", create=create)
