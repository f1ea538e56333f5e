"""The thread that writes and reads a publisher's spool files."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from outbox.backlog.chunk import Chunk, Entry
from outbox.errors import UsageError
from outbox.event import Event
from outbox.spool.file_lock import FileLock
from outbox.spool.spool_file import (
    NewerFormat,
    Spooled,
    SpoolFile,
    Unreadable,
    Unwritable,
    size_of,
)
from outbox.spool.spool_folder import BAD, files_in
from outbox.system import process
from outbox.system.background_thread import BackgroundThread
from outbox.system.fork_pause import around_fork

__all__ = ["WINDOW", "WINDOW_BYTES", "Read", "Spool"]

logger = logging.getLogger("outbox.spool")

WINDOW = 1000
"""The events that are read at a time, and kept in memory while the broker is away."""

WINDOW_BYTES = 16 * 1024 * 1024

_LOOK = 10.0
"""Seconds between two looks for files of ended processes, and for an own one that is empty."""

_RETRY = 5.0
"""Seconds until a file that couldn't be written is tried again."""

_DAMAGED = 3
"""Files that are found damaged in a row until their disk is suspected."""

_ENDING = 5.0
"""Seconds to wait for the last write."""

_FORKING = 10.0
"""Seconds for which a fork waits for a write; after that the disk hangs."""

Done = Callable[[], object]


class Read:
    """What was read from the spool.

    Attributes:
        entries: the entries to publish, as kept ones.
        own: how many of them are this publisher's own; the others were adopted.
    """

    __slots__ = ("entries", "own")

    def __init__(self, entries: Sequence[Entry], own: int) -> None:
        self.entries = entries
        self.own = own


