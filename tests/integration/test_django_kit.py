"""The testing kit in Django's test cases: handlers work in the test's own transaction."""

from __future__ import annotations

import pytest

SUITE = """
import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db", "TEST": {"NAME": "test.db"}
    }},
    INSTALLED_APPS=["django.contrib.contenttypes"],
)
django.setup()

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase
from django.test.utils import setup_databases, teardown_databases
from outbox.consumers import Consumer, consumer
from outbox.testing import CollectedEventsMixin


@pytest.fixture(scope="session", autouse=True)
def databases():
    before = setup_databases(0, False)
    yield
    teardown_databases(before, 0)


MINE = ContentType.objects.filter(app_label="mine")


class Plain(Consumer):
    queue = "plain"

    def process(self, event):
        assert MINE.count() == 1
        if event.payload == "fail":
            raise ValueError


@consumer("coroutine")
async def coroutine(event):
    assert await MINE.acount() == 1


class InATransaction(CollectedEventsMixin, TestCase):
    def setUp(self):
        ContentType.objects.create(app_label="mine", model="x")

    def test_a_plain_handler(self):
        assert self.collected_events.perform(Plain).acked
        with self.assertRaises(ValueError):
            self.collected_events.perform(Plain, "fail")
        assert self.collected_events.perform(Plain).acked

    def test_a_coroutine(self):
        assert self.collected_events.perform(coroutine).acked

    async def test_both_in_an_event_loop(self):
        assert (await self.collected_events.perform_async(coroutine)).acked
        assert (await self.collected_events.perform_async(Plain)).acked


class WithoutATransaction(CollectedEventsMixin, TransactionTestCase):
    def test_the_connection_stays_as_it_is(self):
        connection.ensure_connection()
        mine = connection.connection
        ContentType.objects.create(app_label="mine", model="x")
        transaction.set_autocommit(False)
        ContentType.objects.create(app_label="other", model="x")
        assert self.collected_events.perform(Plain).acked
        assert connection.connection is mine
        assert ContentType.objects.filter(app_label="other").count() == 1
        transaction.rollback()
        transaction.set_autocommit(True)
"""


def test_handlers_work_with_the_connection_of_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    # pytest-django would make the databases, too.
    result = pytester.runpytest_subprocess("-p", "no:django", "--timeout", "60")
    result.assert_outcomes(passed=4)
