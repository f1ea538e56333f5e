"""Stored events in the admin, by Django's test client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth.management import create_permissions
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType
from django.db import connections
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext

from outbox import Event
from outbox.django import enqueue_event
from outbox.django.admin import _MOST
from outbox.django.connecting import engine_of
from outbox.django.models import StoredEvent
from outbox.sql import Store

pytestmark = pytest.mark.usefixtures("databases", "project_with_admin")

LIST = "/admin/outbox_events/storedevent/"


class ReplicaRouter:
    """Sends reads of outbox's models to another database, as for a replica."""

    def db_for_read(self, model: Any, **_: Any) -> str | None:
        return "other" if model._meta.app_label == "outbox_events" else None


@pytest.fixture
def project_with_admin(outbox_setting: Any) -> Iterator[None]:
    outbox_setting()

    with override_settings(ALLOWED_HOSTS=["*"], DATABASE_ROUTERS=[ReplicaRouter()]):
        yield


def client(*permissions: str) -> Client:
    """A client of a member of the staff with these permissions."""
    ContentType.objects.clear_cache()  # of another test's database
    create_permissions(apps.get_app_config("outbox_events"), verbosity=0)
    user = User.objects.create_user("me", password="me", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    made = Client()
    made.force_login(user)
    return made


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.status_code
    text: str = response.content.decode()
    return text


def dead_event(target: str = "order.placed") -> Event:
    event = enqueue_event({"secret": 1}, target, headers={"by": "us"})
    store = Store(engine_of("default"))
    claimed = store.claim(10)
    store.bury([row for row in claimed if row.event.id == event.id], "NOT_FOUND")
    store.release([row for row in claimed if row.event.id != event.id])
    return event


def act(by: Client, action: str, *events: Event, confirmed: bool = False) -> Any:
    numbers = StoredEvent.objects.using("default").filter(id__in=[event.id for event in events])
    data: dict[str, Any] = {"action": action, "_selected_action": [row.pk for row in numbers]}
    if confirmed:
        data["confirmed"] = "yes"
    return by.post(LIST, data, follow=True)


def test_rows_of_the_store_are_listed_by_state_and_never_counted() -> None:
    waiting, dead = enqueue_event({}, "order.placed"), dead_event("order.paid")
    viewer = client("view_storedevent")
    with CaptureQueriesContext(connections["default"]) as queries:
        listed = text_of(viewer.get(LIST))
    assert waiting.id in listed
    assert dead.id in listed
    assert "NOT_FOUND" in listed
    assert not [each["sql"] for each in queries if "COUNT(" in each["sql"].upper()]
    only_dead = text_of(viewer.get(LIST, {"state": "dead"}))
    assert dead.id in only_dead
    assert waiting.id not in only_dead
    assert waiting.id in text_of(viewer.get(LIST, {"state": "waiting"}))
    for state in ("scheduled", "in flight"):
        assert "0 stored events" in text_of(viewer.get(LIST, {"state": state}))
    assert waiting.id in text_of(viewer.get(LIST, {"q": waiting.id}))


def test_pages_end_after_the_first_thousand() -> None:
    event = enqueue_event({}, "order.placed")
    with connections["default"].cursor() as cursor:
        names = [
            field.column for field in StoredEvent._meta.fields if field.column not in ("seq", "id")
        ]
        columns = ", ".join(map(connections["default"].ops.quote_name, names))
        for _ in range(11):  # 2 to the 11th rows
            cursor.execute(
                f"INSERT INTO outbox_events (id, {columns}) SELECT id, {columns} FROM outbox_events"
            )
    listed = text_of(client("view_storedevent").get(LIST))
    assert event.id in listed
    assert f"{_MOST} stored events" in listed


def test_a_body_needs_its_permission_and_nothing_can_be_changed() -> None:
    event = dead_event()
    viewer = client("view_storedevent", "change_storedevent", "delete_storedevent")
    page = f"{LIST}{StoredEvent.objects.using('default').get().pk}/change/"
    shown = text_of(viewer.get(page))
    assert event.id in shown
    assert "secret" not in shown
    assert "by" not in shown.partition("fieldset")[2].partition("Headers")[2][:200]
    assert 'name="_save"' not in shown
    assert viewer.post(page, {"target": "other"}).status_code == 403
    assert viewer.get(f"{LIST}add/").status_code == 403
    assert viewer.post(page.replace("change", "delete"), {"post": "yes"}).status_code == 403
    user = User.objects.get()
    user.user_permissions.add(Permission.objects.get(codename="view_body"))
    assert "secret" in text_of(viewer.get(page))


def test_dead_events_are_published_again_once_that_is_confirmed() -> None:
    waiting, dead = enqueue_event({}, "order.placed"), dead_event()
    worker = client("view_storedevent", "change_storedevent")
    asked = text_of(act(worker, "retry", waiting, dead))
    assert "Publish 1 event again?" in asked
    assert dead.id in asked
    assert waiting.id not in asked
    assert Store(engine_of("default")).dead()
    assert "1 event due again." in text_of(act(worker, "retry", dead, waiting, confirmed=True))
    assert not Store(engine_of("default")).dead()
    assert {row.event.id for row in Store(engine_of("default")).claim(10)} == {waiting.id, dead.id}


def test_dead_events_are_deleted_once_that_is_confirmed_and_no_others() -> None:
    waiting, dead = enqueue_event({}, "order.placed"), dead_event()
    worker = client("view_storedevent", "delete_storedevent")
    assert "None of these events is dead." in text_of(act(worker, "purge", waiting))
    assert "Delete 1 event permanently?" in text_of(act(worker, "purge", waiting, dead))
    assert "1 event deleted." in text_of(act(worker, "purge", waiting, dead, confirmed=True))
    assert [row.id for row in StoredEvent.objects.using("default")] == [waiting.id]


def test_actions_need_their_permissions() -> None:
    dead = dead_event()
    viewer = client("view_storedevent")
    for action in ("retry", "purge", "delete_selected"):
        act(viewer, action, dead, confirmed=True)
    assert len(Store(engine_of("default")).dead()) == 1
    assert Client().get(LIST).status_code == 302
