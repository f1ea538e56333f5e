"""No test sees leftovers of an earlier one, however tests are run.

Each module below is run like a user's: its tests in order, with warnings as errors.
"""

from __future__ import annotations

import pytest

CONFTEST = """
import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django.contrib.contenttypes"],
)
django.setup()
"""

THREADS = """
import threading

from outbox import EventCollector, auto_publishing, enqueue_event

ready, go_on = threading.Event(), threading.Event()

def work():
    with auto_publishing():
        enqueue_event(1, "before")
        ready.set()
        go_on.wait(10)
        enqueue_event(2, "after")

thread = threading.Thread(target=work)

def test_a_thread_is_left_in_the_midst_of_its_work(collected_events):
    thread.start()
    ready.wait(10)
    collected_events.assert_pending("before")

def test_it_ends_in_the_next_test(collected_events):
    go_on.set()
    thread.join(10)
    assert repr(collected_events) == "<CollectedEvents none>"

def test_and_in_a_test_that_records_nothing():
    assert EventCollector.current().events == ()
"""

UNITS = """
import pytest

from outbox import EventCollector, auto_publishing, clear_events, enqueue_event, publish
from outbox.middleware.wsgi import OutboxMiddleware

left = []

def test_events_are_left_outside_of_any_unit(collected_events):
    enqueue_event(1, "outside")
    left.append(EventCollector.current())

def test_they_are_gone(collected_events):
    assert publish().published == ()
    assert clear_events() == ()
    left.pop().publish()
    assert repr(collected_events) == "<CollectedEvents none>"

def test_a_block_is_left_open(collected_events):
    def block(ending):
        with auto_publishing():
            enqueue_event(1, "block")
            yield
            if ending:
                raise ending

    for ending in (None, KeyError()):
        left.append(block(ending))
        next(left[-1])

def test_it_ends_in_the_next_test(collected_events):
    success, failure = left
    left.clear()
    with pytest.raises(KeyError):
        next(failure)
    next(success, None)
    assert repr(collected_events) == "<CollectedEvents none>"
    enqueue = auto_publishing(lambda: enqueue_event(3, "own"))
    enqueue()
    collected_events.assert_published("own")

def test_a_block_is_never_left(collected_events):
    auto_publishing().__enter__()
    enqueue_event(1, "for.good")

def test_no_other_joins_it(collected_events):
    enqueue = auto_publishing(lambda: enqueue_event(2, "own"))
    enqueue()
    collected_events.assert_published("#", 2, times=1)

def test_a_response_is_left_unread(collected_events):
    def app(environ, start_response):
        start_response("200 OK", [])
        enqueue_event(1, "response")
        yield b"a"
        enqueue_event(2, "response")
        yield b"b"

    left.append(OutboxMiddleware(app)({}, lambda *_: None))
    next(left[-1])

def test_it_is_read_in_the_next_test(collected_events):
    response = left.pop()
    assert list(response) == [b"b"]
    response.close()
    assert repr(collected_events) == "<CollectedEvents none>"

shared = EventCollector()

@pytest.mark.parametrize("n", [1, 2])
def test_a_collector_of_the_applications_own_serves_every_test(collected_events, n):
    with EventCollector.use(shared):
        enqueue_event(n, "shared")
        shared.publish()
    collected_events.assert_published("#", n, times=1)
"""

ASYNCIO = """
import asyncio

import pytest

from outbox import auto_publishing, enqueue_event

pytestmark = pytest.mark.asyncio(loop_scope="module")
go_on = []
tasks = []

async def work():
    async with auto_publishing():
        enqueue_event(1, "before")
        await go_on[0].wait()
        enqueue_event(2, "after")

async def test_a_task_is_left_in_the_midst_of_its_work(collected_events):
    go_on.append(asyncio.Event())
    tasks.append(asyncio.create_task(work()))
    await asyncio.sleep(0)
    collected_events.assert_pending("before")

async def test_it_ends_in_the_next_test(collected_events):
    go_on[0].set()
    await tasks[0]
    assert repr(collected_events) == "<CollectedEvents none>"
"""

