"""The tables: their identity, and how an earlier version's are completed."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, inspect, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import outbox.sql
from outbox import UsageError, configure, enqueue_event
from outbox.doctor.database_checks import CHECKS
from outbox.doctor.examination import examine
from outbox.doctor.examined import SetUp
from outbox.event import Event
from outbox.sql import Store
from outbox.storage.creating import database_id, ddl, upgrade
from outbox.storage.engines import open_engine
from outbox.storage.floors import Floors
from outbox.storage.grants import grants
from outbox.storage.transactions import own_transaction
from outbox.transports.database import routing

ADDED = ["outbox_events_heads", "outbox_events_tasks", "outbox_events_unkeyed"]
ADDED_TABLES = [
    "outbox_bindings",
    "outbox_meta",
    "outbox_presence",
    "outbox_published",
    "outbox_recurring",
]
ADDED_WITH_CONDITION = ["outbox_events_dead"]  # there is none on MariaDB
ADDED_WITH_TABLES = ["outbox_published_kept"]  # an index


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def id_of(engine: Engine) -> str | None:
    with own_transaction(engine) as connection:
        return database_id(connection)


def added_indexes(engine: Engine) -> list[str]:
    return ADDED if engine.dialect.name == "mariadb" else ADDED + ADDED_WITH_CONDITION


def make_earlier(engine: Engine, schema: str = "") -> None:
    """Leave what the first version had."""
    Store(engine).create()
    with engine.begin() as connection:
        for name in added_indexes(engine):
            where = " ON outbox_events" if engine.dialect.name == "mariadb" else ""
            connection.exec_driver_sql(f"DROP INDEX {schema}{name}{where}")
        for name in ADDED_TABLES:
            connection.exec_driver_sql(f"DROP TABLE {schema}{name}")


def test_a_database_keeps_one_id_whatever_creates_its_tables(
    engine: Engine, database_url: str
) -> None:
    assert id_of(engine) is None
    Store(engine).create()
    made = id_of(engine)
    assert made
    Store(engine).create()
    upgrade(engine)
    other = open_engine(database_url)
    assert id_of(other) == made
    other.dispose()
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM outbox_meta"))  # as after a migration of Alembic's
    assert id_of(engine) is None
    Store(engine).create()
    assert id_of(engine) not in (None, made)


@pytest.mark.parametrize("way", ["ddl", "create_all", "copied"])
def test_the_row_with_the_id_is_written_by_all_that_creates_the_tables(
    engine: Engine, way: str
) -> None:
    with engine.begin() as connection:
        if way == "ddl":
            for statement in filter(str.strip, ddl(engine.dialect.name).split(";\n")):
                connection.exec_driver_sql(statement)
        elif way == "create_all":
            outbox.sql.metadata.create_all(connection)
        else:
            copies = outbox.sql.metadata_of(engine.dialect.name)
            copies.create_all(connection)
    assert id_of(engine)


def test_an_upgrade_completes_the_tables_and_only_those_that_are_there(engine: Engine) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        upgrade(engine)
    make_earlier(engine)
    assert sorted(upgrade(engine)) == sorted(
        added_indexes(engine) + ADDED_TABLES + ADDED_WITH_TABLES
    )
    Store(engine).check(complete=True)
    assert id_of(engine)
    assert upgrade(engine) == []


def test_an_upgrade_on_postgresql_keeps_no_writer_waiting(postgresql_url: str) -> None:
    engine = open_engine(postgresql_url)
    make_earlier(engine)
    store = Store(engine)
    with engine.begin() as connection:  # what was left by an upgrade that was cut off
        connection.exec_driver_sql(
            "CREATE INDEX outbox_events_heads ON outbox_events (queue, key, seq) "
            "WHERE key IS NOT NULL AND dead_at IS NULL"
        )
        connection.exec_driver_sql(
            "UPDATE pg_index SET indisvalid = false "
            "WHERE indexrelid = 'outbox_events_heads'::regclass"
        )
    added: list[str] = []
    upgrading = threading.Thread(target=lambda: added.extend(upgrade(engine)))
    with engine.connect() as connection:
        transaction = connection.begin()
        store.put([Event("1", "a", "shop", b"")], connection=connection)
        upgrading.start()  # waits for that transaction
        deadline = time.monotonic() + 10
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            "AND datname = current_database() AND query LIKE '% INDEX CONCURRENTLY %'"
        )
        with engine.connect() as other:
            while not other.execute(waiting).scalar():
                assert time.monotonic() < deadline
                other.rollback()
        began = time.monotonic()
        store.put([Event("2", "a", "shop", b"")])
        assert time.monotonic() - began < 1
        assert upgrading.is_alive()
        transaction.commit()
    upgrading.join(20)
    assert sorted(added) == sorted(added_indexes(engine) + ADDED_TABLES + ADDED_WITH_TABLES)
    with engine.connect() as connection:
        invalid = text("SELECT count(*) FROM pg_index WHERE NOT indisvalid")
        assert connection.execute(invalid).scalar() == 0
    engine.dispose()


def test_postgresql_vacuums_the_table_often_unless_it_was_set_otherwise(
    postgresql_url: str,
) -> None:
    engine = open_engine(postgresql_url)
    Store(engine).create()
    options = text("SELECT reloptions FROM pg_class WHERE relname = 'outbox_events'")
    with engine.connect() as connection:
        assert connection.execute(options).scalar() == [
            "autovacuum_vacuum_scale_factor=0",
            "autovacuum_vacuum_threshold=10000",
        ]
        connection.exec_driver_sql("ALTER TABLE outbox_events SET (autovacuum_vacuum_threshold=5)")
        connection.commit()
    Store(engine).create()
    upgrade(engine)
    with engine.connect() as connection:
        assert "autovacuum_vacuum_threshold=5" in connection.execute(options).scalar_one()
    engine.dispose()


def test_a_task_is_found_by_its_index(engine: Engine) -> None:
    from outbox.storage import task_statements

    store = Store(engine)
    store.create()
    store.put([Event(str(n), "a", "shop", b"", headers={"outbox-task": "t"}) for n in range(500)])
    store.put([Event(f"o{n}", "a", "shop", b"") for n in range(2000)])
    assert task_statements.count_waiting(engine, "7") == 1
    word = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    if engine.dialect.name == "postgresql":  # without statistics it takes the table for small
        with engine.begin() as connection:
            connection.exec_driver_sql("ANALYZE outbox_events")
    for query in (
        outbox.sql.events.select().where(task_statements._waits("7")),
        task_statements._page(("7", 7), 20),
    ):
        statement = str(query.compile(engine, compile_kwargs={"literal_binds": True}))
        with engine.connect() as connection:
            plan = connection.exec_driver_sql(f"{word} {statement}").all()
        assert "outbox_events_tasks" in str(plan)
    assert sorted(row.id for row in task_statements.waiting_tasks(engine)) == sorted(
        str(number) for number in range(500)
    )
    assert len(task_statements.delete_waiting(engine, "7")) == 1


def test_a_role_that_owns_no_table_may_run_create_when_nothing_is_missing(
    postgresql_url: str,
) -> None:
    owner = open_engine(postgresql_url)
    Store(owner).create()
    role = f"reader_{uuid.uuid4().hex[:12]}"
    with owner.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE outbox_events "
            "RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold)"
        )
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
        connection.exec_driver_sql(f"GRANT SELECT ON outbox_meta TO {role}")
    other = open_engine(make_url(postgresql_url).set(username=role))
    try:
        assert not Store(other).create()
    finally:
        other.dispose()
        with owner.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        owner.dispose()


def test_the_tables_can_be_in_a_schema_that_the_url_names(postgresql_url: str) -> None:
    separator = "&" if "?" in postgresql_url else "?"
    engine = open_engine(f"{postgresql_url}{separator}schema=Events")
    store = Store(engine)
    with pytest.raises(UsageError, match="does not exist"):
        store.check()
    assert store.create()
    store.check(complete=True)
    store.put([Event(str(n), "a", "shop", b"", key="k") for n in range(10)])
    first = store.claim(3, ordered=True, floors=Floors())
    assert [row.event.id for row in first] == ["0", "1", "2"]
    assert store.complete(first) == 3
    assert store.status().waiting == 7
    assert store.due_in([""], floors=Floors()) == pytest.approx(0, abs=60)
    assert id_of(engine)
    diagnosis = examine(SetUp(open_engine=lambda: (engine, True)), CHECKS)
    assert [each.problem.text for each in diagnosis.findings] == []
    plain = open_engine(postgresql_url)
    assert inspect(plain).get_table_names() == []
    make_earlier(engine, '"Events".')
    assert sorted(upgrade(engine)) == sorted(
        added_indexes(engine) + ADDED_TABLES + ADDED_WITH_TABLES
    )
    for each in (plain, engine):
        each.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "mariadb://u:secret@h/d?schema=x",
        "postgresql://u:secret@h/d?schema=x&schema=y",
        "sqlite:///x?schema=x",
    ],
)
def test_a_schema_is_refused_where_there_is_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"schema|options") as caught:
        open_engine(url)
    assert "secret" not in str(caught.value)


@pytest.fixture
def roles(database_url: str) -> Iterator[tuple[str, str]]:
    """Two new roles, or users of MariaDB, which may log in and nothing else."""
    names = [f"{kind}_{uuid.uuid4().hex[:12]}" for kind in ("app", "worker")]
    engine = open_engine(database_url)
    with engine.begin() as connection:
        for name in names:
            if engine.dialect.name == "mariadb":
                connection.exec_driver_sql(f"CREATE USER {name}@'%%'")
            else:
                connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    yield names[0], names[1]
    with engine.begin() as connection:
        for name in names:
            if engine.dialect.name == "mariadb":
                connection.exec_driver_sql(f"DROP USER {name}@'%%'")
            else:
                connection.exec_driver_sql(f"DROP OWNED BY {name}")
                connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_roles_with_the_printed_grants_can_do_their_work(
    database_url: str, roles: tuple[str, str]
) -> None:
    owner = open_engine(database_url)
    Store(owner).create()
    with owner.begin() as connection:
        for statement in grants(owner.dialect.name, *roles):
            connection.exec_driver_sql(statement)
    app, worker = (open_engine(make_url(database_url).set(username=name)) for name in roles)
    configure("memory://", after_commit="nothing")
    with Session(app) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    with app.begin() as connection:
        enqueue_event(2, "a", connection=connection)
    Store(app).put([Event(str(n), "a", "shop", b"") for n in range(10)])
    assert id_of(app) == id_of(owner)
    with pytest.raises(DBAPIError):
        Store(app).claim(1)
    store = Store(worker)
    store.check()
    rows = store.claim(12, floors=Floors())
    assert store.release(rows[:2]) == 2
    assert store.complete(rows[2:]) == 10
    store.put([Event(str(n), "a", "shop", b"") for n in range(10)])
    assert store.status().waiting == 12
    with worker.begin() as connection:
        routing.add(connection, [routing.of_queue("q")])
    with app.begin() as connection:
        assert routing.load(connection) == [routing.of_queue("q")]
    for engine in (owner, app, worker):
        engine.dispose()


def test_grants_name_what_they_are_for_and_quote_it() -> None:
    lines = grants("postgresql", 'ap"p', "Worker", "Events")
    assert lines[0] == 'GRANT USAGE ON SCHEMA "Events" TO "ap""p"'
    assert 'GRANT INSERT, SELECT (seq) ON "Events".outbox_events TO "ap""p"' in lines
    assert 'GRANT SELECT, INSERT, UPDATE, DELETE ON "Events".outbox_inbox TO "Worker"' in lines
    lines = grants("mysql", "app@10.0.%", None, "shop")
    assert "GRANT SELECT ON shop.outbox_meta TO 'app'@'10.0.%'" in lines
    with pytest.raises(UsageError, match="no roles"):
        grants("sqlite", "app", None)
    with pytest.raises(UsageError, match="--role"):
        grants("postgresql", None, None)


def test_an_error_of_the_database_names_no_payload_or_header(engine: Engine) -> None:
    Store(engine).create()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX only_one ON outbox_events (type)")
    secret = Event("1", "a", "shop", b"s3cret", key="s3cret", headers={"h": "s3cret"})
    for count in (2, 20):
        with pytest.raises(DBAPIError) as caught:
            Store(engine).put([secret] * count)
        assert "s3cret" not in str(caught.value)
