"""A chunk tells its report to whoever wants it, once."""

from __future__ import annotations

import threading
from functools import partial

from outbox import PublishReport
from outbox.backlog.chunk import Chunk

REPORT = PublishReport()


def test_whoever_asks_before_the_report_or_after_it_is_told_once() -> None:
    chunk = Chunk([])
    told: list[PublishReport] = []
    chunk.on_reported(told.append)
    assert told == []
    chunk.resolve(REPORT)
    chunk.on_reported(told.append)
    assert told == [REPORT, REPORT]


def test_its_future_has_the_report_whenever_it_is_asked_for() -> None:
    chunk = Chunk([])
    early = chunk.future
    assert chunk.future is early
    assert not early.done()
    chunk.resolve(REPORT)
    assert early.result(0) is REPORT
    late = Chunk([])
    late.resolve(REPORT)
    assert late.future.result(0) is REPORT


def test_a_future_that_was_cancelled_stops_nobody() -> None:
    chunk = Chunk([])
    told: list[PublishReport] = []
    assert chunk.future.cancel()
    chunk.on_reported(told.append)
    chunk.resolve(REPORT)
    assert told == [REPORT]
    assert chunk.future.cancelled()


def ask(chunk: Chunk, told: list[int], begin: threading.Barrier) -> None:
    begin.wait(10)
    for number in range(20):
        chunk.on_reported(partial(tell, told, number))


def tell(told: list[int], number: int, _: PublishReport) -> None:
    told.append(number)


def test_whoever_asks_while_another_thread_reports_is_told_once() -> None:
    for _ in range(300):
        chunk = Chunk([])
        told: list[int] = []
        begin = threading.Barrier(2)

        def ask(
            chunk: Chunk = chunk, told: list[int] = told, begin: threading.Barrier = begin
        ) -> None:
            begin.wait(10)
            for number in range(20):
                chunk.on_reported(lambda _, number=number: told.append(number))  # type: ignore[misc]

        asking = threading.Thread(target=ask)
        asking.start()
        begin.wait(10)
        chunk.resolve(REPORT)
        asking.join(10)
        assert sorted(told) == list(range(20))
