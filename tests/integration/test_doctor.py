"""``outbox doctor`` beside real servers: it names what is planted, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pika
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from outbox import Event, Publisher
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.doctor import database_checks
from outbox.doctor.broker_probe import BrokerProbe
from outbox.doctor.catalogue import all_checks
from outbox.doctor.examination import Diagnosis, examine
from outbox.doctor.examined import SetUp
from outbox.messages.rows import UNROUTED, values_of
from outbox.presence.announcement import encoded
from outbox.service.identity.pid_file import PidFile
from outbox.service.identity.status_file import Status, status_path
from outbox.settings import SettingOverrides, Settings
from outbox.sql import Store
from outbox.storage.engines import open_engine
from outbox.testing.broker import BrokerMissing
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.testing.servers import ServerMissing
from outbox.transports.database.presence.presence_records import DatabasePresenceRecords
from outbox.transports.rabbitmq import parameters
from outbox.url import BrokerURL
from tests.commands import run_outbox
from tests.conftest import new_database
from tests.managed_broker import ManagedBroker
from tests.pgbouncer import PrivatePgBouncer
from tests.relaying import many, opened
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

INVOICES = """
from outbox.consumers import Consumer

class Invoices(Consumer):
    queue = "invoices"
    topics = ["order.*"]
    timeout = 60
    def process(self, event):
        pass
"""

Write = Callable[[str], str]


@pytest.fixture(scope="module")
def managed() -> Iterator[ManagedBroker]:
    try:
        broker = ManagedBroker().start()
    except BrokerMissing as error:
        if "CI" in os.environ and not os.environ.get("OUTBOX_TEST_AMQP_URL"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield broker
    broker.kill()  # it has nothing to save
    broker.stop()


@pytest.fixture
def vhost(managed: ManagedBroker) -> str:
    return managed.new_vhost()


@pytest.fixture
def url(managed: ManagedBroker, vhost: str) -> str:
    return managed.url_of(vhost)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of an application, and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_module(source: str) -> str:
        name = f"app_{uuid.uuid4().hex[:8]}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write_module


def diagnose(
    url: str | None = None,
    *modules: str,
    database: str | None = None,
    management: ManagedBroker | None = None,
    **rest: Any,
) -> Diagnosis:
    return examine(
        SetUp(
            modules,
            url,
            open_engine=None if database is None else lambda: (open_engine(database), False),
            management=management.management if management is not None else "http://127.0.0.1:9",
            **rest,
        )
    )


def found(diagnosis: Diagnosis) -> list[str]:
    return [
        f"{each.check.code} {each.problem.severity}: {each.problem.text}"
        for each in diagnosis.findings
    ]


def unchecked(diagnosis: Diagnosis) -> dict[str, str]:
    return {check.code: reason for check, reason in diagnosis.not_checked}


def only(diagnosis: Diagnosis, code: str, pattern: str = "") -> str:
    """Return the one finding's remedy; it is of ``code``, and its text matches ``pattern``."""
    assert [line.split()[0] for line in found(diagnosis)] == [code], found(diagnosis)
    assert re.search(pattern, diagnosis.findings[0].problem.text), found(diagnosis)
    assert diagnosis.findings[0].remedy
    return diagnosis.findings[0].remedy


def channel_at(url: str) -> Any:
    return pika.BlockingConnection(pika.URLParameters(url)).channel()


def consumed_once(url: str, module: str) -> None:
    """Let a worker declare its queues."""
    with Publisher(url) as publisher:
        worker = Worker(load([module]), publisher=publisher)
        worker.start()
        wait_until(lambda: worker.is_consuming, 20)
        worker.stop()


# ------------------------------------------------------------------ fresh set-ups


def test_nothing_is_found_on_a_fresh_rabbitmq(
    managed: ManagedBroker, vhost: str, url: str, write: Write
) -> None:
    module = write(INVOICES)
    before = names_at(managed, vhost)
    diagnosis = diagnose(url, module, management=managed)
    assert found(diagnosis) == []
    assert names_at(managed, vhost) == before  # nothing was created
    assert {"OBX101", "OBX102", "OBX105", "OBX106", "OBX108", "OBX110", "OBX111", "OBX301"} <= {
        check.code for check in diagnosis.passed
    }
    assert unchecked(diagnosis).keys() == {
        *("OBX116", "OBX201", "OBX202", "OBX203", "OBX204", "OBX205", "OBX302")
    }

    consumed_once(url, module)
    declared = names_at(managed, vhost)
    assert {"invoices", "invoices.dead"} <= declared
    assert found(diagnose(url, module, management=managed)) == []
    assert names_at(managed, vhost) == declared


