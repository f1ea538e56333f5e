"""The application's own tests, as a Django team writes them; test_cases.py runs them."""

from __future__ import annotations

import threading
import unittest.mock
import urllib.request
from typing import Any

import django.db
from django.core import mail
from django.db import connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.http import HttpRequest, JsonResponse
from django.test import (
    LiveServerTestCase,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.urls import path

from outbox import PublishFailed, PublishReport
from outbox.configuration import default_publisher
from outbox.consumers import Consumer, consumer
from outbox.django import aenqueue_event, enqueue_event
from outbox.django.models import StoredEvent
from outbox.sql.handover import Handover
from outbox.testing import CollectedEventsMixin
from tests.django.shop.models import Order

# Its name before Django 6.1.
savepoint_create = getattr(transaction, "savepoint_create", None) or transaction.savepoint

# ------------------------------------------------------------------------------- the application


def place_order(number: int) -> None:
    with transaction.atomic():
        Order.objects.create(number=number)
        enqueue_event({"number": number}, "order.placed")


def order_view(request: HttpRequest, number: int) -> JsonResponse:
    place_order(number)
    return JsonResponse({"number": number})


async def async_view(request: HttpRequest, number: int) -> JsonResponse:
    await Order.objects.acreate(number=number)
    await aenqueue_event({"number": number}, "order.placed")
    return JsonResponse({"number": number})


urlpatterns = [path("orders/<int:number>", order_view), path("async/<int:number>", async_view)]


class Invoices(Consumer):
    queue = "invoices"
    topics = ("order.placed",)

    def process(self, event: Any) -> None:
        with transaction.atomic():
            Order.objects.get(number=event.payload["number"])
            enqueue_event(event.payload, "invoice.sent")
            if event.payload.get("fails"):
                raise ValueError("no paper")


@consumer("letters")
async def letters(event: Any) -> None:
    await Order.objects.aget(number=event.payload["number"])
    await aenqueue_event(event.payload, "letter.sent")


class Mistake(Exception):
    pass


class WithoutFastPath:
    """Fails a test in which a thread beside it reads the table."""

    def run(self, result: Any = None) -> Any:
        with unittest.mock.patch.object(Handover, "submit") as submit:
            returned = super().run(result)  # type: ignore[misc]
        submit.assert_not_called()
        return returned


# ------------------------------------------------------------------------------------- its tests


@override_settings(ROOT_URLCONF=__name__)
class TestCaseCase(WithoutFastPath, CollectedEventsMixin, TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        place_order(1000)

    def setUp(self) -> None:  # which doesn't call the mixin's
        enqueue_event({}, "set.up")

    def test_a_view_enqueues(self) -> None:
        response = self.client.post("/orders/7")
        assert response.json() == {"number": 7}
        event = self.collected_events.assert_enqueued("order.placed", {"number": 7})
        assert self.collected_events.assert_stored("order.placed") is event
        self.collected_events.assert_not_enqueued("order.placed", {"number": 8})
        self.collected_events.assert_nothing_published()
        with self.assertRaises(AssertionError) as raised:
            self.collected_events.assert_published("order.placed")
        for way in ("TransactionTestCase", "captureOnCommitCallbacks(execute=True)"):
            assert way in str(raised.exception)
        with self.assertRaises(AssertionError):
            self.collected_events.assert_nothing_enqueued()

    def test_rows_of_the_class_are_there_but_their_events_are_not(self) -> None:
        assert StoredEvent.objects.count() == 2
        assert Order.objects.get().number == 1000
        self.collected_events.assert_not_enqueued("order.placed")
        self.collected_events.assert_enqueued("set.up", times=1)
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            pass
        assert callbacks == []
        self.collected_events.assert_nothing_published()

    def test_a_rollback_drops_events(self) -> None:
        with self.assertRaises(Mistake), transaction.atomic():
            place_order(1)
            raise Mistake
        with transaction.atomic():
            place_order(2)
            transaction.set_rollback(True)
        with transaction.atomic():
            place_order(3)
            with self.assertRaises(Mistake), transaction.atomic():
                place_order(4)
                raise Mistake
        events = self.collected_events
        assert [event.target for event in events.stored] == ["set.up", "order.placed"]
        events.assert_enqueued("order.placed", {"number": 3}, times=1)
        for number in (1, 2, 4):
            events.assert_cleared("order.placed", {"number": number})
            events.assert_not_enqueued("order.placed", {"number": number})

    def test_a_savepoint_by_hand_drops_events(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            savepoint = savepoint_create()
            enqueue_event({}, "order.placed")
            transaction.savepoint_rollback(savepoint)
            enqueue_event({}, "order.placed.later")  # SQLite gives it the same number
        self.collected_events.assert_cleared("order.placed")
        self.collected_events.assert_not_enqueued("order.placed")
        self.collected_events.assert_published("order.placed.later")

    def test_captured_callbacks_publish(self) -> None:
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.client.post("/orders/7")
            with self.assertRaises(Mistake), transaction.atomic():
                place_order(8)
                raise Mistake
            self.collected_events.assert_nothing_published()
        assert len(callbacks) == 1
        self.collected_events.assert_published("order.placed", {"number": 7}, times=1)
        self.collected_events.assert_enqueued("order.placed", times=1)
        self.collected_events.assert_cleared("order.placed", {"number": 8})
        self.collected_events.assert_stored("set.up")  # enqueued before the block

    def test_callbacks_that_run_twice_publish_once(self) -> None:
        with (
            self.captureOnCommitCallbacks(execute=True),
            self.captureOnCommitCallbacks(execute=True),
        ):
            place_order(7)
        self.collected_events.assert_published("order.placed", times=1)
        self.collected_events.assert_published_in_order("order.placed")

    def test_captured_callbacks_that_do_not_run_publish_nothing(self) -> None:
        with self.captureOnCommitCallbacks() as callbacks:
            place_order(7)
        self.collected_events.assert_stored("order.placed")
        callbacks[0]()
        self.collected_events.assert_published("order.placed")

    def test_an_event_is_one_query(self) -> None:
        with self.assertNumQueries(10), self.captureOnCommitCallbacks(execute=True):
            for _ in range(10):
                enqueue_event({}, "order.placed")
            self.collected_events.assert_enqueued("order.placed", times=10)
        self.collected_events.assert_published("order.placed", times=10)

    def test_a_broken_transaction_is_left_alone(self) -> None:
        place_order(7)
        with self.assertRaises(Mistake), transaction.atomic():
            with self.assertRaises(django.db.DatabaseError), connection.cursor() as cursor:
                cursor.execute("SELECT nonsense")
            self.collected_events.assert_enqueued("order.placed")
            raise Mistake
        self.collected_events.assert_enqueued("order.placed")

    def test_consumers_work_in_the_transaction(self) -> None:
        before = connection.connection
        with self.captureOnCommitCallbacks(execute=True):
            self.client.post("/orders/7")
        with self.captureOnCommitCallbacks(execute=True):
            [done] = self.collected_events.deliver_all(Invoices)
        assert done.acked
        self.collected_events.assert_published("invoice.sent", {"number": 7})
        assert self.collected_events.perform(letters, {"number": 7}).acked
        self.collected_events.assert_enqueued("letter.sent", {"number": 7})
        with self.assertRaisesRegex(ValueError, "no paper"):
            self.collected_events.perform(Invoices, {"number": 7, "fails": True})
        self.collected_events.assert_not_enqueued("invoice.sent", {"fails": True})
        self.collected_events.assert_cleared("invoice.sent", {"fails": True})
        assert connection.connection is before

    def test_what_is_only_stored_is_not_delivered(self) -> None:
        place_order(7)
        with self.assertRaisesRegex(AssertionError, "stored, not published(.|\n)*order.placed"):
            self.collected_events.deliver_all(Invoices)
        self.collected_events.commit()
        assert self.collected_events.deliver_all(Invoices)[0].acked

    def test_the_setting_can_be_overridden(self) -> None:
        with self.settings(OUTBOX={"EXCHANGE": "shop"}):
            place_order(1)
        self.collected_events.assert_enqueued("order.placed", exchange="shop")
        place_order(2)
        self.collected_events.assert_enqueued("order.placed", {"number": 2}, exchange="outbox")

    def test_events_that_are_held_in_memory(self) -> None:
        with self.settings(OUTBOX={"STORE": None}), self.captureOnCommitCallbacks(execute=True):
            place_order(7)
            self.collected_events.assert_pending("order.placed")
            with self.assertRaises(Mistake), transaction.atomic():
                place_order(8)
                raise Mistake
            self.collected_events.assert_enqueued("order.placed", times=1)
        self.collected_events.assert_published("order.placed", {"number": 7}, times=1)
        self.collected_events.assert_cleared("order.placed", {"number": 8})
        assert StoredEvent.objects.count() == 2

    async def test_an_async_view_enqueues(self) -> None:
        response = await self.async_client.post("/async/7")
        assert response.status_code == 200
        self.collected_events.assert_enqueued("order.placed", {"number": 7})
        await aenqueue_event({"number": 8}, "order.placed")
        assert len(self.collected_events.stored) == 3
        self.collected_events.assert_nothing_published()
        assert (await self.collected_events.perform_async(letters, {"number": 7})).acked
        await self.collected_events.perform_async(Invoices, {"number": 7})
        self.collected_events.assert_enqueued("letter.sent")
        self.collected_events.assert_enqueued("invoice.sent")


class NoSuperCase(TestCase, CollectedEventsMixin):
    """The mixin comes last, which Django's classes don't mind."""

    def setUp(self) -> None:
        self.number = 7

    def tearDown(self) -> None:
        self.collected_events.assert_enqueued("order.placed")

    def test_it_collects(self) -> None:
        place_order(self.number)
        self.collected_events.assert_enqueued("order.placed", {"number": 7})


@override_settings(ROOT_URLCONF=__name__)
class TransactionTestCaseCase(WithoutFastPath, CollectedEventsMixin, TransactionTestCase):
    def test_a_commit_publishes(self) -> None:
        with transaction.atomic():
            place_order(7)
            self.collected_events.assert_stored("order.placed")
            self.collected_events.assert_nothing_published()
        self.collected_events.assert_published("order.placed", {"number": 7})
        assert self.collected_events.stored == ()
        self.client.post("/orders/8")
        self.collected_events.assert_published("order.placed", {"number": 8})
        assert [done.acked for done in self.collected_events.deliver_all(Invoices)] == [True] * 2
        self.collected_events.assert_published("invoice.sent", times=2)

    def test_a_rollback_drops_events(self) -> None:
        with self.assertRaises(Mistake), transaction.atomic():
            place_order(7)
            raise Mistake
        with transaction.atomic():
            savepoint = savepoint_create()
            place_order(8)
            transaction.savepoint_rollback(savepoint)
        self.collected_events.assert_nothing_enqueued()
        self.collected_events.assert_cleared("order.placed", times=2)

    def test_outside_of_a_transaction_an_event_is_published_at_once(self) -> None:
        enqueue_event({}, "order.placed")
        self.collected_events.assert_published("order.placed")

    def test_anothers_callback_that_raises_leaves_the_event_to_a_relay(self) -> None:
        def fail() -> None:
            raise Mistake

        with self.assertRaises(Mistake), transaction.atomic():
            transaction.on_commit(fail)
            place_order(7)
        self.collected_events.assert_stored("order.placed")
        self.collected_events.assert_enqueued("order.placed")
        assert self.collected_events.cleared == ()

    def test_an_outage_leaves_events_stored(self) -> None:
        with self.collected_events.broker_down():
            place_order(7)
            self.collected_events.assert_stored("order.placed")
            self.collected_events.assert_nothing_published()
        self.collected_events.assert_published("order.placed")
        assert self.collected_events.stored == ()

    def test_manual_transactions_leave_events_stored(self) -> None:
        transaction.set_autocommit(False)
        try:
            enqueue_event({}, "order.placed")
            transaction.commit()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        self.collected_events.assert_stored("order.placed")

    def test_threads_of_the_application(self) -> None:
        def work() -> None:
            try:
                place_order(7)
            finally:
                # connection.close() leaves one to a database in memory open.
                BaseDatabaseWrapper.close(connection)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if connection.vendor == "sqlite" and connection.is_in_memory_db():
            return  # where the thread found no tables
        self.collected_events.assert_published("order.placed", {"number": 7})


@override_settings(ROOT_URLCONF=__name__, STATIC_URL="/static/")
class LiveServerTestCaseCase(CollectedEventsMixin, LiveServerTestCase):
    def test_a_request_publishes(self) -> None:
        with urllib.request.urlopen(f"{self.live_server_url}/orders/7") as response:
            assert response.status == 200
        self.collected_events.assert_published("order.placed", {"number": 7})
        assert self.collected_events.stored == self.collected_events.cleared == ()


class SimpleTestCaseCase(CollectedEventsMixin, SimpleTestCase):
    def test_storing_is_refused_as_by_a_model(self) -> None:
        for store in (enqueue_event, lambda *_: Order.objects.create(number=7)):
            with self.assertRaisesRegex(AssertionError, "Database .* to 'default' are not allowed"):
                store({}, "order.placed")
        enqueue_event({}, "order.placed", using=None)
        self.collected_events.assert_published("order.placed")


class UnobservedCase(WithoutFastPath, TestCase):
    """Without the mixin events are stored, and nothing is published but in memory."""

    def test_nothing_is_published(self) -> None:
        assert mail.outbox == []
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            place_order(7)
            enqueue_event({}, "order.refused", using=None)
        assert callbacks == []
        assert [event.target for event in StoredEvent.objects.all()] == ["order.placed"]
        assert default_publisher().settings.url == "memory://"

    def test_nor_with_events_held_in_memory(self) -> None:
        with (
            self.settings(OUTBOX={"STORE": None}),
            self.captureOnCommitCallbacks(execute=True) as callbacks,
        ):
            place_order(7)
            place_order(8)
        assert len(callbacks) == 2


class UnobservedTransactionCase(WithoutFastPath, TransactionTestCase):
    def test_nothing_is_published_after_a_commit(self) -> None:
        place_order(7)
        enqueue_event({}, "order.refused", using=None)
        assert StoredEvent.objects.count() == 1


class FailingCase(CollectedEventsMixin, TestCase):
    """Not part of a run that should succeed: its results go to another process."""

    def fail_in_a_subtest(self) -> None:
        for number in (1, 2):
            with self.subTest(number=number):
                place_order(number)
                self.collected_events.assert_not_enqueued("order.placed", {"number": 2})

    def fail_without_a_commit(self) -> None:
        place_order(7)
        self.collected_events.assert_published("order.placed")

    def fail_with_an_event(self) -> None:
        place_order(7)
        event = self.collected_events.assert_enqueued("order.placed")
        raise PublishFailed(PublishReport(published=(event,)))

    def fail_with_wrong_usage(self) -> None:
        enqueue_event({}, "order.placed", using="nowhere")
