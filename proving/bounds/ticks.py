"""A recurring task is called once for each time, while its workers are killed and frozen.

python -m proving.bounds.ticks [--seconds 600] [--seed 1] [--url URL]

Three workers; at random moments, half of them around a tick, one is killed (SIGKILL) and started
again, and now and then one is frozen (SIGSTOP) for 14 s. A witness that shares no code with outbox
takes the calls. Each time has one call, under one id; none comes early, none more than 1 s late,
or 15 s around a freeze. Besides: a daily task survives 30 kills of its only worker, and an idle
worker with 50 recurring tasks takes at most 1 % of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pika

from outbox.settings import Settings
from outbox.testing.broker import PrivateBroker
from outbox.transports.registry import open_tick_records
from proving.programs.ticking import QUEUE, TASK

__all__: list[str] = []

_LATE, _LATE_FROZEN = 1.0, 15.0  # seconds
_FROZEN = 14.0
_RESTARTS = 30
_IDLE = 20.0
_SHARE = 0.01
_TICK_QUEUE = f"{QUEUE}.every.{TASK}"
_ARGUMENTS = {"x-queue-type": "quorum", "x-single-active-consumer": True}


class Witness:
    """Takes the calls, with the time at which each arrived."""

    def __init__(self, url: str) -> None:
        self.calls: list[tuple[float, float, str]] = []
        """When each arrived, the time for which it is, and its id."""
        self._parameters = pika.URLParameters(url)
        self._parameters.heartbeat = 600
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Stop."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        connection = pika.BlockingConnection(self._parameters)
        channel = connection.channel()
        while not self._stopping.is_set():
            try:
                channel.queue_declare(QUEUE, passive=True)
                break
            except pika.exceptions.ChannelClosedByBroker:
                channel = connection.channel()
                time.sleep(0.05)
        for _method, properties, _body in channel.consume(
            QUEUE, auto_ack=True, inactivity_timeout=0.1
        ):
            if properties is not None:
                planned = properties.headers["outbox-scheduled-for-us"] / 1e6
                self.calls.append((time.time(), planned, properties.message_id))
            if self._stopping.is_set():
                break
        connection.close()


class Freeze:
    """When a worker stood still."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def allowed(self, planned: float) -> float:
        """Return how late a call for this time may be."""
        around = any(begin - 1 <= planned <= end + 2 for begin, end in self.spans)
        return _LATE_FROZEN if around else _LATE


def start(url: str, every: float, noted: Path) -> subprocess.Popen[bytes]:
    """Start a worker; whichever calls the task notes its pid."""
    return subprocess.Popen(
        [sys.executable, "-m", "proving.programs.ticking", str(every), str(noted)],
        env={**os.environ, "OUTBOX_URL": url},
    )


def wait_for(worker: subprocess.Popen[bytes], noted: Path) -> None:
    """Wait until a worker takes part."""
    while not noted.with_name(f"{noted.name}-{worker.pid}").exists():
        if worker.poll() is not None:
            raise RuntimeError("a worker has ended by itself")
        time.sleep(0.01)


def ticks(url: str, seconds: float, rng: random.Random, noted: Path) -> bool:
    """Show that each time is called once."""
    witness = Witness(url)
    workers = [start(url, 1, noted) for _ in range(3)]
    freeze = Freeze()
    faults: Counter[str] = Counter()
    for worker in workers:
        wait_for(worker, noted)
    time.sleep(2)
    end = time.monotonic() + seconds
    freeze_at = time.monotonic() + min(20.0, seconds / 3)
    while time.monotonic() < end:
        time.sleep(rng.uniform(0.3, 2.5))
        if rng.random() < 0.5:  # aim at a tick
            time.sleep(max(0.0, 1 - time.time() % 1 + rng.uniform(-0.01, 0.03)))
        is_freeze = time.monotonic() >= freeze_at
        number = rng.randrange(3)
        if is_freeze or rng.random() < 0.7:  # mostly the one that has the schedule
            caller = noted.read_text()
            number = next((n for n, each in enumerate(workers) if str(each.pid) == caller), number)
        if is_freeze:
            begin = time.time()
            workers[number].send_signal(signal.SIGSTOP)
            time.sleep(_FROZEN)
            workers[number].send_signal(signal.SIGCONT)
            freeze.spans.append((begin, time.time()))
            freeze_at = time.monotonic() + rng.uniform(20, 40)
            faults["frozen"] += 1
            time.sleep(3)
        else:
            workers[number].kill()
            workers[number].wait()
            time.sleep(rng.uniform(0, 0.5))
            workers[number] = start(url, 1, noted)
            faults["killed"] += 1
            wait_for(workers[number], noted)  # so one of the others always takes part
    time.sleep(3)
    for worker in workers:
        worker.kill()
        worker.wait()
    time.sleep(1)
    witness.stop()
    return judged(witness.calls, freeze, faults)


