"""What connects handlers to databases, made fresh for every message.

A worker runs for months. A session that was left in a transaction, or a connection that a database
or a firewall has closed meanwhile, must not become the next message's failure.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from outbox import storing

__all__ = ["refreshers"]


def refreshers(*, is_async: bool) -> list[Callable[[], Any]]:
    """Return what is to be called before and after a message, where its handler runs.

    - Django's connections are closed that are broken or older than ``CONN_MAX_AGE``, as Django does
      it around a request.
    - The session that ``outbox.sql.bind()`` was given is removed, if it is a scoped one.

    Args:
        is_async: for a coroutine: what it returns may have to be awaited.
    """
    found: list[Callable[[], Any]] = []
    django: Any = sys.modules.get("django.db")
    if django is not None and sys.modules["django.conf"].settings.configured:
        close = django.close_old_connections
        if is_async:
            # Where sync_to_async runs what uses Django's connections.
            close = sys.modules["asgiref.sync"].sync_to_async(close)
        found.append(close)
    remove = storing.remove
    if remove is not None and (is_async or not inspect.iscoroutinefunction(remove)):
        found.append(remove)
    return found
