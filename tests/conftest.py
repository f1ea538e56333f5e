"""Fixtures: real brokers, and a clean process for every test."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import hypothesis
import pymysql.connections
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from outbox import Publisher, configuration, ids, surroundings
from outbox.consumers import hooks
from outbox.observer import seam
from outbox.results import results_listener
from outbox.sql import Store
from outbox.storage.notifications import listening
from outbox.telemetry import sources
from outbox.testing.broker import BrokerMissing, PrivateBroker
from outbox.testing.databases.mariadb import MariaDBMissing, PrivateMariaDB
from outbox.testing.databases.postgresql import PostgreSQLMissing, PrivatePostgreSQL
from outbox.testing.servers import ServerMissing
from outbox.unit_of_work.unit_of_work import Scope
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.pgbouncer import PrivatePgBouncer
from tests.places import Place, place_of
from tests.relaying import opened

# Properties are tried quickly by default, with the same examples each time in CI, and at length
# with HYPOTHESIS_PROFILE=thorough or --hypothesis-profile thorough.
hypothesis.settings.register_profile("quick", deadline=None)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # says that the machine is busy
)
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=2_000, print_blob=True, stateful_step_count=100
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if "CI" in os.environ else "quick")
)


_BROKERS = {"amqp_url", "outbox_broker", "private_broker", "mortal_broker", "tls_broker", "managed"}
_KINDS = {"rabbitmq", "postgresql", "mariadb", "sqlite"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for those who wait."""
    parser.addoption(
        "--short",
        action="store_true",
        help="leave out slow tests, and run each that is for several kinds of databases or brokers "
        "on one of them, which its name decides; except those of which every kind matters",
    )
    parser.addoption(
        "--half",
        action="store_true",
        help="of the tests outside tests/unit, run the half that their names decide: for a Python "
        "that is not the first one",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start a RabbitMQ or use one: those that another version may fail.

    And those on MariaDB, which show nothing of a Python version that the others don't.
    """
    if config.getoption("short"):
        _shorten(config, items)
    if config.getoption("half"):
        _keep(config, items, _is_in_half)
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = _parameters(item)
        if fixtures & _BROKERS or parameters.get("place") == "rabbitmq":
            item.add_marker("rabbitmq")
        if "mariadb" in parameters.values() or "mariadb_url" in fixtures:
            item.add_marker("one_python")


def _parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _shorten(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep of each test that is for several kinds one, and no slow ones."""
    tests: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        name, kinds = item.nodeid, ""
        if not item.get_closest_marker("every_kind"):
            for each in _parameters(item).values():
                if isinstance(each, str) and each in _KINDS:
                    name, kinds = name.replace(each, "*", 1), f"{kinds} {each}"
        tests.setdefault(name, {})[kinds] = item
    # The same in each process, whatever Python's seed for hashes is.
    kept = {
        kinds[sorted(kinds)[zlib.crc32(name.encode()) % len(kinds)]].nodeid
        for name, kinds in tests.items()
    }
    _keep(config, items, lambda item: item.nodeid in kept)


def _is_in_half(item: pytest.Item) -> bool:
    # Another bit than those that decide the kind, or each kind would be in one of the halves only.
    is_quick = item.path.is_relative_to(item.config.rootpath / "tests" / "unit")
    return is_quick or bool(zlib.crc32(item.nodeid.encode()) & 0x10000)


def _keep(
    config: pytest.Config, items: list[pytest.Item], is_kept: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[each for each in items if not is_kept(each)])
    items[:] = [each for each in items if is_kept(each)]


def _started() -> PrivateBroker:
    try:
        return PrivateBroker().start()
    except BrokerMissing as error:
        # If a broker is named explicitly, even CI skips the tests that need one they may kill.
        reason = f"{error}; or set OUTBOX_TEST_AMQP_URL to one that runs"
        if "CI" in os.environ and not os.environ.get("OUTBOX_TEST_AMQP_URL"):
            pytest.fail(reason)
        pytest.skip(reason)


def _started_postgresql() -> PrivatePostgreSQL:
    try:
        return PrivatePostgreSQL().start()
    except PostgreSQLMissing as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))


def _started_mariadb() -> PrivateMariaDB:
    # The server has no TLS, and for each connection PyMySQL would read all known certificates.
    pymysql.connections.SSL_ENABLED = False
    try:
        return PrivateMariaDB().start()
    except MariaDBMissing as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def outbox_broker() -> Iterator[PrivateBroker]:
    """The testing kit's fixture, with this project's rule for a missing server."""
    broker = _started()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def amqp_url(request: pytest.FixtureRequest) -> str:
    """A broker for all tests that leave it alive."""
    url = os.environ.get("OUTBOX_TEST_AMQP_URL")
    if url:
        return url
    broker = request.getfixturevalue("outbox_broker")
    assert isinstance(broker, PrivateBroker)
    return broker.url