def names_at(broker: ManagedBroker, vhost: str) -> set[str]:
    script = (
        f'[element(4, N) || N <- rabbit_amqqueue:list_names(<<"{vhost}">>)] ++ '
        f'[element(4, element(2, X)) || X <- rabbit_exchange:list(<<"{vhost}">>)].'
    )
    return set(re.findall(r'<<"([^"]*)">>', broker.ctl("eval", script)))


def test_nothing_is_left_unchecked_where_all_runs(
    managed: ManagedBroker, vhost: str, url: str, write: Write, postgresql_url: str
) -> None:
    opened(postgresql_url).engine.dispose()
    module = write(INVOICES)
    with Publisher(url) as publisher:
        worker = Worker(load([module]), publisher=publisher)
        worker.start()
        wait_until(lambda: worker.is_consuming, 20)
        diagnosis = diagnose(url, module, database=postgresql_url, management=managed)
        worker.stop()
    assert found(diagnosis) == []
    assert unchecked(diagnosis) == {}
    codes = {check.code for check in all_checks()} - {
        "OBX206",
        "OBX207",
    }  # no database is the broker
    assert {check.code for check in diagnosis.passed} == codes


def test_nothing_is_found_on_a_fresh_database(database_url: str) -> None:
    store = opened(database_url)
    diagnosis = diagnose("memory://", database=database_url)
    assert [line for line in found(diagnosis) if not line.startswith("OBX101")] == []
    assert {"OBX201", "OBX202", "OBX204"} <= {check.code for check in diagnosis.passed}
    with store.engine.begin() as connection:
        store.put(many(300, "orders"), connection=connection)
    assert diagnose("memory://", database=database_url).worst() == "warning"  # of memory:// alone
    store.engine.dispose()


def test_nothing_is_found_on_a_fresh_sqlite_broker(tmp_path: Path, write: Write) -> None:
    url, module = f"sqlite:///{tmp_path}/broker.db", write(INVOICES)
    assert found(diagnose(url, module)) == []
    assert not (tmp_path / "broker.db").exists()
    consumed_once(url, module)
    diagnosis = diagnose(url, module)
    assert found(diagnosis) == []
    assert {"OBX101", "OBX107", "OBX109", "OBX206", "OBX301"} <= {
        check.code for check in diagnosis.passed
    }


# ------------------------------------------------------------------ settings and the connection


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OUTBOX_URL" in only(diagnose(), "OBX101", "no broker is known")
    only(diagnose("http://rabbit"), "OBX101", "scheme 'http'")
    arguments = ["outbox", "doctor", "--url", "amqp://shop:hunter2@rabbit/"]
    diagnosis = diagnose(arguments=arguments)
    assert re.search("holds a password", found(diagnosis)[0])
    assert "hunter2" not in "".join(found(diagnosis))
    monkeypatch.setenv("OUTBOX_HEARTBEAT", "often")
    only(diagnose("amqp://rabbit"), "OBX101", "OUTBOX_HEARTBEAT")


def test_what_cannot_be_looked_at_never_counts_as_passed() -> None:
    diagnosis = diagnose()
    assert {check.code for check in diagnosis.passed} <= {"OBX303"}
    codes = [check.code for check in all_checks()]
    assert len(codes) == 26
    assert set(codes) - {"OBX101", "OBX303"} == unchecked(diagnosis).keys() - {"OBX303"}


def test_a_broker_out_of_reach_is_named() -> None:
    only(diagnose("amqp://127.0.0.1:9"), "OBX102", "127.0.0.1:9 cannot be reached")
    only(diagnose("amqp://no-such-host.invalid"), "OBX102", "does not resolve")


@pytest.mark.slow
def test_tls_on_a_plain_port_is_named(url: str) -> None:
    only(diagnose(url.replace("amqp:", "amqps:")), "OBX102", "does not speak TLS")


def test_a_refused_user_and_a_missing_vhost_are_named(url: str) -> None:
    remedy = only(diagnose(url.replace("guest:guest", "guest:wrong")), "OBX103", "refused the user")
    assert "rabbitmqctl" in remedy
    only(diagnose(f"{url}-not"), "OBX103", "vhost")


