"""Take-overs of an id under load: nothing is lost, done twice or interrupted.

    python -m proving.bounds.take_over [--rounds N] [--kills] [--workers] [-p N] [--seed N]
                                       [--broker rabbitmq|sqlite] [--long SECONDS]

In each round a new ``outbox-consume --id`` takes over from the one before. With ``--kills`` a
process is killed in three of four rounds: the one that has the id, or its successor, at a random
moment, or two successors start at once. Meanwhile messages that take 20 and 400 ms arrive, and at
the beginning one that takes longer than the shutdown timeout, of one second, by far.

There the parent of the workers is killed. With ``--workers`` a worker is, in some rounds: what it
has begun may be done twice, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outbox import Event, Publisher, exit_codes
from outbox.ids import new_id
from outbox.service.identity.listing import listed
from outbox.testing.broker import PrivateBroker

__all__ = ["Outcome", "run"]

_ROOT = Path(__file__).parents[2]
_QUEUE = "take-over"
_EVERY = 0.05
"""Seconds between two messages."""
_KINDS = ("plain", "predecessor", "successor", "two")
_PATIENCE = 60.0
_PAUSE = 1.0
"""Seconds, at most, without a message that ends, if no process is killed."""

_MODULE = """
import os, time
from outbox.consumers import consumer

