"""``configure()`` every second while eight threads publish: nothing is lost, and nothing raises.

python -m proving.bounds.rotation [seconds]
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time

from outbox import auto_publishing, configure, enqueue_event
from proving.bounds.arrivals import EXCHANGE, TARGET, arrivals

__all__: list[str] = []

_THREADS = 8
_PERIOD = 1.0  # seconds
_PAUSE = 0.002  # seconds between two blocks of a thread
_EACH = 2  # events in a block


def main() -> None:
    """Publish and configure, and print what became of the events."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    logging.getLogger("outbox").setLevel(logging.ERROR)
    owed: list[set[str]] = [set() for _ in range(_THREADS)]
    errors: list[BaseException] = []
    stopping = threading.Event()

    def publish(thread: int) -> None:
        for block in itertools.count():
            if stopping.wait(_PAUSE):
                return
            ids = [f"{thread}-{block}-{each}" for each in range(_EACH)]
            try:
                with auto_publishing():
                    for each in ids:
                        enqueue_event({}, TARGET, id=each)
            except Exception as error:
                errors.append(error)
            else:
                owed[thread].update(ids)

    with arrivals() as arrived:
        publisher = configure(arrived.url, exchange=EXCHANGE)
        threads = [threading.Thread(target=publish, args=(each,)) for each in range(_THREADS)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        calls, slowest = 0, 0.0
        while time.monotonic() < end:
            time.sleep(_PERIOD)
            began = time.monotonic()
            publisher = configure(arrived.url, exchange=EXCHANGE)
            slowest = max(slowest, time.monotonic() - began)
            calls += 1
        stopping.set()
        for thread in threads:
            thread.join()
        left = publisher.close(10)
        ids = arrived.ids()
    all_owed = set().union(*owed)
    lost = all_owed - ids.keys()
    twice = sum(times > 1 for times in ids.values())
    for error in errors[:3]:
        print(f"    {error!r}")
    print(
        f"configure() {calls} times, {slowest:.2f} s at most, under {_THREADS} threads that "
        f"published {len(all_owed):,} events: {len(lost) + len(left)} lost, {len(errors)} errors, "
        f"{twice} delivered twice"
    )
    sys.exit(1 if lost or left or errors else 0)


if __name__ == "__main__":
    main()
