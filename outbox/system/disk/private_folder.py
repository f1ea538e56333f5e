"""A folder that only one user writes to, on a disk of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from outbox.errors import UsageError

__all__ = ["file_system", "private_folder"]

_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "fuse.sshfs"}
"""File systems whose locks may hold on one machine only, or not at all."""


def private_folder(path: Path, remedy: str, *, create: bool = True) -> Path:
    """Return the absolute path of the folder, after making and checking it.

    Args:
        path: the folder; it is made with mode 0700.
        remedy: what to do about a folder that can't be used, for the error.
        create: whether to make it; a missing one is not checked.

    Raises:
        UsageError: it is a link or not a folder, belongs to another user, others may write to it,
            it is on a network file system, or it can't be made.
    """
    path = Path(os.path.abspath(path))
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        # Not through a link: in a folder for all, such as /tmp, another user may have put it there.
        status = path.lstat()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise UsageError(f"cannot use the folder {path}: {error.strerror}") from None
    if fault := _fault(status):
        raise UsageError(f"the folder {path} {fault}; {remedy}")
    kind = file_system(status.st_dev)
    if kind in _REMOTE:
        raise UsageError(
            f"the folder {path} is on a network file system ({kind}), where a lock may hold on "
            f"one machine only; {remedy}"
        )
    return path


def _fault(status: os.stat_result) -> str | None:
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return "may be written to by other users"
    return None


def file_system(device: int, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system on a device; empty where that is unknown."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        text = Path(mounts).read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^\d+ \d+ {number} .* - (\S+) ", text, re.MULTILINE)
    return found[1] if found else ""
