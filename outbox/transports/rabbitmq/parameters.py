"""Turns a broker URL into pika's connection parameters."""

from __future__ import annotations

import ssl

import pika

from outbox.errors import UsageError
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["connection_parameters"]

_TLS_OPTIONS = ("cafile", "certfile", "keyfile")


def connection_parameters(
    url: BrokerURL, settings: Settings, role: str
) -> list[pika.ConnectionParameters]:
    """Return the parameters for each host of ``url``, in its order.

    Certificates and their host names are always verified.

    Args:
        url: an ``amqp`` or ``amqps`` URL. Options: ``cafile`` (PEM of the authorities to trust
            instead of the system's), ``certfile`` and ``keyfile`` (the client's, PEM).
        settings: the settings with the heartbeat, the timeouts and the name.
        role: the purpose of the connection, which becomes a part of its name.

    Raises:
        UsageError: an option is unknown, or its file can't be read.
    """
    unknown = [name for name in url.options if name not in _TLS_OPTIONS]
    if unknown or (url.options and url.scheme == "amqp"):
        raise UsageError(
            f"unknown option {next(iter(unknown or url.options))!r} in the {url.scheme} URL; "
            f"amqps has the options {', '.join(_TLS_OPTIONS)}"
        )
    context = _tls_context(url.options) if url.scheme == "amqps" else None
    return [
        pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=url.vhost,
            credentials=pika.PlainCredentials(url.user, url.password),
            heartbeat=settings.heartbeat,
            socket_timeout=settings.connect_timeout,
            stack_timeout=settings.connect_timeout,
            connection_attempts=1,
            ssl_options=pika.SSLOptions(context, host) if context else None,
            client_properties={"connection_name": f"{settings.connection_name} {role}"},
        )
        for host, port in url.hosts
    ]


def _tls_context(options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"the TLS files of the amqps URL cannot be used: {error}") from error
    return context