def test_credentials_come_from_the_applications_function(
    managed: ManagedBroker, vhost: str, write: Write
) -> None:
    able = BrokerURL.parse(managed.new_user(vhost))
    url = f"amqp://127.0.0.1:{managed.port}/{vhost}"
    management = f"http://127.0.0.1:{managed.management_port}"

    def diagnosed(password: str) -> Diagnosis:
        settings: SettingOverrides = {"credentials": lambda: (able.user, password)}
        return examine(SetUp(url=url, settings=settings, management=management))

    diagnosis = diagnosed("secret")
    assert found(diagnosis) == []
    assert "OBX112" in [check.code for check in diagnosis.passed]
    only(diagnosed("wrong"), "OBX103", "refused the user")


def test_heartbeats_and_sizes_are_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_HEARTBEAT", "0")
    only(diagnose(url), "OBX114", "no heartbeats")
    monkeypatch.setenv("OUTBOX_HEARTBEAT", "300")
    only(diagnose(url), "OBX114", "300 s")
    monkeypatch.delenv("OUTBOX_HEARTBEAT")
    monkeypatch.setenv("OUTBOX_MAX_BODY_BYTES", str(512 * 1024 * 1024))
    only(diagnose(url), "OBX115", "536,870,912")


# ------------------------------------------------------------------ permissions and queues


@pytest.mark.parametrize("exists", [False, True], ids=["before", "after"])
def test_missing_permissions_are_named(
    managed: ManagedBroker, vhost: str, url: str, write: Write, exists: bool
) -> None:
    module = write(INVOICES)
    if exists:
        consumed_once(url, module)
    unable = managed.new_user(vhost, configure="^$")
    diagnosis = diagnose(unable, module, management=managed)
    assert {line.split(":")[1] for line in found(diagnosis)} == {" no configure permission"}
    assert {line.split()[0] for line in found(diagnosis)} == {"OBX105"}
    for name in ("invoices", "invoices.dead", "outbox", "outbox.unroutable"):
        assert any(f"'{name}' in vhost" in line for line in found(diagnosis))

    unable = managed.new_user(vhost, write="^invoices")
    lines = found(diagnose(unable, module, management=managed))
    refused = [re.search(r"no write permission: .* exchange '(.*?)'", line) for line in lines]
    assert [match and match[1] for match in refused] == ["outbox", "amq.default"], lines

    unable = managed.new_user(vhost, read="^$")
    texts = found(diagnose(unable, module, management=managed))
    assert any("no read permission" in line and "'invoices'" in line for line in texts), texts
    assert any("read or write" in line and "'outbox'" in line for line in texts), texts


def test_looking_neither_takes_nor_sends_messages(
    managed: ManagedBroker, vhost: str, url: str, write: Write
) -> None:
    module = write(INVOICES)
    consumed_once(url, module)
    channel = channel_at(url)
    channel.queue_declare("everything", durable=True)
    channel.queue_bind("everything", "outbox", "#")
    channel.basic_publish("", "invoices", b"{}")
    wait_until(lambda: ready(channel, "invoices") == 1, 10)
    probe = BrokerProbe.open(BrokerURL.parse(url), Settings.load(url, {}))
    assert probe.may_consume("invoices") is probe.may_bind("invoices", "outbox") is None
    probe.close()
    diagnose(url, module, management=managed)
    assert ready(channel, "everything") == 0
    [method, _, body] = channel.basic_get("invoices", auto_ack=True)
    assert (method.redelivered, body) == (False, b"{}")
    channel.connection.close()


