"""The settings of an application's publisher, from ``app.config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outbox.errors import UsageError
from outbox.settings import SettingOverrides, Settings, suggestion
from outbox.url import BrokerURL

__all__ = ["AppConfig"]

_PREFIX = "OUTBOX_"
_URL = "OUTBOX_URL"
_DATABASE_URL = "OUTBOX_DATABASE_URL"
_SETTINGS = {f"{_PREFIX}{name.upper()}": name for name in SettingOverrides.__annotations__}


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What ``app.config`` says about outbox; the environment gives what it lacks.

    Attributes:
        url: the broker URL, or None.
        database_url: the URL of the database with the stored events, or None; for commands.
        overrides: the settings that are set.
    """

    url: str | None
    database_url: str | None
    overrides: SettingOverrides

    def __repr__(self) -> str:
        return f"<AppConfig {', '.join(self.overrides)}>"  # a URL may hold a password

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AppConfig:
        """Read the keys of ``config`` that begin with ``OUTBOX_``; None counts as unset.

        Raises:
            UsageError: a key is unknown, or its value invalid; the message names it.
        """
        overrides: dict[str, Any] = {}
        for key, value in config.items():
            if not key.startswith(_PREFIX):
                continue
            if key not in (*_SETTINGS, _URL, _DATABASE_URL):
                raise UsageError(f"app.config has the unknown key {key!r}; {_hint(key)}")
            if value is not None and key in _SETTINGS:
                overrides[_SETTINGS[key]] = _checked(key, value)
        return cls(_url_in(config), config.get(_DATABASE_URL) or None, overrides)  # type: ignore[arg-type]


def _hint(key: str) -> str:
    known = [known.removeprefix(_PREFIX) for known in (*_SETTINGS, _URL, _DATABASE_URL)]
    return suggestion(key.removeprefix(_PREFIX), known, _PREFIX)


def _checked(key: str, value: Any) -> Any:
    try:
        Settings.load(None, {_SETTINGS[key]: value}, {})
    except UsageError as error:
        raise UsageError(f"app.config[{key!r}]: {error}") from None
    return value


def _url_in(config: Mapping[str, Any]) -> str | None:
    url = config.get(_URL)
    if url is None or (isinstance(url, str) and not url.strip()):
        return None
    try:
        if not isinstance(url, str):
            raise UsageError(f"a URL is a string, not {type(url).__name__}")
        BrokerURL.parse(url.strip())
    except UsageError as error:
        raise UsageError(f"app.config['{_URL}']: {error}") from None
    return url.strip()