journal = os.open("journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(word, event):
    line = f"{word} {event.id} {os.getpid()} {time.monotonic()}\\n"
    os.write(journal, line.encode())


@consumer("take-over")
def work(event):
    note("begin", event)
    time.sleep(event.payload["seconds"])
    note("end", event)
"""


@dataclass
class Outcome:
    """What became of the messages.

    Attributes:
        rounds: the number of rounds of each kind.
        sent: the number of messages.
        lost: those that were sent and have not ended.
        twice: those that have ended more than once, not counting a killed worker.
        interrupted: those that have begun more often than they have ended, likewise.
        killed: the workers that were killed.
        repeated: the messages that were begun by one of them and by another one as well.
        pause: the longest time in which none ended although one waited, in seconds; the long one
            doesn't count.
        take_over: the seconds of each take-over, from the start of the successor.
        failed: what else went wrong.
    """

    rounds: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    lost: int = 0
    twice: int = 0
    interrupted: int = 0
    killed: set[int] = field(default_factory=set)
    repeated: int = 0
    pause: float = 0.0
    take_over: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        is_plain = set(self.rounds) <= {"plain"}
        return not (
            self.lost
            or self.twice
            or self.interrupted
            or self.failed
            or (is_plain and self.pause > _PAUSE)
        )

    def __str__(self) -> str:
        times = sorted(self.take_over) or [0.0]
        rounds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rounds.items()))
        return (
            f"{rounds}: {self.sent} sent, {self.lost} lost, {self.twice} done twice, "
            f"{self.interrupted} interrupted, {len(self.killed)} workers killed and "
            f"{self.repeated} of their messages repeated, longest pause {self.pause:.2f} s, "
            f"take-over p50 {times[len(times) // 2]:.1f} s, max {times[-1]:.1f} s"
            + "".join(f"\n  {text}" for text in self.failed)
        )


class _Service:
    """The processes of one id, as many as take-overs have left."""

    def __init__(self, folder: Path, url: str, processes: int) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self._processes = processes
        self._variables = {
            **os.environ,
            "OUTBOX_URL": url,
            "PYTHONPATH": os.pathsep.join((str(_ROOT), str(folder))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        (folder / "take_over_work.py").write_text(_MODULE)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "outbox.consumers", "take_over_work"]
        command += ["--id", "1", "--pid-dir", str(self.pids), "--shutdown-timeout", "1"]
        command += ["-p", str(self._processes), "-t", "4", "--log-level", "WARNING"]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def owner(self) -> int | None:
        """Return the living process that has the id, and is ready."""
        with contextlib.suppress(OSError):
            for one in listed(self.pids, "1"):
                if one.is_owner and one.is_alive and one.status and one.status.ready:
                    return one.holder
        return None

    def workers(self) -> list[int]:
        """Return the worker processes of all that live, those that leave among them."""
        living = {process.pid for process in self._started if process.poll() is None}
        return [
            worker.pid
            for one in listed(self.pids, "1")
            if one.holder in living and one.status
            for worker in one.status.workers
            if worker.pid
        ]

    def wait_for(self, *processes: subprocess.Popen[bytes]) -> bool:
        """Wait until one of the processes has the id and is ready; return whether one has."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if self.owner() in [process.pid for process in processes]:
                return True
            if all(process.poll() is not None for process in processes):
                return False
            time.sleep(0.01)
        return False

    def stop(self, *, may_be_unfinished: bool) -> list[str]:
        """Stop all; return what went wrong."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        failed = []
        for process in self._started:
            try:
                code = process.wait(_PATIENCE)
                # SIGTERM ends one that has just begun, and has nothing to finish.
                if code not in (0, -signal.SIGKILL, -signal.SIGTERM) and not (
                    code == exit_codes.UNFINISHED and may_be_unfinished
                ):
                    failed.append(f"process {process.pid} ended with {code}")
            except subprocess.TimeoutExpired:
                failed.append(f"process {process.pid} did not end")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return failed

    def living(self) -> int:
        return sum(process.poll() is None for process in self._started)


class _Load:
    """Messages that arrive all the time, on a thread."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self.sent: dict[str, float] = {}
        self._publisher = Publisher(url, unroutable="fail")
        self._rng = rng
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def send(self, seconds: float) -> None:
        """Publish one message; until the queue exists, nothing is published."""
        body = b'{"seconds": %g}' % seconds
        event = Event(id=new_id(), target=_QUEUE, exchange="", body=body, unroutable="fail")
        end = time.monotonic() + _PATIENCE
        while not self._publisher.publish([event], keep=False).ok:
            if time.monotonic() > end:
                raise TimeoutError("cannot publish")
            time.sleep(0.1)
        self.sent[event.id] = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY):
            self.send(0.4 if self._rng.random() < 0.2 else 0.02)

    def end(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._publisher.close()


def run(
    url: str,
    folder: Path,
    *,
    rounds: int,
    kills: bool = False,
    workers: bool = False,
    processes: int = 1,
    long: float = 3.0,
    seed: int = 1,
) -> Outcome:
    """Run take-overs in ``folder``; return what became of the messages.

    Args:
        url: the broker.
        folder: an empty folder.
        rounds: the number of take-overs.
        kills: whether parents of workers are killed.
        workers: whether workers are killed.
        processes: the number of worker processes.
        long: the seconds that the long message takes.
        seed: the seed of all random choices.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    kinds = (*(_KINDS if kills else _KINDS[:1]), *(["worker"] if workers else []))
    service, load = _Service(folder, url, processes), _Load(url, random.Random(seed))
    try:
        first = service.start()
        if not service.wait_for(first):
            outcome.failed.append("the first process did not start")
            return outcome
        load.send(long)
        load.start()
        time.sleep(0.5)
        began = time.monotonic()
        for number in range(rounds):
            # The first is plain: it makes the process leave that has the long message.
            kind = kinds[number % len(kinds)]
            outcome.rounds[kind] += 1
            if fault := _take_over(service, kind, rng, outcome):
                outcome.failed.append(f"round {number + 1}, {kind}: {fault}")
            time.sleep(rng.uniform(0.1, 0.6))
        ended = time.monotonic()
        load.end()
        _wait_for_ends(folder, load.sent, _PATIENCE + long)
    finally:
        load.end()
        # A parent that leaves doesn't replace a worker that is killed meanwhile, and says so.
        outcome.failed += service.stop(may_be_unfinished=bool(outcome.killed))
    _judge(outcome, _read(folder), load.sent, began, ended)
    return outcome


def _take_over(service: _Service, kind: str, rng: random.Random, outcome: Outcome) -> str | None:
    """Run one round; return what went wrong."""
    owner = service.owner()
    begin = time.monotonic()
    successors = [service.start()]
    if kind == "two":
        time.sleep(rng.uniform(0.0, 0.3))
        successors.append(service.start())
    if kind == "worker":
        time.sleep(rng.uniform(0.0, 1.5))
        if pids := service.workers():
            worker = rng.choice(pids)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                outcome.killed.add(worker)
    if kind in ("predecessor", "successor"):
        time.sleep(rng.uniform(0.0, 1.5))
        victim = successors[0].pid if kind == "successor" else owner
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        if kind == "successor":
            successors[0].wait()
            # The first goes on, unless it has left already: then a third is started.
            time.sleep(0.5)
            if service.owner() is not None:
                return None
            successors = [service.start()]
    if not service.wait_for(*successors):
        return "no successor took over"
    outcome.take_over.append(time.monotonic() - begin)
    return None


def _read(folder: Path) -> list[tuple[str, str, int, float]]:
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "journal").read_text().splitlines():
            word, id, pid, moment = line.split()
            entries.append((word, id, int(pid), float(moment)))
    return entries


def _wait_for_ends(folder: Path, sent: Mapping[str, float], patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if {id for word, id, _, _ in _read(folder) if word == "end"} >= set(sent):
            return
        time.sleep(0.2)


def _judge(
    outcome: Outcome,
    entries: Sequence[tuple[str, str, int, float]],
    sent: Mapping[str, float],
    began: float,
    ended: float,
) -> None:
    outcome.sent = len(sent)
    outcome.lost = len(set(sent) - {id for word, id, _, _ in entries if word == "end"})
    by_others = [entry for entry in entries if entry[2] not in outcome.killed]
    begins = Counter(id for word, id, _, _ in by_others if word == "begin")
    ends = Counter(id for word, id, _, _ in by_others if word == "end")
    by_killed = {id for word, id, pid, _ in entries if word == "begin" and pid in outcome.killed}
    outcome.repeated = sum(id in begins for id in by_killed)
    outcome.twice = sum(count > 1 for count in ends.values())
    outcome.interrupted = sum(begins[id] > ends[id] for id in begins)
    long = next(iter(sent))
    ended_at = sorted((at, id) for word, id, _, at in entries if word == "end" and id != long)
    oldest = float("inf")  # when the message was sent that waits the longest, of those not ended
    pauses = []
    for (before, _), (after, id) in reversed([*itertools.pairwise(ended_at)]):
        oldest = min(oldest, sent[id])
        if began <= before <= ended:
            pauses.append(after - max(before, oldest))
    outcome.pause = max(pauses, default=0.0)


@contextlib.contextmanager
def _broker(name: str, folder: Path) -> Iterator[str]:
    if name == "sqlite":
        yield f"sqlite:///{folder / 'outbox.db'}"
    elif url := os.environ.get("OUTBOX_TEST_AMQP_URL"):
        yield url
    else:
        with PrivateBroker() as broker:
            yield broker.url


def main() -> int:
    """Run the take-overs that the command line asks for; return 0 if every promise was kept."""
    parser = argparse.ArgumentParser(
        prog="python -m proving.bounds.take_over", description="Take over under load."
    )
    parser.add_argument("--rounds", type=int, default=12, help="take-overs (default: 12)")
    parser.add_argument("--kills", action="store_true", help="kill processes meanwhile")
    parser.add_argument("--workers", action="store_true", help="kill workers meanwhile")
    parser.add_argument("--broker", choices=("rabbitmq", "sqlite"), default="sqlite")
    parser.add_argument("-p", "--processes", type=int, default=1)
    parser.add_argument("--long", type=float, default=3.0, help="seconds of the long message")
    parser.add_argument("--seed", type=int, default=1)
    options: Any = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outbox-take-over-") as name:
        folder = Path(name)
        with _broker(options.broker, folder) as url:
            outcome = run(
                url,
                folder,
                rounds=options.rounds,
                kills=options.kills,
                workers=options.workers,
                processes=options.processes,
                long=options.long,
                seed=options.seed,
            )
        print(f"{options.broker}, -p {options.processes}: {outcome}", flush=True)
        if not outcome.kept:
            print((folder / "log").read_text()[-3000:])
    return 0 if outcome.kept else 1


if __name__ == "__main__":
    sys.exit(main())
