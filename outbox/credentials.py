"""Credentials for a broker that change while the process runs: passwords, OAuth 2 tokens."""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from outbox.errors import UsageError
from outbox.system.signatures import takes_no_arguments

__all__ = ["Credentials", "CredentialsProvider", "checked_provider", "credentials_of", "imported"]

_LEAST = 0.001  # seconds for which a token is valid that has expired already


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a connection logs in with. ``repr()`` masks the password.

    Attributes:
        user: the user; RabbitMQ ignores it where the password is an OAuth 2 token.
        password: the password, or the token.
        valid_for: the seconds for which they are valid, more than 0; None for any time, or for what
            a token says if it is a JSON Web Token. After four fifths of it an open connection gets
            new ones (RabbitMQ's ``update-secret``): with an expired token, RabbitMQ refuses what is
            done over the connection, or closes it.
    """

    user: str
    password: str = field(repr=False)
    valid_for: float | None = None


CredentialsProvider: TypeAlias = Callable[[], Credentials | tuple[str, str] | str]
"""A function that returns the credentials of the moment: a user and a password, or a token."""


def checked_provider(value: Any, where: str) -> Any:
    """Return ``value`` if it can provide credentials, or is None.

    Raises:
        UsageError: it isn't a function without arguments, or it is a coroutine function.
    """
    if value is None:
        return None
    if not callable(value):
        raise UsageError(f"{where} is not callable, but a {type(value).__name__}")
    if inspect.iscoroutinefunction(value):
        raise UsageError(f"{where} is a coroutine function; a thread without a loop calls it")
    if not takes_no_arguments(value):
        raise UsageError(f"{where} must take no arguments")
    return value


def credentials_of(provider: CredentialsProvider) -> Credentials:
    """Ask ``provider``; a text alone is a token.

    Raises:
        UsageError: it returned something else; the message doesn't contain it.
        Exception: it raised it.
    """
    given: Any = provider()
    if isinstance(given, str):
        given = Credentials("", given)
    elif isinstance(given, tuple | list) and len(given) == 2:
        given = Credentials(*given)
    if not isinstance(given, Credentials):
        raise UsageError(
            f"credentials() has returned a {type(given).__name__}; return Credentials(...), "
            "(user, password) or a token"
        )
    for name in ("user", "password"):
        value = getattr(given, name)
        if not isinstance(value, str) or "\0" in value:
            raise UsageError(f"the {name} that credentials() has returned is not text without NUL")
    valid_for = given.valid_for
    if valid_for is not None and not (isinstance(valid_for, int | float) and valid_for > 0):
        raise UsageError(f"valid_for is {valid_for!r}, not a number of seconds, more than 0")
    if valid_for is None and (expires_at := _expiry_of(given.password)) is not None:
        return replace(given, valid_for=max(_LEAST, expires_at - time.time()))
    return given


def _expiry_of(token: str) -> float | None:
    """Return when a JSON Web Token expires, in seconds since the epoch; None if it isn't one."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        expires_at = claims.get("exp")
    except (ValueError, AttributeError):
        return None
    return expires_at if type(expires_at) in (int, float) else None


def imported(name: str, where: str) -> Any:
    """Return the function that ``name`` (``MODULE:FUNCTION``) is.

    Raises:
        UsageError: there is none.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"{where} is {name!r:.80}, not MODULE:FUNCTION")
    try:
        member: Any = importlib.import_module(module_name)
        for part in path.split("."):
            member = getattr(member, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{where} is {name!r:.80}, which can't be imported: {error}") from error
    return member