@pytest.fixture(autouse=True)
def parking_queue_for_one(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where several test processes share a broker, one at a time looks into its parking queue.

    They can't have one each, since its name is fixed, and must not empty or delete it while another
    one expects events there.
    """
    url = os.environ.get("OUTBOX_TEST_AMQP_URL")
    if not url or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    module = request.module
    looks = hasattr(module, "PARKING_QUEUE") or "parked" in module.__name__
    name = f"outbox-tests-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"
    with open(Path(tempfile.gettempdir()) / name, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if looks else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="session")
def mortal_broker() -> Iterator[PrivateBroker]:
    """A broker that any test may kill, pause and start again; see ``private_broker``."""
    broker = _started()
    yield broker
    broker.stop()


@pytest.fixture
def private_broker(mortal_broker: PrivateBroker) -> PrivateBroker:
    """The mortal broker, running, even if an earlier test has killed it."""
    if not mortal_broker.running:
        mortal_broker.start()
    return mortal_broker


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PrivatePostgreSQL]:
    """A PostgreSQL server for all tests that leave it alive."""
    server = _started_postgresql()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mortal_postgresql() -> Iterator[PrivatePostgreSQL]:
    """A PostgreSQL server that a test may kill, pause and start again."""
    server = _started_postgresql()
    yield server
    server.stop()


@pytest.fixture
def postgresql_url(postgresql: PrivatePostgreSQL) -> Iterator[str]:
    """An empty PostgreSQL database that no other test uses."""
    with new_database(postgresql) as url:
        yield url


@pytest.fixture(scope="session")
def pgbouncer(postgresql: PrivatePostgreSQL) -> Iterator[PrivatePgBouncer]:
    """A pooler in front of the server of all tests."""
    try:
        pooler = PrivatePgBouncer(postgresql)
    except ServerMissing as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))
    with pooler:
        yield pooler


@pytest.fixture
def pooled_url(pgbouncer: PrivatePgBouncer, postgresql_url: str) -> str:
    """The database of ``postgresql_url``, through the pooler."""
    return make_url(postgresql_url).set(port=pgbouncer.port).render_as_string(hide_password=False)


def new_database(
    postgresql: PrivatePostgreSQL, *, template: str = "template1"
) -> AbstractContextManager[str]:
    """Create a database for a block, empty or a copy of another one; return its URL."""
    return _new_database(postgresql.url, f" TEMPLATE {template}", " WITH (FORCE)")


def new_mariadb_database(mariadb: PrivateMariaDB) -> AbstractContextManager[str]:
    """Create an empty database for a block; return its URL."""
    return _new_database(mariadb.url, "", "")


@contextlib.contextmanager
def _new_database(url: str, how_created: str, how_dropped: str) -> Iterator[str]:
    database = f"test_{uuid.uuid4().hex[:12]}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {database}{how_created}")
    yield make_url(url).set(database=database).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {database}{how_dropped}")


@pytest.fixture(scope="session")
def mariadb() -> Iterator[PrivateMariaDB]:
    """A MariaDB server for all tests that leave it alive."""
    server = _started_mariadb()
    yield server
    server.stop()


@pytest.fixture
def mariadb_url(mariadb: PrivateMariaDB) -> Iterator[str]:
    """An empty MariaDB database that no other test uses."""
    with new_mariadb_database(mariadb) as url:
        yield url


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database: each test that uses it runs on every kind.

    Modules whose tests are about what SQLAlchemy does leave MariaDB out.
    """
    return database_of_kind(request, tmp_path)


def database_of_kind(request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the URL of an empty database of the kind that the fixture's parameter names."""
    if request.param == "sqlite":
        return f"sqlite:///{folder}/events.db"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A store with its table, in each kind of database."""
    store = opened(database_url)
    yield store
    store.engine.dispose()


@pytest.fixture
def postgresql_store(postgresql_url: str) -> Iterator[Store]:
    """A store with its table, in PostgreSQL only."""
    store = opened(postgresql_url)
    yield store
    store.engine.dispose()


@pytest.fixture
def mariadb_store(mariadb_url: str) -> Iterator[Store]:
    """A store with its table, in MariaDB only."""
    store = opened(mariadb_url)
    yield store
    store.engine.dispose()


@pytest.fixture
def proxy(amqp_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of the broker, whose faults affect only this test."""
    with FaultProxy(amqp_url) as proxy:
        yield proxy


@pytest.fixture
def name() -> str:
    """A name that no other test uses, for exchanges and queues."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def inspector(amqp_url: str) -> Iterator[Inspector]:
    """An inspector of the broker, which deletes what it has declared at the end."""
    inspector = Inspector(amqp_url)
    yield inspector
    inspector.close()


@pytest.fixture
def publisher(amqp_url: str, name: str) -> Iterator[Publisher]:
    """A publisher with an exchange that no other test uses."""
    with Publisher(amqp_url, exchange=name) as publisher:
        yield publisher


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No collector, publisher, setting, observer or thread of a test remains in the next."""
    Scope.resume(None)
    ids._generator.reset()  # a test with another clock may have been years ahead
    for variable in [one for one in os.environ if one.startswith("OUTBOX_")]:
        if not variable.startswith("OUTBOX_TEST_"):
            monkeypatch.delenv(variable)
    monkeypatch.setattr(configuration, "_publisher", None)
    for names in ("_start", "_stop"):
        monkeypatch.setattr(hooks, names, [])
    monkeypatch.setattr(hooks, "_namespaces", hooks._Namespaces())
    for names in ("_known", "_gone"):  # other tests may have had a thousand queues
        monkeypatch.setattr(sources, names, {})
    monkeypatch.setattr(results_listener, "_IDLE", 0.0)
    monkeypatch.setattr(listening, "_LOOK", 0.1)
    yield
    configuration.provide(None)
    surroundings.provide(None)
    default = configuration.configured_publisher()
    if default is not None:
        default.close(0)
    assert seam.observer is None
    for thread in threading.enumerate():
        if thread.name.startswith("outbox-"):
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} was left running"


@pytest.fixture(params=["rabbitmq", "sqlite"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Place:
    """A place for events: each test that uses it runs on every transport with consumers."""
    return place_of(request.param, request, name, tmp_path)
