"""Messages of other clients, as a consumer gets them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from outbox.messages.delivery import Delivery
from outbox.messages.received_event import ReceivedEvent, Undecodable, decode


def delivery(body: bytes, content_type: str | None, encoding: str | None = None) -> Delivery:
    return Delivery("q", 1, 1, False, "e", "t", body, content_type, encoding)


@pytest.mark.parametrize(
    ("content_type", "encoding", "mark"),
    [
        ("application/json", "utf8", b""),
        ("application/json", "UTF8", b""),
        ("application/json", "Utf-8", b""),
        ("application/json; charset=utf-8", None, b"\xef\xbb\xbf"),
        ("application/cloudevents+json", None, b""),
        ("application/vnd.shop.order+JSON; v=2", "utf-8", b"\xef\xbb\xbf"),
        (None, "identity", b""),
    ],
)
def test_json_is_read_whatever_a_client_calls_it(
    content_type: str | None, encoding: str | None, mark: bytes
) -> None:
    body = mark + '{"photo": "käse.jpg"}'.encode()
    assert decode(delivery(body, content_type, encoding)).payload == {"photo": "käse.jpg"}


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("application/json", "gzip"),
        ("application/json", "iso-8859-1"),
        ("application/cbor", None),
        ("application/problem+xml", None),
    ],
)
def test_what_is_not_json_is_not_guessed_at(content_type: str, encoding: str | None) -> None:
    with pytest.raises(Undecodable, match=r"not supported|no serializer"):
        decode(delivery(b"{}", content_type, encoding))


@pytest.mark.parametrize("depth", [40, 300, 450, 700])
def test_headers_of_any_depth_become_an_event(depth: int) -> None:
    table: Any = 1
    for _ in range(depth):
        table = {"a": table}
    message = SimpleNamespace(
        body=b"{}",
        content_type=None,
        content_encoding=None,
        delivery_tag=1,
        exchange="e",
        headers={"deep": table},
        message_id="1",
        priority=0,
        redelivered=False,
        routing_key="t",
        timestamp=None,
    )
    event = ReceivedEvent.from_aio_pika(message)
    assert (event.id, event.payload) == ("1", {})
