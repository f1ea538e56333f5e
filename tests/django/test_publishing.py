"""What is committed is published right after the commit, where that is safe."""

from __future__ import annotations

import contextlib
import gc
import signal
import statistics
import time
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db import DatabaseError, connection, connections, transaction

import outbox.sql
from outbox import Publisher, UsageError
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.django import connecting, enqueue_event
from outbox.django import project as outbox_project
from outbox.django.connecting import can_hand_over, engine_of
from outbox.django.models import StoredEvent
from outbox.sql import Relay, Store
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.testing.servers import ServerMissing
from tests.amqp import Inspector
from tests.conftest import new_database
from tests.django.conftest import (
    postgresql_settings,
    sqlite_settings,
    use_database,
)
from tests.django.running import run_script
from tests.django.shop.models import Order
from tests.pgbouncer import PrivatePgBouncer
from tests.relaying import running
from tests.waiting import wait_until

# Its name before Django 6.1.
savepoint_create = getattr(transaction, "savepoint_create", None) or transaction.savepoint

GRACE = 1.0  # seconds, until a relay takes a row that its process has not published
AWAY = "amqp://127.0.0.1:1/"


@pytest.fixture(autouse=True)
def drained(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is left to the thread when the databases are dropped."""
    yield
    outbox.sql.drain()


@pytest.fixture
def queue(amqp_url: str, inspector: Inspector, name: str, outbox_setting: Any) -> str:
    """A queue that gets everything that the project publishes."""
    outbox_setting(URL=amqp_url, EXCHANGE=name)
    return inspector.queue(f"{name}.all", name)


def numbers(inspector: Inspector, queue: str, count: int) -> list[int]:
    """Return the numbers of the events that arrive, and of any more that are there then."""
    messages = inspector.messages(queue, count)
    return [each.payload["n"] for each in (*messages, *inspector.all(queue))]


def stored(using: str = "default") -> list[int]:
    return [int(row.key or "") for row in StoredEvent.objects.using(using)]


def enqueue(number: int, **options: Any) -> None:
    enqueue_event({"n": number}, "order.placed", key=str(number), **options)


# ---------------------------------------------------------------------------- right after a commit


@pytest.mark.usefixtures("databases")
def test_what_is_committed_is_published_at_once(
    inspector: Inspector, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    with transaction.atomic():
        enqueue(1)
        with contextlib.suppress(KeyError), transaction.atomic():
            enqueue(2)
            raise KeyError
        savepoint = savepoint_create()
        enqueue(3)
        transaction.savepoint_rollback(savepoint)
        enqueue(4)
        assert inspector.all(queue) == []
    # No relay runs.
    assert numbers(inspector, queue, 2) == [1, 4]
    enqueue(5)
    assert numbers(inspector, queue, 1) == [5]
    wait_until(lambda: stored() == [])
    assert not caplog.records


def test_where_the_project_stores_events_workers_get_them_without_a_relay(
    databases: str, outbox_setting: Any, name: str
) -> None:
    url = engine_of("default").url
    if databases != "sqlite":
        its_settings = settings.DATABASES["default"]
        url = url.set(
            drivername=databases,
            username=its_settings["USER"],
            host=its_settings["HOST"],
            port=int(its_settings["PORT"]),
            database=its_settings["NAME"],
        )
    address = url.render_as_string(hide_password=False)
    outbox_setting(URL=address, EXCHANGE=name)
    seen: list[int] = []

    @consumer(name, topics=["order.*"])
    def note(event: ReceivedEvent) -> None:
        seen.append(event.payload["n"])

    with Publisher(address, exchange=name) as publisher:
        worker = Worker([note], publisher=publisher)
        worker.start()
        wait_until(lambda: worker.is_consuming)
        with transaction.atomic():
            enqueue(1)
            with contextlib.suppress(KeyError), transaction.atomic():
                enqueue(2)
                raise KeyError
            enqueue(3)
            # SQLite's copy of the bindings would have to be read while this has the lock.
            queues = [each.queue for each in StoredEvent.objects.all()]
            assert queues == ["outbox.unrouted" if databases == "sqlite" else name] * 2
        wait_until(lambda: sorted(seen) == [1, 3])
        assert worker.stop()
    wait_until(lambda: stored() == [])


@pytest.mark.usefixtures("databases")
def test_what_is_rolled_back_is_not_published(inspector: Inspector, queue: str) -> None:
    with contextlib.suppress(KeyError), transaction.atomic():
        enqueue(1)
        raise KeyError
    with transaction.atomic():
        enqueue(2)
        transaction.set_rollback(True)
    with transaction.atomic():
        enqueue(3)
    assert numbers(inspector, queue, 1) == [3]


@pytest.mark.parametrize("store", ["default", None])
@pytest.mark.usefixtures("databases")
def test_a_callback_of_another_app_that_raises_holds_nothing_back(
    inspector: Inspector, queue: str, amqp_url: str, name: str, outbox_setting: Any, store: Any
) -> None:
    outbox_setting(URL=amqp_url, EXCHANGE=name, STORE=store)
    ran: list[str] = []
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        transaction.on_commit(lambda: ran.append("before"))
        transaction.on_commit(lambda: 1 / 0)
        enqueue(1)
        with transaction.atomic():
            enqueue(2)
        transaction.on_commit(lambda: ran.append("after"))
        enqueue(3)
    assert ran == ["before"]
    assert numbers(inspector, queue, 3) == [1, 2, 3]


@pytest.mark.usefixtures("databases")
def test_without_the_broker_the_commit_is_not_held_up(
    outbox_setting: Any, inspector: Inspector, amqp_url: str, name: str
) -> None:
    outbox_setting(URL=AWAY, EXCHANGE=name)
    with transaction.atomic():
        enqueue(1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 0.5
    assert stored() == [1]
    queue = inspector.queue(f"{name}.all", name)
    with (
        Publisher(amqp_url, exchange=name) as publisher,
        running(Relay(engine_of("default"), publisher)),
    ):
        assert numbers(inspector, queue, 1) == [1]
        wait_until(lambda: stored() == [])


def test_with_notify_the_process_only_wakes_relays(
    databases: str, outbox_setting: Any, amqp_url: str, name: str, inspector: Inspector
) -> None:
    if databases != "postgresql":
        pytest.skip("only PostgreSQL notifies")
    queue = inspector.queue(f"{name}.all", name)
    outbox_setting(URL=amqp_url, EXCHANGE=name, AFTER_COMMIT="notify")
    its = connections["default"].settings_dict
    with psycopg.connect(
        dbname=its["NAME"], user=its["USER"], host=its["HOST"], port=its["PORT"], autocommit=True
    ) as listener:
        listener.execute("LISTEN outbox_events")
        with transaction.atomic():
            enqueue(1)
        [notification] = listener.notifies(timeout=10, stop_after=1)
    assert notification.channel == "outbox_events"
    assert stored() == [1]
    assert inspector.all(queue) == []


# -------------------------------------------------------------------------- the end of the process


@pytest.mark.usefixtures("databases")
def test_a_script_publishes_before_it_ends(inspector: Inspector, queue: str) -> None:
    done = run_script(
        "from outbox import enqueue_event\n"
        "from django.db import transaction\n"
        "with transaction.atomic():\n"
        "    for number in range(20):\n"
        "        enqueue_event({'n': number}, 'order.placed')\n",
        settings.OUTBOX,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(inspector, queue, 20) == list(range(20))
    assert not StoredEvent.objects.exists()


@pytest.mark.parametrize(
    "registered",
    [
        "storing.Pending.publish = lambda self: kill()",
        "transaction.on_commit(kill)",
    ],
    ids=["while it publishes", "in another callback, the first"],
)
@pytest.mark.usefixtures("databases")
def test_a_process_killed_right_after_the_commit_leaves_its_events_to_a_relay(
    registered: str, inspector: Inspector, queue: str, amqp_url: str, name: str
) -> None:
    done = run_script(
        "import os, signal\n"
        "from outbox import enqueue_event\n"
        "from django.db import transaction\n"
        "from outbox.django import storing\n"
        "def kill():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with transaction.atomic():\n"
        f"    {registered}\n"
        "    enqueue_event({'n': 1}, 'order.placed', key='1')\n",
        settings.OUTBOX,
    )
    assert done.returncode == -signal.SIGKILL
    assert stored() == [1]
    assert inspector.all(queue) == []
    with (
        Publisher(amqp_url, exchange=name) as publisher,
        running(Relay(engine_of("default"), publisher)),
    ):
        assert numbers(inspector, queue, 1) == [1]


@pytest.mark.usefixtures("databases")
def test_without_sqlalchemy_a_process_stores(queue: str) -> None:
    done = run_script(
        "from outbox import enqueue_event\n"
        "from django.db import transaction\n"
        "for number in (1, 2):\n"
        "    with transaction.atomic():\n"
        "        enqueue_event({'n': number}, 'order.placed', key=str(number))\n"
        "assert not [name for name in sys.modules if name.startswith('sqlalchemy.')]\n",
        settings.OUTBOX,
        preamble="import sys\nsys.modules['sqlalchemy'] = None",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SQLAlchemy isn't installed") == 1
    assert stored() == [1, 2]


# ------------------------------------------------------------------------------------------ SQLite


@pytest.fixture(params=["deferred", "immediate"])
def sqlite_mode(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path
) -> Iterator[str]:
    """An SQLite database whose transactions begin in this mode."""
    path = tmp_path / "default.sqlite3"
    path.write_bytes(sqlite_template.read_bytes())
    its_settings = sqlite_settings(path)
    if request.param == "deferred":
        del its_settings["OPTIONS"]
    before = dict(connections.settings)["default"]
    use_database("default", its_settings)
    yield request.param
    outbox.sql.drain()
    use_database("default", before)


def test_on_sqlite_the_application_never_finds_the_database_locked(
    sqlite_mode: str, queue: str, inspector: Inspector
) -> None:
    assert can_hand_over("default") == (sqlite_mode == "immediate")
    for number in range(300):
        with transaction.atomic():
            Order.objects.count()
            Order.objects.create(number=number)
            enqueue(number)
    assert Order.objects.count() == 300
    if sqlite_mode == "immediate":
        assert numbers(inspector, queue, 300) == list(range(300))
    else:
        assert len(stored()) == 300
        assert inspector.all(queue) == []


def test_on_sqlite_a_relay_beside_harms_transactions_that_begin_with_the_lock_no_more(
    sqlite_mode: str, queue: str, inspector: Inspector, amqp_url: str, name: str
) -> None:
    if sqlite_mode == "deferred":
        pytest.skip("any other writer fails a transaction that has read first, also Django's own")
    with (
        Publisher(amqp_url, exchange=name) as publisher,
        running(Relay(engine_of("default"), publisher)),
    ):
        for number in range(300):
            with transaction.atomic():
                Order.objects.count()
                Order.objects.create(number=number)
                enqueue(number)
        assert sorted(numbers(inspector, queue, 300)) == list(range(300))
    assert Order.objects.count() == 300


# -------------------------------------------------------------------------------- Django's database


@pytest.fixture
def postgresql_database(
    postgresql: PrivatePostgreSQL, postgresql_template: str
) -> Iterator[dict[str, Any]]:
    """The settings of a migrated PostgreSQL database, which is ``default``."""
    before = dict(connections.settings)["default"]
    with new_database(postgresql, template=postgresql_template) as url:
        its_settings = postgresql_settings(url)
        use_database("default", its_settings)
        yield its_settings
        outbox.sql.drain()
        use_database("default", before)


def test_a_row_of_another_schema_with_the_same_number_stays(
    postgresql_database: object, queue: str, inspector: Inspector
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("CREATE SCHEMA tenant")
        cursor.execute("CREATE TABLE tenant.outbox_events (LIKE outbox_events INCLUDING ALL)")
        cursor.execute(
            "ALTER TABLE tenant.outbox_events ALTER seq DROP IDENTITY IF EXISTS, "
            "ALTER seq ADD GENERATED BY DEFAULT AS IDENTITY"
        )
    enqueue(1, delay=3600)
    [public] = StoredEvent.objects.all()
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL search_path TO tenant")
        enqueue(2)
        [of_tenant] = StoredEvent.objects.all()
        assert of_tenant.seq == public.seq
    assert outbox.sql.drain()
    assert inspector.all(queue) == []
    assert stored() == [1]
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tenant.outbox_events")
        assert cursor.fetchone() == (1,)


def publishes(inspector: Inspector, queue: str) -> None:
    """See that an event is published by the fast path, and one by a relay's engine."""
    with transaction.atomic():
        enqueue(1)
    assert numbers(inspector, queue, 1) == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"server_side_binding": True},
        {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE},
        {"assume_role": "clerk"},
        {"options": "-c search_path=apart"},
        {"service": "shop"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_options_of_a_database_are_kept(
    postgresql_database: dict[str, Any],
    queue: str,
    inspector: Inspector,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    its = {**postgresql_database, "OPTIONS": options}
    with connection.cursor() as cursor:
        if "assume_role" in options:
            cursor.execute("CREATE ROLE clerk")
            cursor.execute("GRANT ALL ON outbox_events TO clerk")
        if "options" in options:
            cursor.execute("CREATE SCHEMA apart")
            cursor.execute("ALTER TABLE outbox_events SET SCHEMA apart")
        if "service" in options:
            file = tmp_path / "services"
            names = {"dbname": "NAME", "user": "USER", "host": "HOST", "port": "PORT"}
            lines = [f"{key}={its[of]}" for key, of in names.items()]
            file.write_text("\n".join(["[shop]", *lines]))
            monkeypatch.setenv("PGSERVICEFILE", str(file))
            its = {"ENGINE": its["ENGINE"], "OPTIONS": options}
    use_database("default", its)
    try:
        publishes(inspector, queue)
        outbox.sql.drain()
    finally:
        use_database("default", postgresql_database)
        if "assume_role" in options:
            with connection.cursor() as cursor:
                cursor.execute("DROP OWNED BY clerk")
                cursor.execute("DROP ROLE clerk")


def test_an_engine_has_the_time_zone_of_django(
    postgresql_database: dict[str, Any], queue: str, inspector: Inspector
) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {postgresql_database['NAME']} SET timezone = 'Asia/Tokyo'")
    use_database("default", postgresql_database)
    event = enqueue_event({"n": 1}, "order.placed")
    [message] = inspector.messages(queue, 1)
    assert message.properties.timestamp == int(event.occurred_at.timestamp())


def test_behind_a_pooler_in_transaction_mode(
    postgresql: PrivatePostgreSQL,
    postgresql_database: dict[str, Any],
    queue: str,
    inspector: Inspector,
) -> None:
    try:
        pooler = PrivatePgBouncer(postgresql).start()
    except ServerMissing as error:
        pytest.skip(str(error))
    with contextlib.closing(pooler) if hasattr(pooler, "close") else pooler:
        use_database(
            "default",
            {
                **postgresql_database,
                "HOST": "127.0.0.1",
                "PORT": str(pooler.port),
                "DISABLE_SERVER_SIDE_CURSORS": True,
            },
        )
        for number in range(20):
            with transaction.atomic():
                enqueue(number)
        assert numbers(inspector, queue, 20) == list(range(20))
        outbox.sql.drain()
        use_database("default", postgresql_database)


def test_engines_follow_the_name_of_the_database(
    postgresql: PrivatePostgreSQL, postgresql_template: str, postgresql_database: dict[str, Any]
) -> None:
    enqueue(1)
    assert [row.event.key for row in Store(engine_of("default")).claim(10)] == ["1"]
    engine_of("default").dispose()
    with new_database(postgresql, template=postgresql_template) as url:
        # As create_test_db() does it, with the connection there already.
        connection.close()
        connection.settings_dict["NAME"] = postgresql_settings(url)["NAME"]
        enqueue(2)
        assert [row.event.key for row in Store(engine_of("default")).claim(10)] == ["2"]
        engine_of("default").dispose()
        connection.close()
        connection.settings_dict["NAME"] = postgresql_database["NAME"]


def test_nothing_stays_open_for_a_thread_that_has_ended(
    postgresql_database: dict[str, Any], queue: str, inspector: Inspector
) -> None:
    def work() -> weakref.ref[Any]:
        with transaction.atomic():
            enqueue(1)
        connection.close()
        return weakref.ref(connections["default"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # connections that the threads of other tests have left
    for engine in connecting._engines.values():
        engine.dispose()
    connecting._engines.clear()  # it makes the engine
    with ThreadPoolExecutor(1) as pool:
        wrapper = pool.submit(work).result()
    del pool
    assert numbers(inspector, queue, 1) == [1]
    assert outbox.sql.drain()
    gc.collect()
    assert wrapper() is None  # with which its connection would stay open

    def others() -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid != pg_backend_pid()"
            )
            return int(cursor.fetchone()[0])

    wait_until(lambda: others() == 0)


@pytest.mark.usefixtures("databases")
def test_a_failed_insert_rolls_the_transaction_back_as_saving_a_model_does() -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE outbox_events RENAME COLUMN content_type TO kind")
    with transaction.atomic():
        Order.objects.create(number=1)
        with pytest.raises(DatabaseError):
            enqueue(1)
    assert not Order.objects.exists()


@pytest.mark.usefixtures("databases")
def test_storing_without_a_publisher_costs_little_more(
    outbox_setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def microseconds() -> float:
        with transaction.atomic():
            begin = time.perf_counter()
            for _ in range(100):
                outbox_project.publisher()
                outbox.configuration.settings_to_store()
            return (time.perf_counter() - begin) * 1e4

    def measured(**keys: Any) -> float:
        outbox_setting(**keys)
        microseconds()
        return statistics.median(microseconds() for _ in range(9))

    assert measured() - measured(URL="memory://") < 15


# ------------------------------------------------------------------------------------ STORE = None


@pytest.fixture
def held(databases: str, queue: str, amqp_url: str, name: str, outbox_setting: Any) -> str:
    """The queue of a project that stores nothing."""
    outbox_setting(URL=amqp_url, EXCHANGE=name, STORE=None)
    return queue


def test_without_a_store_events_are_published_after_the_commit(
    held: str, inspector: Inspector
) -> None:
    with transaction.atomic():
        enqueue(1)
        with contextlib.suppress(KeyError), transaction.atomic():
            enqueue(2)
            raise KeyError
        with transaction.atomic():
            enqueue(3)
        assert inspector.all(held) == []
    assert numbers(inspector, held, 2) == [1, 3]
    with contextlib.suppress(KeyError), transaction.atomic():
        enqueue(4)
        raise KeyError
    with transaction.atomic():
        enqueue(5)
        transaction.set_rollback(True)
    enqueue(6)  # outside of a transaction: at once
    assert numbers(inspector, held, 1) == [6]
    assert stored() == []


def test_without_a_store_a_savepoint_by_hand_is_not_seen(held: str, inspector: Inspector) -> None:
    with transaction.atomic():
        savepoint = savepoint_create()
        enqueue(1)
        transaction.savepoint_rollback(savepoint)
    assert numbers(inspector, held, 1) == [1]  # as the documentation says


def test_without_a_store_manual_transactions_are_refused(held: str) -> None:
    transaction.set_autocommit(False)
    try:
        with pytest.raises(UsageError, match=r"use transaction\.atomic\(\)"):
            enqueue(1)
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


def test_without_a_store_an_alias_stores(held: str, inspector: Inspector) -> None:
    with contextlib.suppress(KeyError), transaction.atomic(using="other"):
        enqueue(1, using="other")
        raise KeyError
    with transaction.atomic(using="other"):
        enqueue(2, using="other")
    assert numbers(inspector, held, 1) == [2]


def test_without_a_store_of_two_transactions_that_of_default_counts(
    held: str, inspector: Inspector
) -> None:
    with transaction.atomic():
        with transaction.atomic(using="other"):
            enqueue(1)
        assert inspector.all(held) == []
    assert numbers(inspector, held, 1) == [1]
    with transaction.atomic(using="other"):
        enqueue(2)
        assert inspector.all(held) == []
    assert numbers(inspector, held, 1) == [2]


def test_an_audit_event_survives_the_rollback(
    databases: str, queue: str, inspector: Inspector
) -> None:
    with transaction.atomic():
        enqueue(1)
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            enqueue(2)
        enqueue(3, using=None)
        assert numbers(inspector, queue, 1) == [3]
    assert stored() == []
