"""Methods of models that are called later, and models as arguments."""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import django
import pytest
from django.apps import apps
from django.db import connections, transaction
from django.db.migrations.state import ProjectState
from django.db.models.signals import post_save
from django.test.utils import setup_test_environment, teardown_test_environment

from outbox import InvalidEvent, UsageError, enqueue_event
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.consumers.outcome import Again, Dead
from outbox.django.checking import check_settings
from outbox.django.models import StoredEvent
from outbox.messages.headers import TASK
from outbox.tasks import ResultTimeout, TaskFailed, later, options, schedule
from outbox.testing import CollectedEvents
from tests.django.shop import models as shop
from tests.django.shop.models import Order, Parcel, noted

pytestmark = pytest.mark.usefixtures("databases")
# What a test is about that runs on one database alone doesn't depend on the database.
on_sqlite = pytest.mark.parametrize("databases", ["sqlite"], indirect=True)


@pytest.fixture(autouse=True)
def nothing_noted() -> None:
    noted.clear()


def arguments() -> list[Any]:
    """The arguments of the only call that is stored."""
    [event] = StoredEvent.objects.all()
    args: list[Any] = json.loads(event.payload)["args"]
    return args


def delivered(collected_events: CollectedEvents) -> list[Any]:
    return [each.outcome for each in collected_events.deliver(raise_errors=False)]


def test_methods_run_in_a_transaction_that_is_committed(collected_events: CollectedEvents) -> None:
    with transaction.atomic():
        order, parcel = Order.objects.create(number=1), Parcel.objects.create()
        later(order.ship, parcel, fast=True)
    lost = Order.objects.create(number=5)
    later(lost.lose)
    collected_events.assert_later(order.ship, parcel, fast=True)
    _, failed = delivered(collected_events)
    assert noted == [(order.pk, "default", True, parcel.pk, True)]
    assert [each.number for each in Order.objects.order_by("pk")] == [2, 5]
    assert "lost" in failed.reason
    collected_events.assert_published("order.shipped", times=1)


@on_sqlite
def test_what_travels_is_the_class_and_the_key() -> None:
    order = Order.objects.create(number=1)
    later(order.ship)
    assert arguments() == [{"$instance": ["tests.django.shop.models:Order", [order.pk]]}]
    StoredEvent.objects.all().delete()
    parcel = Parcel.objects.create()
    with transaction.atomic():
        order.number = 7
        later(order.ship, parcel)
    assert arguments() == [
        {"$instance": ["tests.django.shop.models:Order", [order.pk], True]},
        {"$instance": ["tests.django.shop.models:Parcel", [str(parcel.pk)], True]},
    ]


@on_sqlite
def test_a_rollback_takes_the_call_with_it() -> None:
    with pytest.raises(KeyError), transaction.atomic():
        order = Order.objects.create(number=1)
        later(order.ship)
        raise KeyError
    assert not StoredEvent.objects.exists()


@on_sqlite
def test_an_instance_without_a_row_is_refused_where_it_was_called() -> None:
    with pytest.raises(InvalidEvent, match=r"the Parcel has no row yet.*save\(\) it first"):
        later(Parcel().send)
    order = Order.objects.create(number=1)
    order.delete()
    with pytest.raises(InvalidEvent, match="the Order was deleted"):
        later(order.ship)
    with pytest.raises(UsageError, match="is a method of django"):
        later(Order.objects.create(number=1).save)
    past = ProjectState.from_apps(apps).apps.get_model("shop", "Parcel")
    Parcel.objects.create()
    with pytest.raises(InvalidEvent, match="of a migration's model"):
        later(shop.label, past.objects.get(), "old")
    assert not StoredEvent.objects.exists()


@on_sqlite
def test_rows_that_the_manager_hides_are_found(collected_events: CollectedEvents) -> None:
    parcel = Parcel.objects.create(hidden=True)
    later(parcel.send)
    later(shop.label, parcel, "hidden")
    delivered(collected_events)
    assert noted == [parcel.pk, (parcel.pk, "hidden")]


@on_sqlite
def test_an_instance_that_is_gone_is_dead_at_once_if_it_was_committed_with_the_call(
    collected_events: CollectedEvents,
) -> None:
    with transaction.atomic():
        order = Order.objects.create(number=1)
        later(order.ship)
    Order.objects.all().delete()
    [outcome] = delivered(collected_events)
    assert isinstance(outcome, Dead)
    assert "it was committed with the task, so it was deleted since" in outcome.reason
    assert noted == []


