"""A chunk passes its report to every callback, once."""

from __future__ import annotations

import threading
from functools import partial

from outbox import PublishReport
from outbox.backlog.chunk import Chunk

REPORT = PublishReport()


def test_a_callback_added_before_or_after_the_report_is_called_once() -> None:
    chunk = Chunk([])
    reports: list[PublishReport] = []
    chunk.on_reported(reports.append)
    assert reports == []
    chunk.resolve(REPORT)
    chunk.on_reported(reports.append)
    assert reports == [REPORT, REPORT]


def test_the_future_gets_the_report_whenever_it_is_requested() -> None:
    chunk = Chunk([])
    early = chunk.future
    assert chunk.future is early
    assert not early.done()
    chunk.resolve(REPORT)
    assert early.result(0) is REPORT
    late = Chunk([])
    late.resolve(REPORT)
    assert late.future.result(0) is REPORT


def test_a_cancelled_future_does_not_stop_other_callbacks() -> None:
    chunk = Chunk([])
    reports: list[PublishReport] = []
    assert chunk.future.cancel()
    chunk.on_reported(reports.append)
    chunk.resolve(REPORT)
    assert reports == [REPORT]
    assert chunk.future.cancelled()


def ask(chunk: Chunk, calls: list[int], begin: threading.Barrier) -> None:
    begin.wait(10)
    for number in range(20):
        chunk.on_reported(partial(note, calls, number))


def note(calls: list[int], number: int, _: PublishReport) -> None:
    calls.append(number)


def test_a_callback_added_while_another_thread_reports_is_called_once() -> None:
    for _ in range(300):
        chunk = Chunk([])
        calls: list[int] = []
        begin = threading.Barrier(2)

        def ask(
            chunk: Chunk = chunk, calls: list[int] = calls, begin: threading.Barrier = begin
        ) -> None:
            begin.wait(10)
            for number in range(20):
                chunk.on_reported(lambda _, number=number: calls.append(number))  # type: ignore[misc]

        asking = threading.Thread(target=ask)
        asking.start()
        begin.wait(10)
        chunk.resolve(REPORT)
        asking.join(10)
        assert sorted(calls) == list(range(20))
