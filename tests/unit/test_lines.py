"""The lines between a parent and its process: halves, floods, rubbish, and a pipe that is full."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from outbox.service import lines
from outbox.service.lines import LineReader, LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[LineReader, int]]:
    reading, writing = os.pipe()
    reader = LineReader(reading)
    yield reader, writing
    reader.close()
    os.close(writing)


def test_a_line_arrives_when_it_is_whole(pipe: tuple[LineReader, int]) -> None:
    reader, writing = pipe
    os.write(writing, b'{"word": "rea')
    assert reader.read() == []
    os.write(writing, b'dy"}\n{"word": "leaving"}\n{"in_')
    assert reader.read() == [{"word": "ready"}, {"word": "leaving"}]
    os.write(writing, b'flight": 2}\n')
    assert reader.read() == [{"in_flight": 2}]


def test_anything_but_an_object_is_dropped(pipe: tuple[LineReader, int]) -> None:
    reader, writing = pipe
    os.write(writing, b'rubbish\n\n\xff\xfe\n[1]\n{"word": "ready"}\n')
    assert reader.read() == [{"word": "ready"}]


def test_a_line_of_70_kib_arrives_and_a_longer_one_than_allowed_is_skipped(
    pipe: tuple[LineReader, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writing = pipe
    monkeypatch.setattr(lines, "LONGEST_LINE", 100_000)
    received = []
    for length in (70_000, 300_000, 10):
        line = b'{"text": "' + b"x" * length + b'"}\n'
        while line:
            line = line[os.write(writing, line[:50_000]) :]
            received += reader.read()
    assert [len(line["text"]) for line in received] == [70_000, 10]


def test_the_end_of_the_pipe_closes_the_reader() -> None:
    reading, writing = os.pipe()
    reader = LineReader(reading)
    os.write(writing, b'{"word": "ready"}\n')
    os.close(writing)
    assert reader.read() == [{"word": "ready"}]
    assert reader.descriptor is None
    assert reader.read() == []


def test_a_full_pipe_loses_old_reports_and_no_word(pipe: tuple[LineReader, int]) -> None:
    reader, writing = pipe
    writer = LineWriter(writing)
    text = "x" * 30_000
    sent = [number for number in range(20) if writer.report({"number": number, "text": text})]
    assert 2 <= len(sent) < 20
    writer.say({"word": "leaving"})
    writer.say({"word": "stopping"})
    assert not writer.report({"number": 99})
    received = reader.read()
    assert writer.report({"number": 100})
    received += reader.read()
    assert [line["number"] for line in received if "number" in line] == [*sent, 100]
    assert [line["word"] for line in received if "word" in line] == ["leaving", "stopping"]


def test_a_dead_parent_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)
    writer.say({"word": "ready"})
    assert writer.report({"in_flight": 1})
    os.close(writing)
