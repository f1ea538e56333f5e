"""The cost of calling a task later, beside ``enqueue_event``; and no-op tasks beside others'.

python -m benchmarks.tasks [--rounds N] [--messages N] [--without-broker]

Calls: chunks of 100, in turns, the best of seven rounds of each. Over RabbitMQ: 8 threads, acks
after the task; the contenders take turns, each in a new process that is timed from the first to the
last task, and the ratio is the median of those of the rounds. Celery is one, and Dramatiq if it is
installed.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import gc
import importlib.util
import os
import subprocess
import sys
import time

from benchmarks import called_tasks
from benchmarks.peers.consuming import PREFETCH, QUEUE, THREADS, Countdown
from benchmarks.tables import Bound, median, print_bounds, progress
from benchmarks.timing import side_by_side
from outbox import EventCollector, Publisher, configure, enqueue_event

MESSAGES = 20_000
TEXT = "leave it at the door, please"


def calls() -> list[Bound]:
    """Print what a call costs, and return the bounds."""
    configure("memory://")
    collector = EventCollector(max_events=1 << 30, max_bytes=1 << 40)
    day, price = datetime.date(2030, 1, 1), decimal.Decimal("12.50")
    box = called_tasks.Box(3, "red")

    def enqueue() -> None:
        for _ in range(100):
            enqueue_event({"args": [17, TEXT]}, "tasks", exchange="", priority=5)
        collector.clear_events()

    def plain() -> None:
        for _ in range(100):
            called_tasks.plain.later(17, TEXT)
        collector.clear_events()

    def named() -> None:
        for _ in range(100):
            called_tasks.plain.later(17, text=TEXT)
        collector.clear_events()

    def typed() -> None:
        for _ in range(100):
            called_tasks.typed.later(day, price, box)
        collector.clear_events()

    functions = {"enqueue": enqueue, "plain": plain, "named": named, "typed": typed}
    with EventCollector.use(collector):
        times = {name: each / 100 for name, each in side_by_side(functions, 100).items()}
    for name, each in times.items():
        print(f"  {name:>8}: {each:6.2f} us, {each / times['enqueue']:.2f}x")
    return [
        Bound(
            "later(17, text) / enqueue_event", times["plain"] / times["enqueue"], 1.5, at_most=True
        ),
        Bound(
            "later(date, Decimal, dataclass) / enqueue_event",
            times["typed"] / times["enqueue"],
            3.0,
            at_most=True,
        ),
    ]


def fill(url: str, messages: int) -> None:
    """Call no-op tasks."""
    from outbox import auto_publishing

    publisher = configure(url, tasks_queue=QUEUE)
    while messages:
        with auto_publishing():
            for _ in range(min(messages, 1000)):
                called_tasks.count.later("x" * 40)
        messages -= min(messages, 1000)
    publisher.close(30)


def consume(url: str, messages: int) -> float:
    """Run them; return the tasks a second."""
    from outbox.consumers import Worker
    from outbox.consumers.discovery import load

    publisher: Publisher = configure(url, tasks_queue=QUEUE)
    countdown = called_tasks.countdown = Countdown(messages, lambda: None)
    worker = Worker(
        load(["benchmarks.called_tasks"]), publisher=publisher, threads=THREADS, prefetch=PREFETCH
    )
    gc.collect()
    gc.freeze()  # as outbox-consume does
    worker.start()
    countdown.wait()
    time.sleep(0.2)
    worker.stop()
    return countdown.rate


def rate(name: str, broker: str, messages: int, **variables: str) -> float:
    """Return the tasks a second of a contender, in processes with these variables."""
    for step in ("fill", "consume"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tasks", step, name, broker, str(messages)],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
    return float(done.stdout.split()[-1])


def beside_others(rounds: int, messages: int) -> list[Bound]:
    """Print the tasks a second, and return the bounds."""
    from outbox.testing.broker import PrivateBroker

    rates: dict[str, list[float]] = {"outbox": [], "celery": []}
    if importlib.util.find_spec("dramatiq") is not None:
        rates["dramatiq"] = []
    with PrivateBroker() as broker:
        for number in range(rounds):
            for name in rates if number % 2 == 0 else reversed(list(rates)):
                rates[name].append(rate(name, broker.url, messages))
                progress(f"{name}: {rates[name][-1]:,.0f} tasks/s")
    for name, found in rates.items():
        print(f"  {name:>8}: {median(found):,.0f} tasks/s ({min(found):,.0f}-{max(found):,.0f})")
    wanted = {"celery": 4, "dramatiq": 5}
    return [
        Bound(
            f"no-op tasks / those of {name.capitalize()}, median of paired rounds",
            median(ours / theirs for ours, theirs in zip(rates["outbox"], found, strict=True)),
            wanted[name],
        )
        for name, found in rates.items()
        if name in wanted
    ]


def main() -> int:
    """Run the benchmark, or one step of it in a process for itself."""
    if sys.argv[1:2] in (["fill"], ["consume"]):
        step, name, url, messages = sys.argv[1:]
        contender = sys.modules[__name__]
        if name != "outbox":
            contender = importlib.import_module(f"benchmarks.peers.consuming.{name}_")
        result = getattr(contender, step)(url, int(messages))
        print(result)
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--without-broker", action="store_true")
    options = parser.parse_args()
    bounds = calls()
    if not options.without_broker:
        bounds += beside_others(options.rounds, options.messages)
    return 0 if print_bounds(bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