def ready(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def test_other_arguments_are_named(url: str, write: Write) -> None:
    channel = channel_at(url)
    channel.queue_declare("invoices", durable=True, arguments={"x-queue-type": "classic"})
    channel.connection.close()
    remedy = only(diagnose(url, write(INVOICES)), "OBX106", "'invoices'.*x-")
    assert "delete" in remedy


def test_another_kind_of_exchange_is_named(url: str) -> None:
    channel = channel_at(url)
    channel.exchange_declare("outbox", "direct", durable=True)
    channel.connection.close()
    only(diagnose(url), "OBX106", "the exchange 'outbox'.*type")


def test_what_must_exist_and_does_not_is_named(
    url: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DECLARE", "passive")
    lines = found(diagnose(url, write(INVOICES)))
    assert len(lines) == 3
    assert all(re.match("OBX106 error: .*does not exist", line) for line in lines)


def test_messages_without_a_consumer_are_named(
    managed: ManagedBroker, url: str, write: Write
) -> None:
    module = write(INVOICES)
    consumed_once(url, module)
    channel = channel_at(url)
    channel.queue_declare("forgotten", durable=True)
    channel.queue_bind("forgotten", "outbox", "order.*")
    channel.confirm_delivery()
    channel.basic_publish("outbox", "order.placed", b"{}")
    channel.connection.close()
    lines = found(diagnose(url, module, management=managed))
    assert lines == [
        "OBX107 warning: 1 message wait in 'invoices', and no worker consumes it",
        "OBX107 warning: 1 message wait in 'forgotten', which no consumer of these modules has",
    ]
    # Without the API, other queues are unknown.
    diagnosis = diagnose(url, module)
    assert len(found(diagnosis)) == 1
    assert "management" in unchecked(diagnosis)["OBX107"]


def test_workers_of_different_versions_are_named(
    managed: ManagedBroker, url: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write(INVOICES)
    with contextlib.ExitStack() as stack:
        for version in ("1.4.0", "1.5.0", "1.5.0"):
            monkeypatch.setattr(parameters, "installed_version", partial(str, version))
            publisher = stack.enter_context(Publisher(url))
            worker = Worker(load([module]), publisher=publisher)
            worker.start()
            stack.callback(worker.stop)

        def is_known() -> bool:  # to the API, which learns of consumers a moment later
            lines = found(diagnose(url, module, management=managed))
            return any("1.5.0 (2)" in line for line in lines)

        wait_until(is_known, 30)
        only(
            diagnose(url, module, management=managed),
            "OBX302",
            r"of 'invoices' have different versions of outbox: 1.4.0 \(1\), 1.5.0 \(2\)",
        )
        assert "management" in unchecked(diagnose(url, module))["OBX302"]


def test_a_database_knows_the_workers_that_have_announced_themselves(
    postgresql_url: str, write: Write
) -> None:
    opened(postgresql_url).engine.dispose()
    url = postgresql_url.replace("+psycopg", "")
    first, second = write(INVOICES), write(INVOICES.replace("invoices", "receipts"))
    records = DatabasePresenceRecords(BrokerURL.parse(url))

    def workers_of(modules: Sequence[str]) -> list[str]:
        lines = found(diagnose(url, *modules))
        return [line for line in lines if line.startswith("OBX302")]

    def announce(process: str, kind: str, version: str, *queues: str) -> None:
        own = {"process": process, "kind": kind, "interval": 30.0, "outbox": version}
        records.write(process, encoded({**own, "phase": "ready"}, queues).decode())

    assert "no worker of these modules" in unchecked(diagnose(url, first))["OBX302"]
    announce("a", "worker", "1.5.0", "invoices")
    announce("b", "relay", "1.4.0")
    assert workers_of([first]) == []
    [line] = workers_of([first, second])
    assert "no worker consumes 'receipts'" in line
    announce("c", "worker", "1.4.0", "invoices")
    [line] = workers_of([first])
    assert line.endswith("have different versions of outbox: 1.4.0 (1), 1.5.0 (1)")


def test_a_queue_without_a_worker_beside_others_is_named(url: str, write: Write) -> None:
    first = write(INVOICES)
    second = write(INVOICES.replace("invoices", "receipts"))
    consumed_once(url, second)
    with Publisher(url) as publisher:
        worker = Worker(load([first]), publisher=publisher)
        worker.start()
        wait_until(lambda: worker.is_consuming, 20)
        assert found(diagnose(url, first)) == []
        only(diagnose(url, first, second), "OBX302", "'receipts'")
        worker.stop()


def test_old_bindings_are_named(managed: ManagedBroker, url: str, write: Write) -> None:
    consumed_once(url, write(INVOICES.replace('"order.*"', '"order.*", "refund.#"')))
    diagnosis = diagnose(url, write(INVOICES), management=managed)
    only(diagnosis, "OBX108", "'invoices' is bound to 'outbox' with 'refund.#'")


@pytest.mark.slow
def test_dead_letters_and_parked_events_are_named(url: str, write: Write) -> None:
    module = write(INVOICES)
    consumed_once(url, module)
    with Publisher(url) as publisher:
        event = Event(id="1", target="no.queue", exchange="outbox", body=b"")
        chunk = publisher.prepare([event], keep=False)
        publisher.hand_in(chunk)
        assert chunk.future.result(10).parked
    channel = channel_at(url)
    channel.confirm_delivery()
    channel.basic_publish("", "invoices.dead", b"{}")
    channel.connection.close()
    lines = found(diagnose(url, module))
    assert lines == [
        "OBX109 warning: 1 event without a queue in 'outbox.unroutable'",
        "OBX109 warning: 1 dead letter in 'invoices.dead'",
    ]


@pytest.mark.parametrize("exists", [False, True], ids=["before", "after"])
def test_policies_that_clash_are_named(
    managed: ManagedBroker, vhost: str, url: str, write: Write, exists: bool
) -> None:
    module = write(INVOICES)
    managed.give_policy(vhost, "^invoices$", delivery_limit=5)
    managed.give_policy(vhost, "dead$", max_length=100)
    if exists:
        consumed_once(url, module)
    # The API's numbers are some seconds old.
    wait_until(lambda: len(found(diagnose(url, module, management=managed))) == 2, 20)
    assert found(diagnose(url, module, management=managed)) == [
        "OBX110 warning: a policy gives 'invoices' delivery-limit 5, which gives up messages that "
        "came back a few times, beside the retry policy",
        "OBX110 warning: a policy gives 'invoices.dead' max-length 100 without overflow "
        "reject-publish, so that its oldest messages are dropped",
    ]


def test_an_alarm_is_named(managed: ManagedBroker, url: str) -> None:
    managed.ctl("eval", "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).")
    try:
        only(diagnose(url), "OBX111", "takes no messages: low on memory")
    finally:
        managed.ctl("eval", "rabbit_alarm:clear_alarm({resource_limit, memory, node()}).")
    assert found(diagnose(url)) == []


def test_a_handler_that_outlasts_the_brokers_patience_is_named(url: str, write: Write) -> None:
    module = write(INVOICES.replace("timeout = 60", "timeout = 7200"))
    only(diagnose(url, module), "OBX113", "Invoices may take 7200 s.*after 1800 s")


def test_a_timeout_of_a_policy_is_named(
    managed: ManagedBroker, vhost: str, url: str, write: Write
) -> None:
    probe = BrokerProbe.open(BrokerURL.parse(url), Settings.load(url, {}))
    version = probe.version
    probe.close()
    if version < (3, 12):
        pytest.skip("a policy can't set it before RabbitMQ 3.12")
    managed.give_policy(vhost, "^inv", consumer_timeout=30_000)
    diagnosis = diagnose(url, write(INVOICES), management=managed)
    only(diagnosis, "OBX113", "Invoices may take 60 s, but a policy closes its channel after 30 s")


# ------------------------------------------------------------------ databases


def run_sql(url: str, *statements: str) -> None:
    engine = create_engine(open_engine(url).url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def of_database(url: str) -> Diagnosis:
    checks = [check for check in all_checks() if check.code.startswith("OBX2")]
    return examine(SetUp(open_engine=lambda: (open_engine(url), False)), checks)


def test_missing_tables_columns_and_indexes_are_named(database_url: str, tmp_path: Path) -> None:
    lines = found(of_database(database_url))
    if database_url.startswith("sqlite"):
        assert re.match("OBX201 error: there is no file", lines[0])
        assert not list(tmp_path.iterdir())
    else:
        assert "OBX201 error: there is no table outbox_events" in lines
    opened(database_url).engine.dispose()
    run_sql(database_url, "ALTER TABLE outbox_events DROP COLUMN reason")
    only(of_database(database_url), "OBX201", "no column reason")


def test_a_database_out_of_reach_is_named() -> None:
    only(of_database("postgresql://x:secret@127.0.0.1:9/x"), "OBX201", "cannot be reached")


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mariadb+pymysql"])
def test_a_database_that_does_not_answer_is_waited_for_once(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.doctor.examined._DATABASE_ANSWERS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        diagnosis = of_database(f"{driver}://x:y@127.0.0.1:{silent.getsockname()[1]}/x")
    only(diagnosis, "OBX201", "cannot be reached: no answer within")
    assert time.monotonic() - began < 5


def test_a_backlog_and_dead_relays_are_named(store: Store, database_url: str) -> None:
    store.put(many(2, "orders"))
    run_sql(database_url, "UPDATE outbox_events SET dead_at = available_at WHERE seq > 1")
    past = {"p": "now() - interval '2 hours'", "m": "utc_timestamp() - interval 2 hour"}.get(
        database_url[0], "available_at - 7200"
    )
    run_sql(database_url, f"UPDATE outbox_events SET available_at = {past}")
    remedy = only(of_database(database_url), "OBX202", "due for 2 hours: no relay publishes it")
    assert "outbox relay" in remedy
    run_sql(database_url, "UPDATE outbox_events SET lease_token = 'x'")
    only(of_database(database_url), "OBX202", "lease of a stored event ended 2 hours ago")
    # Dead rows are counted with the dead letters.
    dead = [check for check in all_checks() if check.code == "OBX109"]
    set_up = SetUp(url="memory://", open_engine=lambda: (store.engine, True))
    assert found(examine(set_up, dead)) == ["OBX109 warning: 1 stored event is dead"]


def test_what_keeps_vacuum_from_its_work_is_named(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(postgresql_url)
    run_sql(postgresql_url, "ALTER TABLE outbox_events SET (autovacuum_enabled = false)")
    only(of_database(postgresql_url), "OBX203", "autovacuum is off for the table")
    run_sql(postgresql_url, "ALTER TABLE outbox_events RESET (autovacuum_enabled)")
    assert found(of_database(postgresql_url)) == []
    monkeypatch.setattr(database_checks, "_LONG_TRANSACTION", 0.0)
    with store.engine.begin() as connection:
        connection.execute(text("SELECT 1 FROM outbox_events"))
        remedy = only(of_database(postgresql_url), "OBX203", r"a transaction of \d+ seconds")
    assert "pg_terminate_backend" in remedy
    store.engine.dispose()


def test_the_database_may_be_read_only(postgresql_url: str) -> None:
    opened(postgresql_url).engine.dispose()
    name = postgresql_url.rpartition("/")[2]
    run_sql(postgresql_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    diagnosis = of_database(postgresql_url)
    assert found(diagnosis) == []
    assert {"OBX201", "OBX202", "OBX203", "OBX204", "OBX205"} <= {
        check.code for check in diagnosis.passed
    }


def test_an_index_that_claims_cannot_use_is_named(store: Store, database_url: str) -> None:
    on = " ON outbox_events" if database_url[0] == "m" else ""
    run_sql(
        database_url,
        f"DROP INDEX outbox_events_due{on}",
        "CREATE INDEX outbox_events_due ON outbox_events (stored_at)",
    )
    with store.engine.begin() as connection:
        store.put(many(500, "orders"), connection=connection)
    remedy = only(of_database(database_url), "OBX204", "outbox_events_due")
    assert "outbox sql create" in remedy


def test_an_index_that_was_never_finished_is_named(postgresql_url: str) -> None:
    opened(postgresql_url).engine.dispose()
    run_sql(
        postgresql_url,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'outbox_events_due'::regclass",
    )
    only(of_database(postgresql_url), "OBX204", "missing or invalid")


def test_a_pooler_in_transaction_mode_is_noted(postgresql: PrivatePostgreSQL) -> None:
    try:
        pooler = PrivatePgBouncer(postgresql)
    except ServerMissing as error:
        pytest.skip(str(error))
    with pooler, new_database(postgresql) as url:
        opened(url).engine.dispose()
        pooled = url.replace(f":{postgresql.port}/", f":{pooler.port}/")
        remedy = only(of_database(pooled), "OBX205", "pooler in transaction mode")
        assert "--listen" in remedy
        name = url.rpartition("/")[2]
        level = "default_transaction_isolation = 'serializable'"
        run_sql(url, f"ALTER DATABASE {name} SET {level}")
        only(of_database(url), "OBX205", "SERIALIZABLE")


@pytest.mark.slow
def test_stored_events_in_other_tables_than_the_queues_are_named(
    postgresql: PrivatePostgreSQL, postgresql_url: str, write: Write
) -> None:
    module = write(INVOICES)
    store = opened(postgresql_url)
    consumed_once(postgresql_url, module)
    with new_database(postgresql) as elsewhere:
        other = opened(elsewhere)
        for url, is_named in ((postgresql_url, False), (elsewhere, True)):
            diagnosis = diagnose(postgresql_url, module, database=url)
            named = [line for line in found(diagnosis) if line.startswith("OBX207 note")]
            assert bool(named) == is_named, found(diagnosis)
            assert "OBX207" not in unchecked(diagnosis)
        other.engine.dispose()
    store.put_rows([values_of(event, queue=UNROUTED) for event in many(2, "orders")])
    assert any(
        re.search("2 stored events wait for their queues in 'outbox.unrouted'", line)
        for line in found(diagnose(postgresql_url, module, database=postgresql_url))
    )
    store.engine.dispose()


def test_sqlite_files_that_cannot_work_are_named(tmp_path: Path, write: Write) -> None:
    url, module = f"sqlite:///{tmp_path}/broker.db", write(INVOICES)
    consumed_once(url, module)
    run_sql(url, "SELECT 1")
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("PRAGMA journal_mode=DELETE"))
    remedy = only(diagnose(url, module), "OBX206", "the journal of .* is delete, not WAL")
    assert "journal_mode=WAL" in remedy
    if os.geteuid() == 0:
        os.chown(tmp_path / "broker.db", 12345, -1)
        assert any("belongs to another user" in line for line in found(diagnose(url, module)))
    only(diagnose(f"sqlite:///{tmp_path}/none/broker.db", module), "OBX206", "no folder")


# ------------------------------------------------------------------ code and the machine


def test_deduplication_without_a_database_is_named(url: str, write: Write) -> None:
    source = INVOICES.replace("timeout = 60", "timeout = 60\n    deduplicate = True")
    remedy = only(diagnose(url, write(source)), "OBX301", "deduplicates, which needs a database")
    assert "OUTBOX_DATABASE_URL" in remedy


@pytest.mark.slow
def test_what_services_have_left_is_named(tmp_path: Path, write: Write) -> None:
    folder, module = tmp_path / "run", write(INVOICES)
    folder.mkdir(0o700)
    variables = {"OUTBOX_URL": f"sqlite:///{tmp_path}/x.db", "OUTBOX_PID_DIR": str(folder)}

    def lines() -> list[str]:
        done = run_outbox("doctor", module, "--json", variables=variables, cwd=tmp_path)
        findings = json.loads(done.stdout)["findings"]
        return [f"{each['code']} {each['severity']}: {each['text']}" for each in findings]

    pid_file = PidFile(folder, "mails")
    pid_file.take()
    status = Status("mails", os.getpid(), (), str(tmp_path), phase="ready", ready=True)
    path = status_path(folder, "mails", pid_file.key)
    status.write(path)
    assert lines() == []

    (folder / "outbox-old.pid").write_text("1\n")
    with (folder / "outbox-old.log").open("wb") as log:
        log.truncate(3 * 2**30)
    dataclasses.replace(status, phase="given up", reasons=("never ready",)).write(path)
    assert lines() == [
        f"OBX303 warning: the pid file {folder}/outbox-old.pid is stale: the process that wrote it "
        "has died",
        "OBX303 error: the service 'mails' has given up: never ready",
        f"OBX303 warning: the log {folder}/outbox-old.log has 3.0 GiB",
    ]
    pid_file.close()
    folder.chmod(0o777)
    assert re.search("may be written to by other users", "".join(lines()))


# ------------------------------------------------------------------ the command


def test_the_command_reports_as_text_and_json(url: str, write: Write, tmp_path: Path) -> None:
    module = write(INVOICES.replace("timeout = 60", "timeout = 7200"))
    done = run_outbox("doctor", module, variables={"OUTBOX_URL": url}, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "OBX113 warning: the consumer Invoices may take 7200 s" in done.stdout
    assert "docs/doctor.md#obx113" in done.stdout
    assert re.search(r"^not checked: OBX201, .*: no database is named", done.stdout, re.MULTILINE)
    assert re.search(r"^1 found, \d+ checks passed, \d+ not made", done.stdout, re.MULTILINE)

    options = ("--json", "--fail-on", "error")
    done = run_outbox("doctor", module, *options, variables={"OUTBOX_URL": url}, cwd=tmp_path)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert [each["code"] for each in report["findings"]] == ["OBX113"]
    assert report["findings"][0].keys() == {
        *("code", "severity", "title", "text", "remedy", "docs")
    }
    assert run_outbox("doctor", "--fail-on", "never").returncode == 2


def test_the_limit_of_open_files_is_named(write: Write, tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); "
        "from outbox.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", write(INVOICES), "--json"],
        cwd=tmp_path,
        env={**os.environ, "OUTBOX_URL": f"sqlite:///{tmp_path}/x.db"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    codes: Sequence[str] = [each["code"] for each in json.loads(done.stdout)["findings"]]
    assert codes == ["OBX303"]
