"""Events that were kept in a spool: through kills, forks, full disks and damaged files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox import (
    Blocked,
    CollectorFull,
    Event,
    Publisher,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
)
from outbox.spool import spool as spool_module
from outbox.spool.file_lock import FileLock
from outbox.spool.spool import Read
from outbox.spool.spool_file import SpoolFile, Unwritable
from outbox.spool.spool_folder import digest_of, files_in, lock_path, new_path
from outbox.spool.spooling import Spooling
from outbox.url import BrokerURL
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.waiting import wait_until

NOWHERE = "amqp://guest:guest@127.0.0.1:1/"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def events(*names: str, body: bytes = b"{}", exchange: str = "shop") -> list[Event]:
    return [Event(id=name, target="order.placed", exchange=exchange, body=body) for name in names]


def numbered(count: int, first: int = 0, **options: str) -> list[Event]:
    return events(*(str(number) for number in range(first, first + count)), **options)  # type: ignore[arg-type]


def spool_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".spool")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    yield connection
    connection.close()


def arrived(inspector: Inspector, queue: str, count: int) -> list[str]:
    """The ids of the messages in a queue, as soon as there are ``count``, and of any further ones.

    Consumed, not fetched one by one: there are many.
    """
    ids = []
    for method, properties, _ in inspector.channel.consume(
        queue, auto_ack=True, inactivity_timeout=20
    ):
        if method is None or properties is None:
            break
        ids.append(str(properties.message_id))
        if len(ids) >= count:
            break
    inspector.channel.cancel()
    return ids + [message.id for message in inspector.all(queue)]


def on_disk(folder: Path) -> list[str]:
    """The ids in all files, in the order of each."""
    ids = []
    for path in spool_files(folder):
        # A file that is just being made has no table yet.
        with contextlib.suppress(sqlite3.OperationalError), reading(path) as connection:
            ids += [id for (id,) in connection.execute("SELECT id FROM event ORDER BY seq")]
    return ids


@pytest.mark.hazard("S6")
def test_what_was_published_while_the_broker_was_away_arrives_once_and_in_order(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    with Publisher(proxy.url, exchange=name, spool=folder) as publisher:
        assert publisher.publish(numbered(1, exchange=name)).ok
        assert list(folder.iterdir()) == []  # a healthy broker costs no file
        proxy.refuse()
        for first in range(1, 1301, 100):
            report = publisher.publish(numbered(100, first, exchange=name))
            assert len(report.kept) == 100
            assert on_disk(folder)[-1] == str(first + 99)  # written before it was reported
        assert publisher.stats().kept == 1300
        assert publisher.stats().kept_bytes > 1300
        assert [event.id for event in publisher.kept] == [str(n) for n in range(1, 1301)]
        assert len(publisher.kept[0].body) == 2
        proxy.heal()
        wait_until(lambda: publisher.connected, 30)
        report = publisher.publish(numbered(1, 1301, exchange=name))
        if report.kept:  # the spool wasn't empty yet: behind what is in it
            assert isinstance(report.error, Blocked)
        assert publisher.drain(30)
        stats = publisher.stats()
        assert (stats.kept, stats.kept_bytes, stats.published) == (0, 0, 1302)
        assert publisher.publish(numbered(1, 1302, exchange=name)).published
    assert list(folder.iterdir()) == []
    assert arrived(inspector, queue, 1303) == [str(number) for number in range(1303)]


_WRITER = """
import logging, os, sys, time
from outbox import Event, Publisher
logging.disable()
url, exchange, folder, first, size = sys.argv[1:6]
publisher = Publisher(url, exchange=exchange, spool=folder, timeout=0.3)
number = int(first)
while True:
    names = [f"{os.getpid()}-{number + part}" for part in range(int(size))]
    report = publisher.publish([Event(id=name, target="a.b", exchange=exchange, body=b"{}")
                                for name in names])
    assert len(report.kept) + len(report.published) == len(names), report
    os.write(1, ("".join(f"{event.id}\\n" for event in report.kept)).encode())
    number += int(size)
    time.sleep(0.005)
