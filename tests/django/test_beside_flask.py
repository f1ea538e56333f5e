"""A process of both frameworks, such as one that mounts a Flask application beside Django's."""

from __future__ import annotations

from typing import Any

import pytest
from django.apps import apps
from django.db import transaction
from flask import Flask

import outbox.sql
from outbox import enqueue_event
from outbox.django.models import StoredEvent
from outbox.flask import Outbox
from tests.amqp import Inspector
from tests.waiting import wait_until


@pytest.mark.parametrize("last", ["Flask", "Django"])
@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("databases")
def test_each_event_goes_where_its_own_framework_says(
    last: str,
    amqp_url: str,
    name: str,
    inspector: Inspector,
    outbox_setting: Any,
) -> None:
    queues = {one: inspector.queue(f"{name}.{one}", f"{name}.{one}") for one in ("django", "flask")}
    outbox_setting(URL=amqp_url, EXCHANGE=f"{name}.django")
    app = Flask("mounted")
    app.config.update(OUTBOX_URL=amqp_url, OUTBOX_EXCHANGE=f"{name}.flask")
    extension = Outbox(app)
    if last == "Django":
        apps.get_app_config("outbox_events").ready()

    @app.post("/")
    def place() -> str:
        enqueue_event("flask", "order.placed")
        assert not StoredEvent.objects.exists()
        return ""

    try:
        assert app.test_client().post("/").status_code == 200
        with transaction.atomic():
            enqueue_event("django", "order.placed")
            assert StoredEvent.objects.exists()
        wait_until(lambda: not StoredEvent.objects.exists())
        assert outbox.sql.drain()
    finally:
        with app.app_context():
            extension.publisher.close()
    for one, queue in queues.items():
        wait_until(lambda queue=queue: inspector.count(queue) == 1)  # type: ignore[misc]
        [message] = inspector.all(queue)
        assert message.body == f'"{one}"'.encode()
