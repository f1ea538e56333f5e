"""The history that the programs under test write: append-only files, one per process."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Journal", "Record", "process_of", "read"]


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the history.

    Attributes:
        at: seconds since the epoch.
        by: the process that wrote it.
        what: ``intent``, ``commit``, ``delivery`` and so on; see :mod:`proving.checker`.
        facts: everything else.
    """

    at: float
    by: str
    what: str
    facts: Mapping[str, Any]


_AGAIN = "+"


def process_of(by: str) -> str:
    """Return the kind and the id of the process that wrote ``by``'s records."""
    return by.partition(_AGAIN)[0]


class Journal:
    """The file of one process, to append to.

    A record is one ``write()``, so it is complete or missing, whenever the process is killed. It
    isn't synchronised to the disk, since only processes are killed here, not machines.
    Thread-safe and, as it has no lock, safe in signal handlers. After a fork the child must make a
    new journal.
    """

    def __init__(self, folder: Path, by: str) -> None:
        """Write to ``<by>.jsonl`` in ``folder``."""
        self.by = by
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._file = os.open(folder / f"{by}.jsonl", flags, 0o600)

    @classmethod
    def of_process(cls, folder: Path, kind: str, pid: int) -> Journal:
        """Return the journal of a process; in ten minutes of restarts, an id may be given again."""
        by = f"{kind}-{pid}"
        for number in itertools.count(2):
            try:
                (folder / f"{by}.jsonl").touch(0o600, exist_ok=False)
            except FileExistsError:
                by = f"{kind}-{pid}{_AGAIN}{number}"
            else:
                break
        return cls(folder, by)

    def write(self, what: str, **facts: Any) -> None:
        """Append a record."""
        line = json.dumps({"at": time.time(), "what": what, **facts}).encode() + b"\n"
        os.write(self._file, line)


def read(folder: Path) -> list[Record]:
    """Return all records, process by process, each process's in order."""
    return [
        record for file in sorted(folder.glob("*.jsonl")) for record in _of_file(file, file.stem)
    ]


def _of_file(file: Path, by: str) -> Iterator[Record]:
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            facts = json.loads(line)
            yield Record(facts.pop("at"), by, facts.pop("what"), facts)
