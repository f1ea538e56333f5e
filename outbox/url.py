"""Broker URLs: one parser for every transport, and no password in any message."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote

from outbox.errors import UsageError

__all__ = ["SCHEMES", "BrokerURL", "masked"]

_SERVERS = ("postgresql", "mariadb")
SCHEMES = ("amqp", "amqps", *_SERVERS, "sqlite", "memory")
_FORMS = (
    "amqp://user:password@host:5672/vhost, postgresql://user:password@host/database, "
    "mariadb://user:password@host/database, sqlite:///outbox.db or memory://"
)
_DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "postgresql": 5432, "mariadb": 3306}
_ESCAPE = "percent-encode characters such as / : @ # ? % in the user, password and {path}"
_PATHS = {scheme: "vhost" if scheme.startswith("amqp") else "database" for scheme in SCHEMES}
_ALSO = {"postgres": "postgresql", "mysql": "mariadb"}
"""Other names of databases, which many URLs have."""
_WELL_FORMED = re.compile(r"[a-z][a-z0-9+.-]{0,29}", re.ASCII)  # RFC 3986, section 3.1
_MEANT = {
    "pyamqp": "amqp",
    "librabbitmq": "amqp",
    "rabbitmq": "amqp",
    "pyamqps": "amqps",
    "rabbitmqs": "amqps",
    "amqp+ssl": "amqps",
    "amqp+tls": "amqps",
    "sqlite3": "sqlite",
}
"""Other clients' names of the schemes."""
_DATABASES = ("oracle", "mssql", "cockroachdb", "mongodb")


