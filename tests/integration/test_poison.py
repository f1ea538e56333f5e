"""Many messages that can never be handled, among many that can."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from outbox import Publisher
from outbox.consumers import ReceivedEvent, RetryPolicy, consumer
from outbox.messages.delivery import dead_letter_queue
from tests.places import Place, RabbitMQPlace, events_for, made, reading, working
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

POISON, GOOD = 1_000, 10_000
EVERY = (POISON + GOOD) // POISON


@pytest.mark.hazard("G2")
@pytest.mark.timeout(60)
@pytest.mark.slow
def test_a_thousand_poison_messages_among_ten_thousand_are_dead_lettered_and_then_nothing_is_busy(
    place: Place, name: str
) -> None:
    done: Counter[int] = Counter()
    attempts: Counter[int] = Counter()

    def is_poison(number: int) -> bool:
        return number % EVERY == 0

    @consumer(made(place, name), retry=RetryPolicy(max_attempts=2, delay=0.5))
    def picky(event: ReceivedEvent) -> None:
        number = event.payload["n"]
        if is_poison(number):
            attempts[number] += 1
            raise ValueError(f"poison {number}")
        done[number] += 1

    total = POISON + GOOD
    with place.publisher(timeout=60) as publisher:
        send_all(publisher, name, total)
        with working(publisher, picky, threads=4):
            wait_until(lambda: place.count(dead_letter_queue(name)) == POISON, 40)
            wait_until(lambda: sum(done.values()) >= GOOD, 20)
            busy = seconds_of_work(0.5)
    assert sum(done.values()) == len(done) == GOOD
    assert set(attempts.values()) == {2}
    with reading(place, dead_letter_queue(name), again=True) as reader:
        letters = reader.get(POISON)
    reasons = {(letter.headers or {})["outbox-dead-reason"] for letter in letters}
    assert reasons == {f"ValueError: poison {n}" for n in range(total) if is_poison(n)}
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0
    assert busy < (0.05 if isinstance(place, RabbitMQPlace) else 0.1)  # a file is looked into


def send_all(publisher: Publisher, queue: str, count: int) -> None:
    events = events_for(publisher, [queue] * count, exchange="")
    assert publisher.publish(events).ok


def seconds_of_work(seconds: float) -> float:
    """Return the processor time that all threads of this process use in ``seconds``."""
    time.sleep(0.2)  # until what follows from the last message is over
    begin = time.process_time()
    time.sleep(seconds)
    return time.process_time() - begin