"""


def killed_writers(url: str, exchange: str, folder: Path, count: int, seconds: float) -> list[str]:
    """Have writers publish and kill them in the middle of it; return what they said was kept."""
    said: list[str] = []
    writers = []
    for number in range(count):
        command = [sys.executable, "-c", _WRITER, url, exchange, str(folder), "0"]
        command.append(str((1, 7, 30)[number % 3]))
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    for writer in writers:
        assert writer.stdout is not None
        said.append(writer.stdout.readline().decode().strip())  # it has begun
    time.sleep(seconds)
    for writer in writers:
        writer.kill()
    for writer in writers:
        assert writer.stdout is not None
        lines = writer.stdout.read().decode().split("\n")
        said += lines[:-1]  # the last line may have been cut
        writer.wait()
        writer.stdout.close()
    return said


@pytest.mark.hazard("S13")
def test_nothing_that_was_reported_as_kept_is_lost_when_its_writers_are_killed(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    said = killed_writers(proxy.url, name, folder, 3, 0.5)
    said += killed_writers(proxy.url, name, folder, 3, 0.2)
    assert len(said) == len(set(said)) > 100
    proxy.heal()
    with Publisher(proxy.url, exchange=name, spool=folder) as publisher:
        publisher.make_ready()
        wait_until(lambda: list(folder.iterdir()) == [], 60)
        assert publisher.stats().kept == 0
        published = publisher.stats().published
    assert len(said) <= published  # a report may not have been written any more
    ids = arrived(inspector, queue, published)
    assert not set(said) - set(ids)
    assert len(set(ids)) == len(ids)
    for writer in {id.partition("-")[0] for id in ids}:
        numbers = [int(id.partition("-")[2]) for id in ids if id.startswith(f"{writer}-")]
        assert numbers == list(range(len(numbers)))  # in order within a process


def test_a_file_counts_what_is_added_and_deleted(folder: Path) -> None:
    folder.mkdir()
    file = SpoolFile.create(folder, "0" * 12)
    assert file.change([(event, 3) for event in numbered(250)], ()) == list(range(1, 251))
    assert (file.events, file.size) == (250, 750)
    new = [(event, 5) for event in numbered(2, first=250)]
    assert file.change(new, [1, 7, 7, 250, 999]) == [251, 252]
    file.change((), [7])  # it has gone before
    assert (file.events, file.size) == (249, 751)
    left = [str(number) for number in range(252) if number not in (0, 6, 249)]
    assert [row.event.id for row in file.read(1000, 1 << 20)] == left
    file.close()
    adopted = SpoolFile.adopt(file.path)
    assert adopted is not None
    assert (adopted.events, adopted.size, adopted.last) == (249, 751, 252)
    assert [row.seq for row in adopted.read(1, 1)] == [2]
    adopted.remove()


@pytest.mark.hazard("S2")
def test_a_file_is_adopted_only_when_its_process_has_ended_even_if_a_child_lives_on(
    folder: Path,
) -> None:
    program = """
import os, sys, time
from outbox import Event, Publisher
publisher = Publisher(sys.argv[1], spool=sys.argv[2])
publisher.publish([Event(id="e", target="a.b", exchange="shop", body=b"{}")])
child = os.fork()
if not child:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program, NOWHERE, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        try:
            (path,) = spool_files(folder)
            assert SpoolFile.adopt(path) is None
            owner.kill()
            owner.wait()
            file = SpoolFile.adopt(path)
            assert file is not None
            assert file.events == 1
            assert SpoolFile.adopt(path) is None  # nor does this process take it twice
            file.close()
            file = SpoolFile.adopt(path)
            assert file is not None
            file.remove()
        finally:
            os.kill(child, signal.SIGKILL)
    assert list(folder.iterdir()) == []