@dataclass(frozen=True, slots=True)
class BrokerURL:
    """A parsed broker URL. ``str()`` and ``repr()`` mask the password and omit the options.

    Attributes:
        scheme: ``amqp``, ``amqps``, ``postgresql``, ``mariadb``, ``sqlite`` or ``memory``.
        hosts: (host, port) pairs in the order they are tried; empty for a file or memory, and where
            the options of a database server's URL say how to reach it.
        user: the decoded user; ``guest`` if an AMQP URL doesn't name one, else empty.
        password: the decoded password; ``guest`` if an AMQP URL doesn't contain one, else empty.
        vhost: the decoded vhost; ``/`` if missing or empty.
        path: the path of the file, for ``sqlite``; the name of the database on a server.
        options: the decoded query.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    path: str = ""
    options: dict[str, str] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def parse(cls, url: str) -> BrokerURL:
        """Parse ``url``.

        ``amqp(s)://[user[:password]@]host[:port][,host[:port]...][/vhost][?option=value&...]``:
        user, password and vhost are percent-decoded; ``amqp://host``, ``amqp://host/`` and
        ``amqp://host/%2F`` all name the vhost ``/``, as RabbitMQ's clients do, and
        ``amqp://host//`` too, as Celery writes it.

        ``postgresql://`` and ``mariadb://`` are the same, with a database instead of the vhost.
        ``postgres://`` and ``mysql://`` mean them, too, and a driver in the scheme
        (``postgresql+asyncpg://``) is ignored.

        White space around the URL, such as the line break at the end of a secret's file, is not
        part of it; write a vhost or password that ends in a space with ``%20``.

        Raises:
            UsageError: the URL is not one of these forms. The message names its scheme, but
                holds neither the password nor any part of the URL that might contain it.
        """
        if not isinstance(url, str):
            raise UsageError(f"the broker URL is a {type(url).__name__}, not a string: {_FORMS}")
        if not _is_utf8(url):
            raise UsageError("the broker URL is not UTF-8; percent-encode what is not ASCII")
        scheme, separator, rest = url.strip().partition("://")
        scheme = _plain(scheme.lower())
        if not separator or scheme not in SCHEMES:
            raise UsageError(_wrong_scheme(scheme if separator else "", url))
        rest, _, query = rest.partition("?")
        try:
            options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        except ValueError:
            raise UsageError(
                f"the options of the {scheme} URL are not name=value pairs; {_escape(scheme)}"
            ) from None
        if scheme in ("memory", "sqlite"):
            path = _decoded(rest.removeprefix("/"), scheme)
            return cls(scheme, path=path, options=options)
        credentials, at, address = rest.rpartition("@")
        address, _, vhost = address.partition("/")
        is_server = scheme in _SERVERS
        # RabbitMQ's URI specification allows no "/" in a vhost, so that nothing else is meant by
        # "//". kombu takes the second one for the vhost.
        vhost = "" if vhost == "/" else vhost
        # Text before an "@" in the options may be the rest of a password.
        if "/" in vhost or "/" in credentials or "#" in rest or "@" in query:
            raise UsageError(f"the {scheme} URL cannot be parsed; {_escape(scheme)}")
        user, colon, password = credentials.partition(":")
        if ":" in password:
            raise UsageError(f"the {scheme} URL cannot be parsed; {_escape(scheme)}")
        default = "" if is_server else "guest"
        return cls(
            scheme,
            tuple(_host(host, scheme) for host in address.split(",") if address or not is_server),
            _decoded(user, scheme) if at else default,
            _decoded(password, scheme) if colon else default,
            "/" if is_server else _vhost(_decoded(vhost, scheme) or "/", scheme),
            _decoded(vhost, scheme) if is_server else "",
            options=options,
        )

    @property
    def is_database(self) -> bool:
        """Whether the broker is a database."""
        return self.scheme == "sqlite" or self.scheme in _SERVERS

    def __str__(self) -> str:
        if self.scheme in ("memory", "sqlite"):
            return f"{self.scheme}:///{self.path}" if self.path else f"{self.scheme}://"
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        if self.scheme in _SERVERS:
            user = quote(self.user, safe="") + (":***" if self.password else "")
            return f"{self.scheme}://{user}{'@' if user else ''}{hosts}/{quote(self.path, '')}"
        return f"{self.scheme}://{quote(self.user, safe='')}:***@{hosts}/{quote(self.vhost, '')}"


def masked(url: str | None) -> str | None:
    """Return ``url`` without its password and options, to be shown; ``***`` if it is invalid."""
    if url is None:
        return None
    try:
        return str(BrokerURL.parse(url))
    except UsageError:
        return "***"


def _plain(scheme: str) -> str:
    """Return outbox's name for a scheme that names a database server; others as they are."""
    family = scheme.partition("+")[0]
    name = _ALSO.get(family, family)
    return name if name in _SERVERS and _WELL_FORMED.fullmatch(scheme) else scheme


def _escape(scheme: str) -> str:
    return _ESCAPE.format(path=_PATHS[scheme])


def _wrong_scheme(scheme: str, url: str) -> str:
    """Return what is wrong with a URL that has ``scheme`` before its first ``://``, if any."""
    forms = f"use {_FORMS}"
    if not url.strip():
        return f"the broker URL is empty; {forms}"
    if not scheme:
        return f"the broker URL has no scheme; {forms}"
    if scheme[0] in "\"'" and scheme[1:] in SCHEMES:
        return f"the broker URL is in quotes, which are part of the value here; {forms}"
    if not _WELL_FORMED.fullmatch(scheme):  # it may hold the user and the password
        return f"the broker URL doesn't begin with a scheme; {forms}"
    family = scheme.partition("+")[0]
    meant = _MEANT.get(scheme) or (family if family in SCHEMES else "")
    if meant:
        remedy = f"write {meant}://"
    elif family in _DATABASES:
        remedy = f"it names a database in which events can't be stored; {forms}"
    else:
        remedy = forms
    return f"the broker URL has the scheme {scheme!r}, which outbox doesn't know; {remedy}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # the environment may hold bytes that are not
        return False
    return True


def _decoded(text: str, scheme: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        decoded = "\0"
    if "\0" in decoded:
        raise UsageError(
            f"the percent-encoded text in the {scheme} URL is not UTF-8 text"
        ) from None
    return decoded


def _vhost(vhost: str, scheme: str) -> str:
    if len(vhost.encode()) > 255:  # AMQP 0-9-1, section 1.5.2.5: a short string
        raise UsageError(f"the vhost in the {scheme} URL has more than 255 bytes in UTF-8")
    return vhost


def _host(text: str, scheme: str) -> tuple[str, int]:
    """Split ``host:port``, ``host`` or ``[v6]:port``."""
    # Never quote the text: it may be part of a password that was not percent-encoded.
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        valid = bool(closed) and (not port or port.startswith(":"))
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
        valid = True
    if not valid or not host or not host.isprintable() or " " in host:
        raise UsageError(
            f"the {scheme} URL has no host, or a part of it is empty; {_escape(scheme)}"
        )
    if not port:
        return host, _DEFAULT_PORTS[scheme]
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not digits or not 0 < int(port) < 65536:
        raise UsageError(
            f"the port in the {scheme} URL is not a number from 1 to 65535; {_escape(scheme)}"
        )
    return host, int(port)