class Spool:
    """A publisher's spool files, and the thread ``outbox-spool`` that uses them.

    Everything that waits is written in one transaction. Any thread may call the methods, also in a
    signal handler: they put requests into queues by single instructions.

    Attributes:
        folder: the folder of the files.
        stored: the number of events on the disk, and their bytes.
        own_size: the bytes of those that aren't adopted.
        unwritten: the number of events that are kept in memory alone, as nothing can be written.
    """

    def __init__(self, folder: Path, digest: str, encode: Callable[[Event], bytes]) -> None:
        """Create it; no file is opened yet, and no thread started.

        Args:
            folder: the folder, which exists.
            digest: what the files are named by.
            encode: returns the frames of an event.
        """
        self.folder = folder
        self._digest = digest
        self._encode = encode
        self.stored = (0, 0)
        self.own_size = 0
        self.unwritten = 0
        self._writes: deque[tuple[Sequence[Entry], bool, Done]] = deque()
        self._settled: deque[Sequence[Entry]] = deque()
        self._requests: deque[Done] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = BackgroundThread(lambda: None, self._run, name="outbox-spool")
        self._turn = threading.Lock()
        self._ending = self._ended = False
        # From here on: only for who has the turn.
        self._files: list[SpoolFile] = []  # oldest first; the last one is written to
        self._adopted: SpoolFile | None = None
        self._waiting: dict[Entry, bool] = {}  # to be written, in order; whether it goes aside
        self._gone: dict[SpoolFile, list[int]] = {}
        self._failed = ""
        self._logged: set[str] = set()
        self._retry_at = 0.0
        self._look_at = 0.0
        self._adopts = False
        self._to_read: Callable[[Read], object] | None = None  # what could not be read yet
        self._on_adopted: Callable[[int, int], object] = _ignore
        self._on_lost: Callable[[int, int], object] = _ignore
        _spools.add(self)

    # ------------------------------------------------------------------------------ any thread

    def watch(
        self, on_adopted: Callable[[int, int], object], on_lost: Callable[[int, int], object]
    ) -> None:
        """Set what is called on the spool's thread, before anything is asked of it.

        Args:
            on_adopted: called with the number of adopted events and their bytes.
            on_lost: called with the number of events that can't be read any more, and how many of
                them were own ones.
        """
        self._on_adopted, self._on_lost = on_adopted, on_lost

    def write(self, entries: Sequence[Entry], done: Done, *, aside: bool = False) -> None:
        """Write ``entries``, then call ``done``, also if they can't be written for now.

        Args:
            entries: kept entries, in order; those that are written already aren't written again.
            done: called on the spool's thread.
            aside: whether the publisher forgets them until they are read.
        """
        self._writes.append((entries, aside, done))
        self._wake()

    def settle(self, entries: Sequence[Entry]) -> None:
        """Delete ``entries``, which have a fate."""
        self._settled.append(entries)
        self._wake()

    def read(self, done: Callable[[Read], object]) -> None:
        """Read the next window of events that aren't in memory, own ones first."""
        self._ask(lambda: self._try_read(done))

    def look(self) -> None:
        """Adopt what an ended process has left, now and every 10 s."""
        self._adopts = True
        self._ask(self._look)

    def peek(self, most: int, timeout: float) -> list[Event]:
        """Return the next own events that aren't in memory, in order; [] after ``timeout`` s."""
        if not self._thread.started or self._ending:
            return []
        if threading.get_ident() == self._thread.ident:
            return self._peek(most)
        answers: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._ask(lambda: answers.put(self._peek(most)))
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=timeout)
        return []

    def take_over(self, files: Sequence[SpoolFile], done: Callable[[int, int], object]) -> None:
        """Go on with another spool's files, whose events leave before this one's.

        Args:
            files: the files, as ``hand_over`` returned them.
            done: called with the number of the own ones' events that aren't in memory, and their
                bytes.
        """
        self._ask(lambda: self._take_over(files, done))

    def hand_over(self) -> list[SpoolFile]:
        """End the thread and return all files, open, for another spool to take over."""
        if not self._end():
            return []
        files = self._all
        self._files, self._adopted = [], None
        return files

    def stop(self) -> int:
        """Write what waits, end the thread and leave the files; return how many events they hold.

        An empty file is deleted.
        """
        if not self._end():
            return self.stored[0]
        left = 0
        for file in self._all:
            left += file.events
            if file.events:
                file.close()
            else:
                file.remove()
        self._files, self._adopted = [], None
        return left

    def _ask(self, request: Done) -> None:
        self._requests.append(request)
        self._wake()

    def _wake(self) -> None:
        self._bell.put(None)
        if self._ended:
            self._let_go()
        if self._ending or self._thread.started:
            return
        try:
            self._thread.start()
        except (UsageError, RuntimeError):  # Python starts none any more: it exits
            with self._turn:
                self._work()

    def _let_go(self) -> None:
        """Call those who wait for a write: there is none any more."""
        with contextlib.suppress(IndexError):
            while True:
                _call(self._writes.popleft()[2])

    def _end(self) -> bool:
        """End the thread after a last write; return False if that hangs."""
        self._ending = True
        hangs = False
        if not self._thread.cancel():
            self._bell.put(None)
            hangs = not self._thread.join(_ENDING)
        if hangs:
            logger.error("the disk of the spool %s hangs", self.folder)
        else:
            with self._turn:
                self._retry_at = 0.0
                self._work()
        self._ended = True
        self._let_go()
        return not hangs

    @property
    def _all(self) -> list[SpoolFile]:
        return [*self._files, *([self._adopted] if self._adopted is not None else [])]

    # ------------------------------------------------------------------------ the spool's thread

    def _run(self) -> None:
        while not self._ending:
            self._thread.wait_for(self._bell, self._pause())
            with self._turn:
                self._work()

    def _pause(self) -> float | None:
        times = [at for at in (self._look_at, self._retry_at) if at]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _work(self) -> None:
        """Do what waits. Afterwards nothing waits but what can't be written."""
        try:
            done = self._take_writes()
            self._save()
            self._count()  # before anything is reported
            for each in done:
                _call(each)
            while self._requests:
                _call(self._requests.popleft())
            if self._to_read is not None and time.monotonic() >= self._retry_at:
                done_reading, self._to_read = self._to_read, None
                self._try_read(done_reading)
            was_adopted = self._adopted is not None and not self._adopted.events
            if was_adopted or (self._look_at and time.monotonic() >= self._look_at):
                self._look()
        except Exception:  # a bug in outbox must not end the thread
            logger.exception("unexpected error with the spool %s", self.folder)
        self._count()

    def _take_writes(self) -> list[Done]:
        done = []
        while self._writes:
            entries, aside, callback = self._writes.popleft()
            for entry in entries:
                row = entry.row
                if row is None:
                    self._waiting[entry] = aside or self._waiting.get(entry, False)
                elif aside:
                    row[0].forget(row[1])
            done.append(callback)
        while self._settled:
            for entry in self._settled.popleft():
                self._waiting.pop(entry, None)
                if entry.row is not None:
                    file, seq = entry.row
                    self._gone.setdefault(file, []).append(seq)
        return done

    def _save(self) -> None:
        """Write what waits, unless the last failure is too recent."""
        if not self._waiting and not self._gone:
            return
        if self._failed and time.monotonic() < self._retry_at:
            return
        try:
            for _ in range(_DAMAGED):
                error = self._write()
                if error is None:
                    break
            else:
                raise Unwritable(str(error))
        except Unwritable as error:
            self._note_failure(str(error))
            return
        self._note_success()
        self._look_at = self._look_at or time.monotonic() + _LOOK

    def _write(self) -> Unreadable | None:
        """Write what waits; return an error if a file is damaged, whose events may wait now, too.

        Raises:
            Unwritable: what still waits can't be written for now.
        """
        for file in [file for file in self._files if not file.events and not file.stands]:
            self._files.remove(file)
            file.close()
        new = {entry: aside for entry, aside in self._waiting.items() if entry.fate is None}
        if new and not self._files:
            self._files.append(SpoolFile.create(self.folder, self._digest))
        target = self._files[-1] if new else None
        for file in {**self._gone, **({target: []} if target else {})}:
            added = list(new) if file is target else []
            sizes = [size_of(entry) for entry in added]
            events = [(entry.event, size) for entry, size in zip(added, sizes, strict=True)]
            try:
                self._check_place(file)
                seqs = file.change(events, self._gone.get(file, ()))
            except Unreadable as error:
                self._put_aside(file, error)
                return error
            self._gone.pop(file, None)
            for entry, seq in zip(added, seqs, strict=True):
                entry.row = (file, seq)
                if not new[entry]:
                    file.in_memory[seq] = entry
        self._waiting.clear()
        return None

    def _check_place(self, file: SpoolFile) -> None:
        """Move a file that was deleted under the process into a new one."""
        if file.events and not file.stands:
            path = file.path
            file.move(self.folder, self._digest)
            logger.error(
                "the spool file %s was deleted or replaced while in use; its %d event(s) are now "
                "in %s",
                path,
                file.events,
                file.path,
            )

    def _note_success(self) -> None:
        if self._failed:
            self._failed, self._retry_at = "", 0.0
            logger.warning("the spool %s can be used again", self.folder)

    def _note_failure(self, why: str) -> None:
        self._retry_at = time.monotonic() + _RETRY
        if self._failed != why:
            self._failed = why
            logger.error(
                "cannot use the spool: %s; %d event(s) are kept in memory alone, and it is tried "
                "again every %d s",
                why,
                len(self._waiting),
                _RETRY,
            )

    def _put_aside(self, file: SpoolFile, error: Unreadable) -> None:
        """Give up a file that is damaged; what is still in memory is written again."""
        was_own = file in self._files
        for entry in file.in_memory.values():
            entry.row = None
        again = {entry: False for entry in file.in_memory.values() if entry.fate is None}
        self._waiting = again | self._waiting
        lost = file.unread
        self._gone.pop(file, None)
        if was_own:
            self._files.remove(file)
        elif file is self._adopted:
            self._adopted = None
        if file.path.exists():
            bad = file.put_aside()
            logger.error(
                "the spool file %s; it is now %s, and %d event(s) in it are not published: "
                "`outbox spool salvage %s` recovers what can be read",
                error,
                bad,
                lost,
                bad,
            )
        else:
            file.close()
            logger.error(
                "the spool file %s was deleted; %d event(s) in it are lost", file.path, lost
            )
        self._bell.put(None)
        if lost:
            self._on_lost(lost, lost if was_own else 0)

    def _try_read(self, done: Callable[[Read], object]) -> None:
        try:
            read = self._read()
        except Unwritable as error:
            self._to_read = done
            self._note_failure(str(error))
        else:
            done(read)

    def _read(self) -> Read:
        """Return the next window; raise Unwritable if it can't be read now."""
        for file in self._all:
            if not file.unread:
                continue
            try:
                rows = file.read(WINDOW, WINDOW_BYTES)
            except Unreadable as error:
                self._put_aside(file, error)
                continue
            self._note_success()
            entries = self._entries(file, rows)
            if entries:
                return Read(entries, 0 if file is self._adopted else len(entries))
        # What could not be written yet is next, once nothing older is on the disk.
        held = [entry for entry, aside in self._waiting.items() if aside][:WINDOW]
        for entry in held:
            self._waiting[entry] = False
        return Read(held, len(held))

    def _entries(self, file: SpoolFile, rows: Sequence[Spooled]) -> list[Entry]:
        """Return entries of events that were read, each encoded, and kept."""
        events = [row.event for row in rows]
        chunk = Chunk(events, frames=[self._encode(event) for event in events])
        chunk.claim_report()
        entries, chunk.entries = chunk.entries, []  # else one of them would hold all others
        for entry, row in zip(entries, rows, strict=True):
            entry.kept, entry.held = True, False
            entry.row = (file, row.seq)
            entry.size = size_of(entry)
            file.in_memory[row.seq] = entry
        return entries

    def _peek(self, most: int) -> list[Event]:
        events: list[Event] = []
        for file in self._files:
            with contextlib.suppress(Unreadable, Unwritable):
                left = most - len(events)
                events += [row.event for row in file.read(left, 1 << 60, look=True)]
        events += [entry.event for entry, aside in self._waiting.items() if aside]
        return events[:most]

    def _take_over(self, files: Sequence[SpoolFile], done: Callable[[int, int], object]) -> None:
        own = [file for file in files if file.is_own]
        self._files = [*own, *self._files]
        done(sum(file.unread for file in own), sum(map(_unread_size, own)))
        for file in files:
            if file.is_own:
                continue
            if self._adopted is not None:
                file.abandon()
                continue
            self._adopted = file
            self._on_adopted(file.unread, _unread_size(file))

    def _look(self) -> None:
        """Adopt a file of an ended process, and delete an own one that is empty."""
        self._look_at = time.monotonic() + _LOOK
        for file in [file for file in self._files if not file.events]:
            if not self._waiting:
                self._files.remove(file)
                file.remove()
        for file in list(self._files):
            try:
                self._check_place(file)
            except Unreadable as error:
                self._put_aside(file, error)
            except Unwritable as error:
                self._note_failure(str(error))
        if self._adopted is not None and self._adopted.events:
            return
        if self._adopted is not None:
            self._adopted.remove()
            self._adopted = None
        if not self._adopts:
            return
        try:
            files = files_in(self.folder, self._digest)
        except OSError as error:
            self._log_once(logging.ERROR, f"cannot look into the spool {self.folder}: {error}")
            return
        for _, path in files:
            if self._adopted is None and BAD not in path.name:
                self._adopt(path)

    def _adopt(self, path: Path) -> None:
        try:
            if path.name.endswith(".lock"):  # the rest of a file that was being made, or removed
                lock = FileLock.take(path)
                if lock is not None:
                    lock.release(remove=True)
                return
            file = SpoolFile.adopt(path)
        except NewerFormat as error:
            self._log_once(logging.WARNING, f"{error}: left to a newer version of outbox")
            return
        except Unreadable as error:
            logger.error(
                "the spool file %s: `outbox spool salvage` recovers what can be read", error
            )
            return
        except (Unwritable, OSError) as error:
            self._log_once(logging.WARNING, f"cannot adopt the spool file {path}: {error}")
            return
        if file is None:
            return
        if not file.events:
            file.remove()
            return
        self._adopted = file
        logger.warning("publishing %d event(s) that an ended process left: %s", file.events, path)
        self._on_adopted(file.events, file.size)

    def _log_once(self, level: int, text: str) -> None:
        """Log what each look finds again."""
        if text not in self._logged:
            self._logged.add(text)
            logger.log(level, "%s", text)

    def _count(self) -> None:
        adopted = self._adopted
        events = sum(file.events for file in self._files)
        self.own_size = sum(file.size for file in self._files)
        self.stored = (
            events + (adopted.events if adopted else 0),
            self.own_size + (adopted.size if adopted else 0),
        )
        self.unwritten = len(self._waiting)

    # --------------------------------------------------------------------------------- a fork

    def before_fork(self) -> bool:
        """Close all connections; return whether the turn was taken, which ends the fork."""
        if not self._turn.acquire(timeout=_FORKING):
            return False
        for file in self._all:
            file.disconnect()
        return True

    def after_fork(self) -> None:
        """Let the thread go on."""
        self._turn.release()


def _unread_size(file: SpoolFile) -> int:
    return max(0, file.size - sum(map(size_of, file.in_memory.values())))


def _ignore(_events: int, _of_them: int) -> None: ...


def _call(done: Done) -> None:
    try:
        done()
    except Exception:
        logger.exception("unexpected error with a spool")


_spools: weakref.WeakSet[Spool] = weakref.WeakSet()
_held: list[Spool] = []


def _before_fork() -> None:
    # SQLite keeps a record of the locks that it has, which a child would inherit without them.
    _held.extend(spool for spool in list(_spools) if spool.before_fork())


def _after_fork() -> None:
    while _held:
        _held.pop().after_fork()


def _forget_all() -> None:
    """Leave the parent's spools alone, in a forked child."""
    _held.clear()
    _spools.clear()


process.after_fork(_forget_all)
around_fork(_before_fork, _after_fork)
