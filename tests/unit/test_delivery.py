"""What a delivery says of its past."""

from __future__ import annotations

from typing import Any

import pytest

from outbox.messages.delivery import Delivery


@pytest.mark.parametrize(
    ("redelivered", "headers", "returned"),
    [
        (False, None, 0),
        (False, {"x-delivery-count": 0}, 0),  # as RabbitMQ 3.10 sends it the first time
        (False, {"x-delivery-count": 7}, 0),  # from another client's copy: not of this queue
        (True, None, 1),  # a classic queue doesn't count
        (True, {"x-delivery-count": 3}, 3),
        (True, {"x-acquired-count": 4}, 0),  # RabbitMQ 4.3: nacked four times, which doesn't count
        (True, {"x-acquired-count": 4, "x-delivery-count": 2}, 2),
        (True, {"x-delivery-count": "many"}, 1),
        (True, {"x-delivery-count": True}, 1),
    ],
)
def test_returned_is_the_brokers_count(
    redelivered: bool, headers: dict[str, Any] | None, returned: int
) -> None:
    delivery = Delivery("q", 1, 1, redelivered, "", "q", b"", headers=headers)
    assert delivery.returned == returned
