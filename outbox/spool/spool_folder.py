"""The folder of a spool: the names of the files in it, and which disks it can be on."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import re
from pathlib import Path

from outbox.system.disk.private_folder import file_system, private_folder
from outbox.url import BrokerURL

__all__ = ["BAD", "digest_of", "files_in", "lock_path", "new_path", "open_spool_folder"]

logger = logging.getLogger("outbox.spool")

BAD = ".bad-"
"""What follows the name of a file that could not be read, before the time."""

_NAME = re.compile(
    r"([0-9a-f]{12})-\d{8}T\d{6}(?:\.\d{6})?-[0-9a-f]{8}\.spool(\.bad-\d{8}T\d{6}(?:-\d+)?)?"
)
_FLEETING = {
    "tmpfs": "in memory, and is lost when the machine restarts",
    "ramfs": "in memory, and is lost when the machine restarts",
    "overlay": "a layer of a container's image, and is lost with the container",
}
_PLACE = ("host", "hostaddr", "port", "unix_socket", "service", "dbname", "schema")
"""The options of a database's URL that say where it is."""

_warned: set[Path] = set()


def open_spool_folder(folder: str) -> Path:
    """Return the folder, after making and checking it.

    Raises:
        UsageError: it can't be used: it isn't this user's alone, or is on a network file system.
    """
    remedy = "choose another folder on a local disk: spool=, or OUTBOX_SPOOL"
    path = private_folder(Path(folder), remedy)
    why = _FLEETING.get(file_system(path.stat().st_dev))
    if why and path not in _warned:
        _warned.add(path)
        logger.warning("the spool %s is %s; use a folder on a disk or a volume", path, why)
    return path


def digest_of(url: BrokerURL, exchange: str) -> str:
    """Return what a publisher's files are named by: events of another broker must not reach it.

    Hosts, vhost (or file, database and schema) and exchange count; user, password and other options
    don't.
    """
    path = os.path.abspath(url.path) if url.scheme == "sqlite" else url.path
    place = [f"{name}={url.options[name]}" for name in _PLACE if name in url.options]
    hosts = ",".join(sorted(f"{host}:{port}" for host, port in url.hosts))
    scheme = "amqp" if url.scheme == "amqps" else url.scheme
    parts = (scheme, hosts, url.vhost, path, *place, exchange)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def new_path(folder: Path, digest: str) -> Path:
    """Return a name that no other file has had, and that sorts behind the earlier ones."""
    now = datetime.datetime.now(datetime.UTC)
    return folder / f"{digest}-{now:%Y%m%dT%H%M%S.%f}-{os.urandom(4).hex()}.spool"


def lock_path(path: Path) -> Path:
    """Return the lock file of the file at ``path``."""
    return path.with_name(f"{path.name}.lock")


def files_in(folder: Path, digest: str = "") -> list[tuple[str, Path]]:
    """Return digest and path of each spool file, oldest first, the unreadable ones included.

    Also those of which only the lock file is left, which end in ``.lock``.

    Args:
        folder: the folder; a missing one has no files.
        digest: only files with this one; "" for all.
    """
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
    present = set(names)
    files = []
    for name in names:
        matched = _NAME.fullmatch(name.removesuffix(".lock"))
        is_needless = name.endswith(".lock") and name.removesuffix(".lock") in present
        if matched and not is_needless and digest in ("", matched[1]):
            files.append((matched[1], folder / name))
    return sorted(files, key=lambda file: file[1].name.partition("-")[2])