@on_sqlite
def test_an_instance_that_is_gone_is_looked_for_again(collected_events: CollectedEvents) -> None:
    order = Order.objects.create(number=1)
    later(order.ship)
    Order.objects.all().delete()
    [outcome] = delivered(collected_events)
    assert isinstance(outcome, Again)
    assert outcome.delay == 1.0


def test_an_instance_is_loaded_from_its_own_database(collected_events: CollectedEvents) -> None:
    with transaction.atomic(using="other"):
        order = Order.objects.using("other").create(number=1)
        with pytest.raises(UsageError, match="using='other'"):
            later(order.ship)
        options(using="other").later(order.ship)
    [event] = StoredEvent.objects.using("other").all()
    assert json.loads(event.payload)["args"] == [
        {"$instance": ["tests.django.shop.models:Order", [order.pk], True, "other"]}
    ]
    delivered(collected_events)
    assert noted == [(order.pk, "other", True, None, False)]
    assert Order.objects.using("other").get().number == 2


def test_what_is_stored_until_it_is_due_can_be_cancelled() -> None:
    order = Order.objects.create(number=1)
    hour = datetime.timedelta(hours=1)
    with transaction.atomic():
        first = schedule(hour, order.ship)
    assert first.status == "waiting"
    assert first.cancel()
    assert (first.status, StoredEvent.objects.count()) == ("unknown", 0)
    with transaction.atomic(using="other"):
        second = options(at=hour, using="other").later(shop.label, order, "there")
    assert second.status == "waiting"
    assert second.cancel()
    assert not StoredEvent.objects.using("other").exists()


@pytest.mark.parametrize("after_commit", ["publish", "nothing"])
def test_a_handle_knows_the_transaction_that_its_task_is_stored_in(
    outbox_setting: Any, after_commit: str
) -> None:
    outbox_setting(URL="memory://", RESULTS="default", AFTER_COMMIT=after_commit)
    order, hour = Order.objects.create(number=1), datetime.timedelta(hours=1)
    with transaction.atomic():
        first, later_on = later(shop.label, order, "kept"), schedule(hour, order.ship)
        assert {first.status, later_on.status} == {"collected"}
        with pytest.raises(UsageError, match="is stored in a transaction that is open"):
            first.result()
        with pytest.raises(KeyError), transaction.atomic():
            inner = later(order.ship)
            with transaction.atomic():
                innermost = options(using="default").later(order.ship, fast=True)
            assert (inner.status, innermost.status) == ("collected", "collected")
            raise KeyError
        assert (inner.status, innermost.status, first.status) == (
            "dropped",
            "dropped",
            "collected",
        )
    assert first.status in ("unknown", "waiting")
    assert later_on.status == "waiting"
    with pytest.raises(ResultTimeout):
        first.result(0)
    with pytest.raises(KeyError), transaction.atomic():
        dropped = [later(order.ship), schedule(hour, order.ship), later(order.ship, fast=True)]
        raise KeyError
    assert [each.status for each in dropped] == ["dropped"] * 3
    assert all(each.cancel() for each in dropped)
    with pytest.raises(UsageError, match="was dropped with its transaction"):
        dropped[0].result()


@on_sqlite
def test_a_handle_waits_for_no_commit_of_a_test_case(outbox_setting: Any) -> None:
    outbox_setting(URL="memory://", RESULTS="default")
    order = Order.objects.create(number=1)
    setup_test_environment()
    try:
        block: Any = transaction.atomic()
        block._from_testcase = True  # as Django's TestCase does it
        with block:
            with transaction.atomic():
                handle = later(order.ship)
            assert (handle.status, connections["default"].run_on_commit) == ("collected", [])
            with pytest.raises(UsageError, match="is stored in a transaction that is open"):
                handle.result()
    finally:
        teardown_test_environment()


@on_sqlite
def test_a_handle_knows_what_is_held_until_a_commit(outbox_setting: Any) -> None:
    outbox_setting(URL="memory://", STORE=None)
    order = Order.objects.create(number=1)
    with pytest.raises(KeyError), transaction.atomic():
        handle = later(order.ship)
        assert handle.status == "collected"
        raise KeyError
    assert handle.status == "dropped"
    with transaction.atomic():
        handle = later(order.ship)
    assert handle.status == "unknown"


