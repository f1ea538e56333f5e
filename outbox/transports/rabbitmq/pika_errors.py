"""The only place where pika's exceptions become outbox's."""

from __future__ import annotations

import re

import pika.exceptions

from outbox.errors import BrokerError, ConnectFailed, ConnectionLost

__all__ = ["connect_failed", "connection_lost", "one_line", "reply_of", "was_ended_for_an_error"]

_NO_ERRORS_OF_CLIENTS = frozenset((320, 506, 530))
"""The broker shuts down or was asked to close it; it lacks resources; the user may not connect."""


def one_line(text: str | bytes) -> str:
    """Return ``text`` from a broker or a driver, made safe for an error message or a log line.

    It may quote a client, so line breaks and other control characters are escaped. The broker cuts
    it at 255 bytes; if that breaks the UTF-8, pika leaves it as bytes.
    """
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def reply_of(
    reason: pika.exceptions.ChannelClosedByBroker | pika.exceptions.ConnectionClosed,
) -> str:
    """Return the broker's reply code and text for closing a channel or connection."""
    return f"{reason.reply_code} {one_line(reason.reply_text)}"


def connect_failed(error: BaseException, address: str) -> BrokerError:
    """Return outbox's error for a connection to ``address`` that could not be opened."""
    match error:
        case pika.exceptions.ProbableAuthenticationError():
            why = "the broker refused the user or the password"
        case pika.exceptions.ProbableAccessDeniedError():
            why = _while_tuning(error)
        case pika.exceptions.IncompatibleProtocolError():
            why = _before_amqp(error)
        case pika.exceptions.AuthenticationError():
            why = f"the broker does not offer the mechanism {_innermost(error)}"
        case pika.exceptions.ConnectionClosed():
            why = reply_of(error)
        case _:
            why = _innermost(error)
    return _chained(ConnectFailed(f"cannot connect to {address}: {why}"), error)


def _while_tuning(error: pika.exceptions.ProbableAccessDeniedError) -> str:
    """Return why the broker ended a connection that was being tuned or opened.

    pika supposes that access to the vhost was denied, and keeps only the text of what happened.
    """
    reply = re.search(r"\((\d+)\) (.+)", str(error), re.DOTALL)
    if reply is None:
        return "the broker ended it while it was being tuned (frame_max, heartbeat, vhost)"
    text = one_line(reply[2].strip("'\")(,"))
    if reply[1] == "530" and "vhost" in text:
        return f"the user may not use this vhost, or it does not exist: 530 {text}"
    return f"{reply[1]} {text}"


def _before_amqp(error: pika.exceptions.IncompatibleProtocolError) -> str:
    """Return why a connection ended before the server had sent anything of AMQP."""
    text = one_line(str(error))
    if "SSL" not in text:
        # Over TLS, also a connection that was reset before the alert could be read.
        return (
            "the server there does not speak AMQP 0-9-1; "
            "with TLS it may demand a client's certificate (certfile, keyfile)"
        )
    if "CERTIFICATE_REQUIRED" in text or "HANDSHAKE_FAILURE" in text:
        return f"the server demands a client's certificate (certfile, keyfile): {text}"
    if "EOF" in text:  # the server's alert may be lost with the connection
        return f"TLS failed; it may demand a client's certificate (certfile, keyfile): {text}"
    return f"TLS failed: {text}"


def connection_lost(error: BaseException, address: str) -> BrokerError:
    """Return outbox's error for a connection to ``address`` that ended."""
    match error:
        case pika.exceptions.ConnectionClosed():
            why = reply_of(error)
        case _:
            why = _innermost(error)
    return _chained(ConnectionLost(f"the connection to {address} was lost: {why}"), error)


def was_ended_for_an_error(error: BrokerError) -> bool:
    """Return whether the broker ended a connection because of what was sent over it, perhaps."""
    cause = error.__cause__
    return (
        isinstance(cause, pika.exceptions.ConnectionClosedByBroker)
        and cause.reply_code not in _NO_ERRORS_OF_CLIENTS
    )


def _chained(error: BrokerError, cause: BaseException) -> BrokerError:
    error.__cause__ = cause
    return error


def _innermost(error: BaseException) -> str:
    """Return the text of the exception that pika has wrapped in others."""
    for _ in range(10):
        inner = getattr(error, "exceptions", None) or getattr(error, "exception", None)
        if isinstance(inner, list | tuple) and inner:
            inner = inner[-1]
        if not isinstance(inner, BaseException) and error.args:
            inner = error.args[0]
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = one_line(" ".join(str(error).split()))
    return text or type(error).__name__