@pytest.mark.hazard("S1", "S3")
def test_looking_for_files_to_adopt_keeps_ones_own(folder: Path) -> None:
    with Publisher(NOWHERE, spool=folder) as first, Publisher(NOWHERE, spool=folder) as second:
        first.publish(events("a"))
        second.publish(events("b"))
        paths = spool_files(folder)
        assert len(paths) == 2
        for path in paths:
            assert SpoolFile.adopt(path) is None
        program = f"""
import fcntl, sys
for path in {[str(lock_path(path)) for path in paths]}:
    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        sys.exit("taken")
"""
        subprocess.run([sys.executable, "-c", program], check=True)
        assert all(lock_path(path).stat().st_mode & 0o777 == 0o600 for path in paths)
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.hazard("S9")
def test_a_child_begins_with_a_file_of_its_own_and_its_parent_goes_on_with_its_file(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    with Publisher(proxy.url, exchange=name, spool=folder) as publisher:
        publisher.publish(events("parent-1", exchange=name))
        child = os.fork()
        if not child:
            report = publisher.publish(events("child", exchange=name))
            os._exit(0 if report.kept and publisher.stats().kept == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        publisher.publish(events("parent-2", exchange=name))
        assert sorted(on_disk(folder)) == ["child", "parent-1", "parent-2"]
        assert len(spool_files(folder)) == 2
        proxy.heal()
        assert publisher.drain(30)
        wait_until(lambda: publisher.stats().published == 3, 20)  # the child's was adopted
    assert sorted(arrived(inspector, queue, 3)) == ["child", "parent-1", "parent-2"]


@pytest.mark.hazard("S10")
def test_only_publishers_of_the_same_broker_and_exchange_adopt_a_file() -> None:
    def digest(url: str, exchange: str = "shop") -> str:
        return digest_of(BrokerURL.parse(url), exchange)

    own = digest("amqp://guest:guest@one:5672/shop")
    assert digest("amqp://other:user@one/shop") == own
    assert digest("amqps://one:5672/shop?cafile=x") == own
    assert digest("amqp://two,one/shop") == digest("amqp://one,two/shop") != own
    others = {digest("amqp://one/"), digest("amqp://two/shop"), digest("amqp://one/shop", "other")}
    assert len(others | {own}) == 4
    assert digest("sqlite:///shop.db") == digest(f"sqlite:///{os.path.abspath('shop.db')}")
    schemas = {digest(f"postgresql://db/shop?schema={name}") for name in ("one", "two")}
    assert len(schemas) == 2


@pytest.mark.hazard("S8")
def test_a_poison_event_at_the_head_is_rejected_and_leaves_the_file(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    rejected: list[str] = []
    proxy.refuse()
    with Publisher(
        proxy.url,
        exchange=name,
        spool=folder,
        unroutable="fail",
        on_rejected=lambda event, reason: rejected.append(event.id),
    ) as publisher:
        poison = Event(id="poison", target="a", exchange=f"{name}-missing", body=b"{}")
        publisher.publish([poison, *numbered(1200, exchange=name)])
        proxy.heal()
        assert publisher.drain(30)
        wait_until(lambda: rejected == ["poison"])  # drain() may return before the hook is called
        assert publisher.stats().rejected == 1
    assert list(folder.iterdir()) == []
    assert len(arrived(inspector, queue, 1200)) == 1200


@pytest.mark.hazard("S7")
def test_a_timed_out_event_that_is_confirmed_later_leaves_the_file_and_is_not_sent_twice(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    with Publisher(proxy.url, exchange=name, spool=folder, timeout=0.3) as publisher:
        publisher.publish(events("first", exchange=name))
        proxy.delay = 0.4
        report = publisher.publish(events("late", exchange=name))
        assert [event.id for event in report.kept] == ["late"]
        assert on_disk(folder) == ["late"]
        assert publisher.drain(30)
        wait_until(lambda: on_disk(folder) == [])
    assert arrived(inspector, queue, 2) == ["first", "late"]
    assert list(folder.iterdir()) == []


def test_the_event_loop_never_waits_for_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = SpoolFile.change

    def slow_change(*arguments: object) -> list[int]:
        time.sleep(0.5)
        return change(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SpoolFile, "change", slow_change)

    async def longest_pause() -> float:
        longest, task = 0.0, asyncio.create_task(publisher.publish_async(events("b")))
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)
        report = await task
        assert [event.id for event in report.kept] == ["b"]
        assert on_disk(folder)[-1:] == ["b"]
        return longest

    with Publisher(NOWHERE, spool=folder) as publisher:
        publisher.publish(events("a"))
        assert asyncio.run(longest_pause()) < 0.3


@pytest.mark.hazard("S5")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_logged_once_and_events_are_kept_in_memory_until_it_has_room(
    folder: Path,
) -> None:
    program = """
import logging, resource, sys, time
from outbox import Event, Publisher
from outbox.spool import spool
spool._RETRY = 0.2
logging.basicConfig(level=logging.WARNING, format="LOG %(message)s", stream=sys.stdout)
def say(line):
    sys.stdout.write(f"{line}\\n")  # at once: another thread logs there
    sys.stdout.flush()
def publish(publisher, first, count):
    chunk = [
        Event(id=str(n), target="a.b", exchange="shop", body=bytes(9000))
        for n in range(first, first + count)
    ]
    assert len(publisher.publish(chunk).kept) == count
publisher = Publisher(sys.argv[1], spool=sys.argv[2], drain_timeout=0)
publish(publisher, 0, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))  # as if the disk was full then
for first in range(1, 31):
    publish(publisher, first, 1)
publish(publisher, 31, 120)
publish(publisher, 151, 1)
say("full")
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
time.sleep(0.3)
publish(publisher, 152, 1)
say("room")
sys.stdin.readline()
say(f"lost {len(publisher.close())}")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, NOWHERE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        while lines[-1] != "full\n":
            assert lines[-1]
            lines.append(writer.stdout.readline())
        failures = [line for line in lines if line.startswith("LOG cannot use the spool")]
        assert len(failures) == 1
        assert "1 event(s) are kept in memory alone, and it is tried again" in failures[0]
        written = [int(id) for id in on_disk(folder)]
        assert written == list(range(len(written)))  # up to the first failure
        assert 1 < len(written) < 31
        print("go", file=writer.stdin, flush=True)
        wait_until(lambda: [int(id) for id in on_disk(folder)] == list(range(153)))
        print("go", file=writer.stdin, flush=True)
        rest = writer.stdout.read()
    assert "can be used again" in rest
    assert rest.endswith("lost 0\n")  # what is in the spool isn't


def test_a_disk_that_is_full_for_good_costs_no_more_than_without_a_spool(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(*_: object) -> list[int]:
        raise Unwritable("database or disk is full")

    monkeypatch.setattr(SpoolFile, "change", on_full_disk)
    with Publisher(NOWHERE, spool=folder, drain_timeout=0, max_kept=3) as publisher:
        publisher.publish(numbered(3))
        with pytest.raises(CollectorFull, match=r"3 event\(s\) of \d+ bytes are kept"):
            with auto_publishing(publisher=publisher):
                enqueue_event({}, "a.b")
        assert [event.id for event in publisher.close()] == ["0", "1", "2"]
    assert "3 event(s) lost, never confirmed: '0', '1', '2'" in caplog.text


def test_with_a_spool_max_kept_limits_only_what_is_not_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Publisher(NOWHERE, spool=folder, max_kept=3, spool_max_bytes=5000) as publisher:
        publisher.publish(numbered(10))
        with auto_publishing(publisher=publisher):
            enqueue_event({}, "a.b")
        publisher.publish(events("large", body=b"x" * 5000))
        with pytest.raises(CollectorFull, match="spool_max_bytes=5000; nothing was enqueued"):
            with auto_publishing(publisher=publisher):
                enqueue_event({}, "a.b")
    monkeypatch.setattr("outbox.spool.disk_limits.reserve_of", lambda disk: 1 << 60)
    with Publisher(NOWHERE, spool=folder) as publisher:
        publisher.publish(numbered(1))
        with pytest.raises(CollectorFull, match="bytes left, and the last 1152921504606846976"):
            with auto_publishing(publisher=publisher):
                enqueue_event({}, "a.b")


def test_a_folder_that_cannot_be_written_is_named_and_events_stay_in_memory(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_RETRY", 0.5)
    with Publisher(NOWHERE, spool=folder, drain_timeout=0) as publisher:
        folder.rmdir()
        folder.write_text("not a folder any more")
        assert publisher.publish(events("a")).kept
        assert "cannot use the spool: " in caplog.text
        assert str(folder) in caplog.text
        assert [event.id for event in publisher.kept] == ["a"]
        folder.unlink()
        folder.mkdir(0o700)
        wait_until(lambda: on_disk(folder) == ["a"], 10)


@pytest.mark.hazard("S12")
def test_a_damaged_file_is_put_aside_and_what_is_in_memory_is_written_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Publisher(NOWHERE, spool=folder, drain_timeout=0) as publisher:
        publisher.publish(numbered(1500))
        (path,) = spool_files(folder)
        publisher._own.spool._spool._files[0].disconnect()  # type: ignore[union-attr]
        with open(path, "r+b") as file:
            file.write(b"\0" * 40_000)
        publisher.publish(events("after"))
        assert on_disk(folder) == [*(str(number) for number in range(1000)), "after"]
        (bad,) = (path for path in folder.iterdir() if ".bad-" in path.name)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        text = errors[0].getMessage()
        assert f"`outbox spool salvage {bad}`" in text
        assert "500 event(s) in it are not published" in text
        assert publisher.stats().kept == 1001


@pytest.mark.hazard("S12")
@pytest.mark.parametrize("also_log", [False, True], ids=["file", "all"])
def test_a_file_that_was_deleted_under_way_is_written_again(
    folder: Path, caplog: pytest.LogCaptureFixture, *, also_log: bool
) -> None:
    with Publisher(NOWHERE, spool=folder, drain_timeout=0) as publisher:
        publisher.publish(numbered(1500))
        for path in list(folder.iterdir()):
            if also_log or path.suffix == ".spool":
                path.unlink()
        publisher.publish(events("after"))
        assert on_disk(folder) == [*(str(number) for number in range(1500)), "after"]
        assert "was deleted or replaced while in use; its 1500 event(s) are now in" in caplog.text


@pytest.mark.hazard("S11")
def test_a_file_of_a_newer_version_is_left_alone(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Publisher(NOWHERE, spool=folder, drain_timeout=0) as publisher:
        publisher.publish(numbered(1))
    (path,) = spool_files(folder)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    spool = spool_module.Spool(folder, path.name.partition("-")[0], lambda event: b"")
    spool.look()
    spool.look()
    wait_until(lambda: "left to a newer version of outbox" in caplog.text)
    spool.stop()
    assert caplog.text.count("left to a newer version of outbox") == 1
    assert path.exists()
    lock = FileLock.take(lock_path(path))
    assert lock is not None
    lock.release(remove=False)


def test_the_end_of_a_process_does_not_wait_for_a_broker_that_is_away(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.spool")
    publisher = Publisher(NOWHERE, spool=folder)
    publisher.publish(numbered(3))
    began = time.monotonic()
    assert publisher.close() == ()
    assert time.monotonic() - began < 2
    assert f"3 event(s) stay in the spool {folder}" in caplog.text
    assert "lost" not in caplog.text
    assert on_disk(folder) == ["0", "1", "2"]


def test_what_is_published_when_the_process_exits_is_in_the_spool(folder: Path) -> None:
    program = """
import atexit, sys
from outbox import Event, Publisher
publisher = Publisher(sys.argv[1], spool=sys.argv[2])
def last():
    report = publisher.publish([Event(id="last", target="a.b", exchange="shop", body=b"{}")])
    assert report.kept
publisher.make_ready()  # on Python 3.12, no thread is started at exit
atexit.register(last)
if "first" in sys.argv:
    publisher.publish([Event(id="first", target="a.b", exchange="shop", body=b"{}")])
"""
    for arguments in ([], ["first"]):
        command = [sys.executable, "-c", program, NOWHERE, str(folder), *arguments]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "lost" not in ended.stderr, ended.stderr
    assert sorted(on_disk(folder)) == ["first", "last", "last"]


@pytest.mark.parametrize("moves", ["same", "other folder", "no spool"])
def test_another_configure_goes_on_with_the_spool(
    proxy: FaultProxy,
    inspector: Inspector,
    name: str,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    moves: str,
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    configure(proxy.url, exchange=name, spool=folder).publish(numbered(1500, exchange=name))
    folders: dict[str, str | Path] = {
        "same": folder,
        "other folder": tmp_path / "other",
        "no spool": "",
    }
    new = configure(proxy.url, exchange=name, spool=folders[moves], max_kept=100_000)
    new.publish(numbered(100, 1500, exchange=name))
    if moves == "no spool":
        assert "500 event(s) stay in the spool" in caplog.text
        assert len(on_disk(folder)) == 500
        expected = [*range(1000), *range(1500, 1600)]
    else:
        wait_until(lambda: new.stats().kept == 1600)
        expected = list(range(1600))
    proxy.heal()
    assert new.drain(30)
    assert [int(id) for id in arrived(inspector, queue, len(expected))] == expected
    new.close()


@contextlib.contextmanager
def before_handing_over(act: Callable[[Spooling], None]) -> Iterator[None]:
    """Have a publisher that is replaced call ``act`` just before it passes its events on."""
    hand_over = Spooling.hand_over

    def act_before(self: Spooling, successor: Spooling | None) -> Callable[[], None]:
        act(self)
        return hand_over(self, successor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Spooling, "hand_over", act_before)
        yield


def test_what_is_being_read_when_the_publisher_is_replaced_is_published_in_order(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    configure(proxy.url, exchange=name, spool=folder).publish(numbered(1500, exchange=name))

    def read(spooling: Spooling) -> None:
        spooling._reading = True
        is_read = threading.Event()

        def on_read(read: Read) -> None:
            spooling._on_read(read)
            is_read.set()

        spooling._spool.read(on_read)
        assert is_read.wait(10)

    with before_handing_over(read):
        new = configure(proxy.url, exchange=name, spool=folder, max_kept=100_000)
    new.publish(numbered(100, 1500, exchange=name))
    proxy.heal()
    assert new.drain(30)
    assert [int(id) for id in arrived(inspector, queue, 1600)] == list(range(1600))
    new.close()


def test_what_comes_while_the_publisher_is_replaced_stays_behind_what_is_in_the_spool(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    old = configure(proxy.url, exchange=name, spool=folder)
    old.publish(numbered(1500, exchange=name))

    def publish(_: Spooling) -> None:
        old.submit(numbered(100, 1500, exchange=name))
        proxy.heal()  # the new publisher meets no outage, in which it would be kept in any case

    with before_handing_over(publish):
        new = configure(proxy.url, exchange=name, spool=folder, max_kept=100_000)
    assert new.drain(30)
    assert [int(id) for id in arrived(inspector, queue, 1600)] == list(range(1600))
    new.close()


def test_files_of_one_second_are_taken_in_the_order_in_which_they_were_made(
    tmp_path: Path,
) -> None:
    made = []
    for _ in range(20):
        made.append(new_path(tmp_path, "0" * 12))
        made[-1].touch()
        time.sleep(0.0001)
    assert [path for _, path in files_in(tmp_path, "0" * 12)] == made


def test_a_publisher_is_replaced_even_if_its_file_is_damaged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = configure(NOWHERE, spool=folder)
    old.publish(numbered(10))
    (path,) = spool_files(folder)
    old._own.spool._spool._files[0].disconnect()  # type: ignore[union-attr]
    path.write_bytes(b"\0" * 40_000)
    new = configure(NOWHERE, drain_timeout=0)
    assert "cannot delete 10 event(s)" in caplog.text
    assert "unexpected error" not in caplog.text
    assert len(new.publish(events("next")).kept) == 1
    assert [event.id for event in new.close()] == [*map(str, range(10)), "next"]


def test_the_order_survives_that_publishers_are_replaced_at_once(
    proxy: FaultProxy, inspector: Inspector, name: str, folder: Path
) -> None:
    queue = inspector.queue(name, name)
    proxy.refuse()
    configure(proxy.url, exchange=name, spool=folder).publish(numbered(1500, exchange=name))
    for _ in range(5):
        new = configure(proxy.url, exchange=name, spool=folder, max_kept=100_000)
    new.publish(numbered(100, 1500, exchange=name))
    wait_until(lambda: new.stats().kept == 1600)
    proxy.heal()
    assert new.drain(30)
    assert [int(id) for id in arrived(inspector, queue, 1600)] == list(range(1600))
    new.close()


def test_another_spool_goes_on_with_an_adopted_file(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Publisher(NOWHERE, spool=folder, drain_timeout=0) as publisher:
        publisher.publish(numbered(1500))
    (path,) = spool_files(folder)
    digest = path.name.partition("-")[0]
    first, second = (spool_module.Spool(folder, digest, lambda event: b"") for _ in range(2))
    read: queue.SimpleQueue[spool_module.Read] = queue.SimpleQueue()
    taken: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    first.look()
    first.read(read.put)
    entries = read.get(timeout=10).entries
    second.watch(lambda events, size: taken.put((events, size)), lambda lost, own: None)
    second.take_over(first.hand_over(), lambda events, size: None)
    unread, size = taken.get(timeout=10)
    assert (unread, size > 0) == (1500 - len(entries), True)
    second.settle(entries)  # they were in flight when the publisher was replaced
    second.read(read.put)
    assert [entry.event.id for entry in read.get(timeout=10).entries] == [
        str(number) for number in range(len(entries), 1500)
    ]
    second.stop()
    assert on_disk(folder) == [str(number) for number in range(len(entries), 1500)]
    assert not [found for found in folder.iterdir() if ".bad-" in found.name]
    assert "deleted" not in caplog.text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("sqlite:///spool.db", "not the path of a folder"),
        (7, "not the path of a folder"),
        (b"/tmp", "not the path of a folder"),
    ],
)
def test_a_spool_is_a_folder(value: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"the setting 'spool' is .*{why}"):
        Publisher(NOWHERE, spool=value)


@pytest.mark.hazard("S4")
def test_a_folder_that_others_write_to_or_on_a_network_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(0o700)
    kind = "nfs4"
    monkeypatch.setattr("outbox.system.disk.private_folder.file_system", lambda device: kind)
    monkeypatch.setattr("outbox.spool.spool_folder.file_system", lambda device: kind)
    with pytest.raises(UsageError, match=r"network file system \(nfs4\).*spool=, or OUTBOX_SPOOL"):
        Publisher(NOWHERE, spool=folder)
    kind = "tmpfs"
    Publisher(NOWHERE, spool=folder).close()
    assert f"the spool {folder} is in memory" in caplog.text
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="may be written to by other users"):
        Publisher(NOWHERE, spool=folder)


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_SPOOL", str(folder))
    with Publisher(NOWHERE) as publisher:
        assert publisher.settings.spool == str(folder)
        publisher.publish(events("a"))
    assert on_disk(folder) == ["a"]
    monkeypatch.setenv("OUTBOX_SPOOL", "sqlite:///spool.db")
    with pytest.raises(UsageError, match="the environment variable OUTBOX_SPOOL is 'sqlite"):
        Publisher(NOWHERE)


def test_without_a_spool_nothing_of_it_is_imported(folder: Path) -> None:
    program = """
import sys
from outbox import Event, Publisher
Publisher("amqp://127.0.0.1:1/", drain_timeout=0).publish(
    [Event(id="a", target="a.b", exchange="shop", body=b"{}")]
)
assert "outbox.spool" not in sys.modules
assert "sqlite3" not in sys.modules
assert "sqlalchemy" not in sys.modules
publisher = Publisher("amqp://127.0.0.1:1/", spool=sys.argv[1])
publisher.publish([Event(id="a", target="a.b", exchange="shop", body=b"{}")])
assert "outbox.spool.spooling" in sys.modules
assert "sqlalchemy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


def test_consumers_publishers_spool_no_follow_on_events(folder: Path) -> None:
    with Publisher(NOWHERE, spool=folder) as publisher:
        report = publisher.publish(events("a"), keep=False, timeout=1)
        assert [rejection.event.id for rejection in report.rejected] == ["a"]
        assert list(folder.iterdir()) == []


def test_every_field_of_an_event_survives(folder: Path) -> None:
    with Publisher(NOWHERE, spool=folder) as publisher, auto_publishing(publisher=publisher):
        delayed = enqueue_event(
            {"n": 1},
            "a.b",
            headers={"bytes": b"\0\xff", "list": [1, None, {"deep": True}], "text": "ü"},
            key="k",
            priority=7,
            delay=3600,
            unroutable="ignore",
            id="an id",
        )
    (path,) = spool_files(folder)
    file = SpoolFile.adopt(path)
    assert file is not None
    assert [spooled.event for spooled in file.read(10, 1 << 20)] == [delayed]
    file.remove()


@pytest.mark.hazard("S2")
def test_the_lock_is_a_record_lock(folder: Path) -> None:
    """A lock of flock() would be held on by a forked child of its dead owner."""
    folder.mkdir()
    lock = FileLock.take(folder / "x.lock")
    assert lock is not None
    with open(folder / "x.lock.2", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    program = f"""
import fcntl
file = open({str(folder / "x.lock")!r}, "r+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("held")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout == b"held\n"
    lock.release(remove=True)
    assert not lock.stands or not (folder / "x.lock").exists()