def test_results_are_kept_in_a_database_of_the_project(tmp_path: Path, outbox_setting: Any) -> None:
    outbox_setting(URL=f"sqlite:///{tmp_path / 'broker.db'}", RESULTS="default")
    assert not [each for each in check_settings() if each.id == "outbox.E004"]
    parcel = Parcel.objects.create()
    worker = Worker(load(["tests.django.shop.models:label"]), threads=1)
    worker.start()
    handle = later(shop.label, parcel, "kept")
    assert handle.result(timeout=20) == f"kept {parcel.pk}"
    assert handle.status == "succeeded"
    assert worker.stop(10)
    outbox_setting(RESULTS="unknown")
    assert "outbox.E004" in [each.id for each in check_settings()]


@pytest.mark.parametrize("databases", ["postgresql", "mariadb"], indirect=True)
def test_a_result_is_committed_with_what_the_method_has_changed(
    tmp_path: Path, outbox_setting: Any, databases: str
) -> None:
    outbox_setting(URL=f"sqlite:///{tmp_path / 'broker.db'}", RESULTS="default")
    order, other = Order.objects.create(number=1), Order.objects.create(number=1)
    worker = Worker(load(["tests.django.shop.models:Order"]), threads=1)
    worker.start()
    assert later(order.count_up, "number").result(timeout=20) == 2
    with pytest.raises(TaskFailed, match=r"TypeError: what .*Order\.count_up returned"):
        later(other.count_up, "object").result(timeout=20)
    assert worker.stop(10)
    assert [each.number for each in Order.objects.order_by("pk")] == [2, 1]
    if databases == "postgresql":
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT xmin FROM outbox_results WHERE status = 'succeeded'")
            [result] = cursor.fetchall()
            cursor.execute("SELECT xmin FROM shop_order WHERE number = 2")
            assert cursor.fetchall() == [result]  # the transaction that has written it


@on_sqlite
def test_a_call_in_a_signal_of_the_model(collected_events: CollectedEvents) -> None:
    def on_save(instance: Order, created: bool, **_: Any) -> None:
        if created:
            later(instance.ship)

    post_save.connect(on_save, sender=Order)
    try:
        order = Order.objects.create(number=1)
    finally:
        post_save.disconnect(on_save, sender=Order)
    delivered(collected_events)
    assert noted == [(order.pk, "default", True, None, False)]


def test_coroutines_take_instances_too(collected_events: CollectedEvents) -> None:
    order, other = Order.objects.create(number=1), Order.objects.create(number=9)
    later(order.wait, other)
    delivered(collected_events)
    assert noted == [(order.pk, other.pk)]
    connections["default"].close()
    assert Order.objects.get(pk=order.pk).number == 9


@pytest.mark.skipif(django.VERSION < (5, 2), reason="there are no composite keys before")
def test_a_composite_key_travels_in_parts(collected_events: CollectedEvents) -> None:
    day = datetime.date(2030, 1, 2)
    with pytest.raises(InvalidEvent, match="no row yet"):
        later(shop.Line().count)
    line = shop.Line.objects.create(order_id=3, day=day)
    later(line.count)
    assert arguments() == [{"$instance": ["tests.django.shop.models:Line", [3, "2030-01-02"]]}]
    delivered(collected_events)
    assert noted == [(3, day)]


@on_sqlite
@pytest.mark.parametrize(
    "mark",
    [
        ["tests.django.shop.models:Order", []],
        ["tests.django.shop.models:Order", [1, 2]],
        ["tests.django.shop.models:Order", [[1]]],
        ["tests.django.shop.models:Order", ["x"]],
        ["tests.django.shop.models:Order", [1], False, "elsewhere"],
        ["tests.django.shop.models:Order", [1], "default"],
        ["tests.django.shop.models:Visible", [1]],
        ["subprocess:Popen", [1]],
        ["tests.django.shop.models:Parcel", ["no uuid"]],
        ["tests.django.shop.models:Parcel", [str(uuid.uuid4())]],
    ],
)
def test_a_hostile_instance_is_a_dead_letter(
    mark: list[Any], collected_events: CollectedEvents
) -> None:
    Order.objects.create(pk=1, number=1)
    body = {"args": [{"$instance": mark}], "typed": [0]}
    name = "tests.django.shop.models:Order.ship"
    enqueue_event(body, "tasks", exchange="", headers={TASK: name})
    [outcome] = delivered(collected_events)
    is_missing = mark[0].endswith("Parcel") and mark[1] != ["no uuid"]
    assert isinstance(outcome, Again if is_missing else Dead)
    assert noted == []