def judged(calls: Sequence[tuple[float, float, str]], freeze: Freeze, faults: Counter[str]) -> bool:
    """Print what became of the times, and return whether all is as it should be."""
    ids: dict[float, set[str]] = {}
    events = Counter(planned for _, planned, _ in calls)
    for _, planned, event_id in calls:
        ids.setdefault(planned, set()).add(event_id)
    first, last = int(min(events)), int(max(events))
    missing = [each for each in range(first, last + 1) if each not in events]
    twice = [planned for planned, count in events.items() if count > 1]
    several = [planned for planned, each in ids.items() if len(each) > 1]
    early = [planned for at, planned, _ in calls if at < planned]
    late = [
        (planned, at - planned)
        for at, planned, _ in calls
        if at - planned > freeze.allowed(planned)
    ]
    usual = [at - planned for at, planned, _ in calls if freeze.allowed(planned) == _LATE]
    frozen = [at - planned for at, planned, _ in calls if freeze.allowed(planned) != _LATE]
    print(
        f"{last - first + 1} times, {faults['killed']} kills, {faults['frozen']} freezes: "
        f"{len(missing)} missing, {len(twice)} called twice, {len(several)} under several ids, "
        f"{len(early)} early, {len(late)} late; at most {max(usual, default=0):.3f} s late, "
        f"{max(frozen, default=0):.1f} s around a freeze"
    )
    for what, each in (("missing", missing), ("twice", twice), ("late", late)):
        if each:
            print(f"    {what}: {each[:5]}")
    return not (missing or twice or several or early or late)


def daily(url: str, noted: Path) -> bool:
    """Show that a daily task survives the kills of its only worker, one after the other."""
    parameters = pika.URLParameters(url)
    with contextlib.closing(pika.BlockingConnection(parameters)) as connection:
        channel = connection.channel()
        for queue in (QUEUE, _TICK_QUEUE):
            channel.queue_delete(queue)
        kill_after_start(start(url, 86_400, noted), channel)  # it has made the queues
        channel.queue_purge(_TICK_QUEUE)
        now = time.time()
        times = [
            datetime.datetime.fromtimestamp((now // 86_400 + day) * 86_400, datetime.UTC)
            for day in (0, 1)
        ]
        marked = times[0] - datetime.timedelta(days=1000)  # a last time that no worker would write
        planned = {
            "schedule": "every 86400 s",
            "next": times[1].isoformat(),
            "last": marked.isoformat(),
        }
        channel.basic_publish("", _TICK_QUEUE, json.dumps(planned).encode())
        for _ in range(_RESTARTS):
            kill_after_start(start(url, 86_400, noted), channel)
    with open_tick_records(Settings.load(url, {})) as records:
        [record] = [each for each in records.all(QUEUE) if each.name == TASK]
    survived = (record.next_at, record.last_at) == (times[1], marked)
    print(f"a daily task has {'survived' if survived else 'NOT survived'} {_RESTARTS} kills")
    return survived


def kill_after_start(
    worker: subprocess.Popen[bytes], channel: pika.adapters.blocking_connection.BlockingChannel
) -> None:
    """Kill a worker once it has the schedule, and wait until the broker has noticed."""

    def consumers() -> int:
        declared = channel.queue_declare(_TICK_QUEUE, durable=True, arguments=_ARGUMENTS)
        return int(declared.method.consumer_count)

    while not consumers():
        time.sleep(0.05)
    time.sleep(0.5)
    worker.kill()
    worker.wait()
    while consumers():
        time.sleep(0.02)


def idle(url: str) -> bool:
    """Show what an idle worker with fifty recurring tasks costs."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "outbox.consumers", "proving.programs.fifty"],
        env={**os.environ, "OUTBOX_URL": url},
    )
    try:
        time.sleep(8)
        before = cpu_seconds(worker.pid)
        time.sleep(_IDLE)
        share = (cpu_seconds(worker.pid) - before) / _IDLE
        runs = worker.poll() is None
    finally:
        worker.terminate()
        worker.wait()
    print(f"an idle worker with 50 recurring tasks takes {share:.2%} of a core")
    return runs and share <= _SHARE


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process (Linux)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def broker(url: str | None) -> Iterator[str]:
    """Use a broker, by default a private one."""
    if url:
        yield url
        return
    with PrivateBroker() as private:
        yield private.url


def main() -> None:
    """Run all three, and exit with 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", default=os.environ.get("OUTBOX_URL"))
    parser.add_argument("--only", choices=["ticks", "daily", "idle"])
    options = parser.parse_args()
    kept = True
    with broker(options.url) as url, tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "caller"
        if options.only in (None, "ticks"):
            kept &= ticks(url, options.seconds, random.Random(options.seed), noted)
        if options.only in (None, "daily"):
            kept &= daily(url, noted)
        if options.only in (None, "idle"):
            kept &= idle(url)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
