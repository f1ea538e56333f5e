"""The one table that turns pika's exceptions into outbox's."""

from __future__ import annotations

import pika.exceptions

from outbox.errors import BrokerError, ConnectFailed, ConnectionLost

__all__ = ["connect_failed", "connection_lost", "one_line", "told"]


def one_line(text: str | bytes) -> str:
    """Return ``text`` of a broker or a driver as it may stand in a message or a log line.

    It may quote what a client sent: line breaks and other controls are escaped. The broker cuts
    it at 255 bytes; what is no UTF-8 then, pika leaves as bytes.
    """
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def told(
    reason: pika.exceptions.ChannelClosedByBroker | pika.exceptions.ConnectionClosed,
) -> str:
    """Return the reply code and text with which the broker closed something."""
    return f"{reason.reply_code} {one_line(reason.reply_text)}"


def connect_failed(error: BaseException, address: str) -> BrokerError:
    """Return what to tell of a connection to ``address`` that did not open."""
    match error:
        case pika.exceptions.ProbableAuthenticationError():
            why = "the broker refused the user or the password"
        case pika.exceptions.ProbableAccessDeniedError():
            why = "the user may not use this vhost, or it does not exist"
        case pika.exceptions.IncompatibleProtocolError():
            why = "whatever answers there does not speak AMQP 0-9-1"
        case pika.exceptions.ConnectionClosed():
            why = told(error)
        case _:
            why = _innermost(error)
    return _chained(ConnectFailed(f"cannot connect to {address}: {why}"), error)


def connection_lost(error: BaseException, address: str) -> BrokerError:
    """Return what to tell of a connection to ``address`` that ended."""
    match error:
        case pika.exceptions.ConnectionClosed():
            why = told(error)
        case _:
            why = _innermost(error)
    return _chained(ConnectionLost(f"the connection to {address} was lost: {why}"), error)


def _chained(error: BrokerError, cause: BaseException) -> BrokerError:
    error.__cause__ = cause
    return error


def _innermost(error: BaseException) -> str:
    """Return the text of the exception that pika's layers are wrapped around."""
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
