"""What is said when a connection cannot be opened, without a broker."""

from __future__ import annotations

import pika.exceptions
import pytest

from outbox import ConnectionLost
from outbox.transports.rabbitmq import pika_errors

CLOSED = pika.exceptions.ConnectionClosedByBroker
RESET = pika.exceptions.StreamLostError(
    "Stream connection lost: ConnectionResetError(104, 'reset')"
)
NO_VHOST = CLOSED(530, "NOT_ALLOWED - access to vhost 'v' refused for user 'u'")
SMALL = CLOSED(530, "NOT_ALLOWED - negotiated frame_max = 4096 is lower than the minimum (8192)")
DEMANDED = pika.exceptions.StreamLostError(
    "Stream connection lost: SSLError(1, '[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert')"
)
DENIED = pika.exceptions.ProbableAccessDeniedError
FOREIGN = pika.exceptions.IncompatibleProtocolError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DENIED(repr(RESET)), "while it was being tuned (frame_max"),
        (DENIED(repr(NO_VHOST)), "may not use this vhost, or it does not exist: 530 NOT_ALLOWED"),
        (DENIED(repr(SMALL)), "530 NOT_ALLOWED - negotiated frame_max = 4096 is lower"),
        (FOREIGN(repr(RESET)), "does not speak AMQP 0-9-1"),
        (FOREIGN(repr(DEMANDED)), "demands a client's certificate (certfile, keyfile)"),
        (pika.exceptions.AuthenticationError("EXTERNAL"), "not offer the mechanism EXTERNAL"),
    ],
)
def test_the_reason_is_what_happened_not_what_pika_supposes(error: Exception, said: str) -> None:
    text = str(pika_errors.connect_failed(error, "h:1"))
    assert text.startswith("cannot connect to h:1: ")
    assert said in text
    assert ("may not use this vhost" in text) == ("vhost" in said and "frame" not in said)


@pytest.mark.parametrize(
    ("cause", "blames"),
    [(CLOSED(541, "INTERNAL_ERROR"), True), (CLOSED(501, ""), True), (CLOSED(320, ""), False)],
)
def test_only_an_ending_because_of_an_error_may_be_due_to_an_event(
    cause: Exception, blames: bool
) -> None:
    error = pika_errors.connection_lost(cause, "h:1")
    assert pika_errors.was_ended_for_an_error(error) is blames
    assert not pika_errors.was_ended_for_an_error(ConnectionLost("as if"))