ANYIO = """
import anyio
import pytest

from outbox import auto_publishing, enqueue_event

pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"

@pytest.fixture(scope="module")
async def service():
    go_on, ended = anyio.Event(), anyio.Event()

    async def work():
        async with auto_publishing():
            enqueue_event(1, "before")
            await go_on.wait()
            enqueue_event(2, "after")
        ended.set()

    async with anyio.create_task_group() as group:
        yield group, work, go_on, ended

async def test_a_task_is_left_in_the_midst_of_its_work(collected_events, service):
    group, work, _, _ = service
    group.start_soon(work)
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    collected_events.assert_pending("before")

async def test_it_ends_in_the_next_test(collected_events, service):
    _, _, go_on, ended = service
    go_on.set()
    await ended.wait()
    assert repr(collected_events) == "<CollectedEvents none>"
"""

DJANGO = """
from django.contrib.contenttypes.models import ContentType
from django.core.management import call_command
from django.db import transaction
from django.test import TestCase, TransactionTestCase

from outbox import auto_publishing, enqueue_event
from outbox.testing import CollectedEventsMixin

class OrderTest(CollectedEventsMixin, TestCase):
    @classmethod
    def setUpClass(cls):
        call_command("migrate", verbosity=0)
        super().setUpClass()

    def place(self):
        with auto_publishing(), transaction.atomic():
            ContentType.objects.create(app_label="shop", model="order")
            transaction.on_commit(auto_publishing(lambda: enqueue_event(2, "order.confirmed")))
            enqueue_event(1, "order.placed")

    def test_1(self):
        with self.captureOnCommitCallbacks(execute=True):
            self.place()
        self.collected_events.assert_published("#", times=2)
        self.left = auto_publishing()
        self.left.__enter__()
        enqueue_event(1, "left")

    def test_2(self):
        assert repr(self.collected_events) == "<CollectedEvents none>"
        assert not ContentType.objects.filter(app_label="shop").exists()
        self.place()
        self.collected_events.assert_published("#", times=1)
"""

SQLALCHEMY = """
import pytest
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

import outbox.sql
from outbox import enqueue_event

@pytest.fixture(scope="module")
def engine():
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"isolation_level": None}
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    outbox.sql.metadata.create_all(engine)
    yield engine
    engine.dispose()

@pytest.fixture
def session(engine):
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()

left = []

@pytest.mark.parametrize("n", range(2))
def test_each_has_its_own(collected_events, session, n):
    assert repr(collected_events) == "<CollectedEvents none>"
    assert session.scalar(select(func.count()).select_from(outbox.sql.events)) == 0
    enqueue_event(n, "order.placed", session=session)
    session.commit()
    collected_events.assert_stored("order.placed", n, times=1)
    enqueue_event(n, "order.lost", session=session)

def test_a_session_is_left_open(collected_events, engine):
    left.append(Session(engine))
    enqueue_event(1, "left", session=left[0])

def test_it_is_closed_in_the_next_test(collected_events):
    left.pop().close()
    assert repr(collected_events) == "<CollectedEvents none>"
"""

MODULES = {
    "threads": (THREADS, 3),
    "units": (UNITS, 10),
    "asyncio": (ASYNCIO, 2),
    "anyio": (ANYIO, 2),
    "django": (DJANGO, 2),
    "sqlalchemy": (SQLALCHEMY, 4),
}


@pytest.mark.parametrize("arguments", [(), ("-n", "2", "--dist", "loadfile")], ids=["", "xdist"])
@pytest.mark.slow
def test_the_second_test_sees_nothing_of_the_first(
    pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makeini(
        "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    pytester.makepyfile(**{f"test_{name}": source for name, (source, _) in MODULES.items()})
    result = pytester.runpytest_subprocess(
        "-p", "no:randomly", "-p", "no:cacheprovider", *arguments, timeout=80
    )
    result.assert_outcomes(passed=sum(count for _, count in MODULES.values()))
    assert "lost" not in result.stderr.str()
