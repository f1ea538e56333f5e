"""Whether a thread in the background can do its work here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from outbox.errors import UsageError

__all__ = ["check_threads", "why_not"]


def check_threads() -> None:
    """Raise UsageError where a publisher's thread would not run, or block all others."""
    reason = why_not(sys.modules)
    if reason:
        raise UsageError(f"a publisher's thread cannot work here: {reason}")


def why_not(modules: Mapping[str, Any]) -> str | None:
    """Return why threads cannot work, and what to do, as far as ``modules`` tell; or None.

    Only what is imported already is looked at:

    - gevent: patched whole, or not at all. Sockets that belong to greenlets in a thread that does
      not, or the other way round, block each other.
    - eventlet: the same.
    - uWSGI: releases the interpreter to threads only when told to (its documentation, "Things to
      know", on ``enable-threads``).
    """
    monkey = modules.get("gevent.monkey")
    if monkey is not None:
        patched = {
            name: monkey.is_module_patched(name) for name in ("threading", "socket", "select")
        }
        if len(set(patched.values())) > 1:
            return _half("gevent", patched, "gevent.monkey.patch_all()")
    patcher = modules.get("eventlet.patcher")
    if patcher is not None:
        patched = {name: patcher.is_monkey_patched(name) for name in ("thread", "socket", "select")}
        if len(set(patched.values())) > 1:
            return _half("eventlet", patched, "eventlet.monkey_patch()")
    uwsgi = modules.get("uwsgi")
    if uwsgi is not None:
        options = getattr(uwsgi, "opt", {})
        if not {"enable-threads", "threads"} & {_text(name) for name in options}:
            return "uWSGI runs no threads beside requests: set enable-threads = true (or threads)"
    return None


def _half(library: str, patched: Mapping[str, bool], call: str) -> str:
    those = ", ".join(name for name, is_patched in patched.items() if is_patched)
    others = ", ".join(name for name, is_patched in patched.items() if not is_patched)
    return (
        f"{library} has patched {those}, but not {others}: call {call} without arguments, "
        "first of all, or do not patch"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
