"""Turns a broker URL into pika's connection parameters."""

from __future__ import annotations

import ssl

import pika
import pika.credentials

from outbox.errors import UsageError
from outbox.settings import Settings
from outbox.system.version import installed_version
from outbox.url import BrokerURL

__all__ = ["CONSUMER", "VERSION_PROPERTY", "connection_parameters"]

CONSUMER = "consumer"
"""The role of a worker's connection."""
VERSION_PROPERTY = "outbox_version"
"""The property by which a worker's connection names the version of outbox."""

_FILES = ("cafile", "certfile", "keyfile")
_OPTIONS = (*_FILES, "auth")


def connection_parameters(
    url: BrokerURL, settings: Settings, role: str
) -> list[pika.ConnectionParameters]:
    """Return the parameters for each host of ``url``, in its order.

    Certificates and their host names are always verified.

    Args:
        url: an ``amqp`` or ``amqps`` URL. Options: ``cafile`` (PEM of the authorities to trust
            instead of the system's), ``certfile`` and ``keyfile`` (the client's, PEM); ``auth``,
            which can be ``external``: log in as the user that the broker finds in the client's
            certificate (SASL EXTERNAL), without a password.
        settings: the settings with the heartbeat, the timeouts and the name.
        role: the purpose of the connection, which becomes a part of its name.

    Raises:
        UsageError: an option is unknown or its value is, or a file can't be read.
    """
    unknown = [name for name in url.options if name not in _OPTIONS]
    if unknown or (url.options and url.scheme == "amqp"):
        raise UsageError(
            f"unknown option {next(iter(unknown or url.options))!r} in the {url.scheme} URL; "
            f"amqps has the options {', '.join(_OPTIONS)}"
        )
    if settings.credentials is not None and "auth" in url.options:
        raise UsageError(f"auth in the {url.scheme} URL excludes the setting 'credentials'")
    credentials = _credentials(url)
    context = _tls_context(url.options) if url.scheme == "amqps" else None
    properties = {"connection_name": f"{settings.connection_name} {role}"}
    if role == CONSUMER:  # finding it out takes more time than a short program should lose
        properties[VERSION_PROPERTY] = installed_version()
    return [
        pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=url.vhost,
            credentials=credentials,
            heartbeat=settings.heartbeat,
            socket_timeout=settings.connect_timeout,
            stack_timeout=settings.connect_timeout,
            connection_attempts=1,
            ssl_options=pika.SSLOptions(context, host) if context else None,
            client_properties=properties,
        )
        for host, port in url.hosts
    ]


def _credentials(
    url: BrokerURL,
) -> pika.PlainCredentials | pika.credentials.ExternalCredentials:
    auth = url.options.get("auth")
    if auth is None:
        return pika.PlainCredentials(url.user, url.password)
    if auth != "external":
        raise UsageError(f"auth in the {url.scheme} URL is {auth!r}; it can only be 'external'")
    if "certfile" not in url.options:
        raise UsageError(f"auth=external in the {url.scheme} URL needs a certfile, too")
    return pika.credentials.ExternalCredentials()


def _tls_context(options: dict[str, str]) -> ssl.SSLContext:
    used = {name: options[name] for name in _FILES if name in options}
    for name, path in used.items():
        try:
            with open(path, "rb"):
                pass
        except (OSError, ValueError) as error:
            raise _unusable(f"{name} {path!r}", error) from error
    what = " and ".join(f"{name} {path!r}" for name, path in used.items())
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(what, error) from error
    return context


def _unusable(what: str, error: Exception) -> UsageError:
    return UsageError(f"the TLS files of the amqps URL cannot be used: {what}: {error}")
