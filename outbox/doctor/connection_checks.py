"""Checks of the connection to RabbitMQ."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotApplicable, NotChecked, Problem
from outbox.errors import BrokerError, OutboxError, UsageError
from outbox.settings import MIB

__all__ = ["CHECKS"]

_EXPIRES_SOON = 14 * 86_400.0  # seconds
_OLDEST = (3, 10)
_LIMITS_MESSAGES = (4, 0)
_DEFAULT_LIMITS = (128 * MIB, 16 * MIB)
"""The largest message by default: before 4.0, and since."""
_SLOWEST_HEARTBEAT = 60
_SMALLEST_FRAME = 8192
_CLOCKS_MAY_DIFFER = 2.0
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_TLS_ALERT = b"\x15\x03"


def _reachable(examined: Examined) -> Iterator[Problem]:
    if not examined.is_rabbitmq:
        raise NotApplicable
    url, timeout = examined.url, examined.settings.connect_timeout
    from outbox.transports.rabbitmq.parameters import connection_parameters

    try:
        parameters = connection_parameters(url, examined.settings, "doctor")
    except UsageError as error:
        yield Problem("error", str(error))
        return
    failure: BrokerError | None = None
    try:
        examined.open_probe()
    except BrokerError as error:
        failure = None if _is_refused_login(error) else error
    failures = []
    for each in parameters:
        context = each.ssl_options.context if each.ssl_options is not None else None
        # Without need nothing is sent: the broker would log a handshake that was broken off.
        problem = _problem_of(each.host, each.port, context, timeout, ask=failure is not None)
        if problem is not None:
            failures.append(problem)
    # With several hosts, outbox tries the next one.
    for problem in failures:
        is_fatal = failure is not None and problem.severity == "error"
        yield problem if is_fatal else Problem("warning", problem.text, problem.remedy)
    if failure is not None and all(problem.severity != "error" for problem in failures):
        yield Problem("error", str(failure))


def _problem_of(
    host: str, port: int, context: ssl.SSLContext | None, timeout: float, *, ask: bool
) -> Problem | None:
    """Return what is wrong on the way to a host, before anything of AMQP."""
    address = f"{host}:{port}"
    try:
        connection = socket.create_connection((host, port), timeout)
    except socket.gaierror as error:
        text = f"the name {host!r} does not resolve: {error.strerror}"
        return Problem("error", text, "Check the host in the broker URL, and the name server.")
    except OSError as error:
        text = f"{address} cannot be reached: {error.strerror or error}"
        remedy = "Check that the broker runs, its port, and the firewalls between."
        return Problem("error", text, remedy)
    with connection:
        if context is None:
            return _problem_of_plain(connection, address) if ask else None
        try:
            with context.wrap_socket(connection, server_hostname=host) as secured:
                return _problem_of_certificate(secured.getpeercert() or {}, address)
        except ssl.SSLCertVerificationError as error:
            return Problem(
                "error",
                f"the certificate of {address} is refused: {error.verify_message}",
                "Name the authority's file in the URL (?cafile=...), or the host as the "
                "certificate has it.",
            )
        except ssl.SSLError as error:
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                text = f"{address} does not speak TLS, which amqps:// asks for"
                return Problem("error", text, "Use the port for TLS (5671), or amqp://.")
            return Problem("error", f"TLS with {address} failed: {error.reason or error}")
        except OSError as error:
            return Problem("error", f"TLS with {address} failed: {error}")


def _problem_of_plain(connection: socket.socket, address: str) -> Problem | None:
    try:
        connection.sendall(_PROTOCOL_HEADER)
        answer = connection.recv(2)
    except OSError as error:
        text = f"{address} accepts connections, but does not answer: {error.strerror or error}"
        return Problem("error", text)
    if answer.startswith(_TLS_ALERT):
        return Problem("error", f"{address} speaks TLS", "Write amqps:// in the broker URL.")
    if not answer.startswith(b"\x01"):  # a method frame: Connection.Start
        return Problem("error", f"{address} does not speak AMQP 0-9-1")
    return None


def _problem_of_certificate(certificate: Any, address: str) -> Problem | None:
    left = None
    with contextlib.suppress(KeyError, ValueError):
        left = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
    if left is None or left > _EXPIRES_SOON:
        return None
    text = f"the certificate of {address} expires in {left / 86_400:.0f} days"
    return Problem("warning", text, "Renew it.")


def _is_refused_login(error: BrokerError) -> bool:
    from outbox.doctor.broker_probe import REFUSED_LOGIN

    return isinstance(error.__cause__, REFUSED_LOGIN)


def _login(examined: Examined) -> Iterator[Problem]:
    if not examined.is_rabbitmq:
        raise NotApplicable
    try:
        examined.open_probe()
    except OutboxError as error:
        if not isinstance(error, BrokerError) or not _is_refused_login(error):
            raise NotChecked("the broker can't be reached (OBX102)") from None
        yield Problem("error", str(error))


def _version(examined: Examined) -> Iterator[Problem]:
    probe = examined.probe
    if probe.product != "RabbitMQ":
        yield Problem(
            "warning",
            f"the broker is {probe.product or 'unknown'}, with which outbox is not tested",
        )
    elif probe.version and probe.version < _OLDEST:
        number = ".".join(map(str, probe.version))
        yield Problem("error", f"the broker is RabbitMQ {number}, older than 3.10")
    elif not probe.version:
        raise NotChecked("the broker does not name its version")


def _heartbeat(examined: Examined) -> Iterator[Problem]:
    heartbeat = examined.probe.heartbeat
    if not heartbeat:
        yield Problem(
            "warning", "there are no heartbeats, so that a dead connection may stay unnoticed"
        )
    elif heartbeat > _SLOWEST_HEARTBEAT:
        yield Problem("warning", f"a heartbeat is due only every {heartbeat} s")


def _sizes(examined: Examined) -> Iterator[Problem]:
    probe, most = examined.probe, examined.settings.max_body_bytes
    limit = _DEFAULT_LIMITS[probe.version >= _LIMITS_MESSAGES]
    if most > limit:
        number = ".".join(map(str, probe.version))
        yield Problem(
            "warning",
            f"max_body_bytes is {most:,}, but RabbitMQ {number} takes messages up to {limit:,} "
            "bytes by default",
        )
    if 0 < probe.frame_max < _SMALLEST_FRAME:
        yield Problem(
            "warning",
            f"frames are limited to {probe.frame_max} bytes, which an event's headers may exceed",
            "Raise frame_max in rabbitmq.conf.",
        )


def _clocks(examined: Examined) -> Iterator[Problem]:
    unchecked = []
    try:
        difference = examined.management.clock_difference
        if difference is not None and abs(difference) > _CLOCKS_MAY_DIFFER:
            yield _clock_problem("broker", difference)
    except NotApplicable:
        pass
    except NotChecked as error:
        unchecked.append(f"the broker's: {error}")
    try:
        engine = examined.engine
        from outbox.doctor.database_checks import clock_difference

        difference = clock_difference(engine)
        if abs(difference) > _CLOCKS_MAY_DIFFER:
            yield _clock_problem("database", difference)
    except NotChecked as error:
        unchecked.append(f"the database's: {error}")
    if unchecked:
        raise NotChecked("; ".join(unchecked))


def _clock_problem(whose: str, difference: float) -> Problem:
    how = "ahead of" if difference > 0 else "behind"
    seconds = abs(difference)
    return Problem("warning", f"the clock of the {whose} is {seconds:.0f} s {how} this machine's")


CHECKS = (
    Check(
        "OBX102",
        "the way to the broker: name, port, TLS, certificate",
        "Correct the broker URL, or what is between this machine and the broker.",
        _reachable,
    ),
    Check(
        "OBX103",
        "the user and the vhost",
        "Correct user, password and vhost in the broker URL, or create them: rabbitmqctl add_user, "
        "add_vhost, set_permissions.",
        _login,
    ),
    Check("OBX104", "the broker's version", "Upgrade the broker.", _version),
    Check(
        "OBX114",
        "the heartbeat",
        "Set OUTBOX_HEARTBEAT to 20, or another number of seconds up to 60.",
        _heartbeat,
    ),
    Check(
        "OBX115",
        "the sizes that the broker accepts",
        "Lower max_body_bytes, or raise max_message_size in rabbitmq.conf.",
        _sizes,
    ),
    Check("OBX116", "the clocks", "Synchronise the machines' clocks (NTP).", _clocks),
)
