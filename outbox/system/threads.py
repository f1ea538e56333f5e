"""Checks that a background thread can work here, and whether it is a thread or a greenlet."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from outbox.errors import UsageError

__all__ = ["check_start", "check_threads", "greenlets_of", "why_not", "why_not_yet"]


def check_threads() -> None:
    """Raise UsageError where a publisher's thread would not run, or block all others."""
    reason = why_not(sys.modules)
    if reason:
        raise UsageError(f"a publisher's thread cannot work here: {reason}")


def check_start() -> None:
    """Raise UsageError where a publisher's thread must not be started, now or at all."""
    check_threads()
    reason = why_not_yet(sys.modules, os.getpid())
    if reason:
        raise UsageError(f"a publisher's thread cannot work here: {reason}")


def why_not_yet(modules: Mapping[str, Any], pid: int) -> str | None:
    """Return why a thread must not be started in the process ``pid`` as yet, or None.

    uWSGI's master imports the application and forks workers from then on, and does not prepare
    Python for it unless told to: where a thread of the master waits for the interpreter at that
    moment, the worker inherits a lock of it in the midst of changing hands, and hangs.
    """
    uwsgi = modules.get("uwsgi")
    if uwsgi is None or greenlets_of(modules) is not None:
        return None
    if getattr(uwsgi, "masterpid", int)() != pid:
        return None
    if "py-call-uwsgi-fork-hooks" in {_text(name) for name in getattr(uwsgi, "opt", ())}:
        return None
    return (
        "uWSGI's master would fork workers beside it, which may hang: set "
        "py-call-uwsgi-fork-hooks = true (or lazy-apps), or publish in workers alone"
    )


def greenlets_of(modules: Mapping[str, Any]) -> str | None:
    """Return the library whose greenlets :mod:`threading` starts instead of threads, or None."""
    for library, patched in _patches(modules):
        if next(iter(patched.values())):
            return library
    return None


def why_not(modules: Mapping[str, Any]) -> str | None:
    """Return why threads cannot work, and what to do, as far as ``modules`` tell; or None.

    Only what is imported already is looked at:

    - gevent: patched whole, or not at all. Sockets that belong to greenlets in a thread that does
      not, or the other way round, block each other.
    - eventlet: the same.
    - uWSGI: releases the interpreter to threads only when told to (its documentation, "Things to
      know", on ``enable-threads``), before version 2.0.27. And it runs greenlets all the time only
      in its own loop engine for them: otherwise while a request is served, and heartbeats stop.
    """
    for library, patched in _patches(modules):
        if len(set(patched.values())) > 1:
            return _half(library, patched)
    uwsgi = modules.get("uwsgi")
    if uwsgi is None:
        return None
    green = greenlets_of(modules)
    if green is not None:
        if _text(getattr(uwsgi, "loop", "")) != green:
            return (
                f"uWSGI runs greenlets of {green} only while it serves a request: "
                "use its own loop for gevent (gevent = 100), or do not patch"
            )
    elif not getattr(uwsgi, "has_threads", True):
        return "uWSGI runs no threads beside requests: set enable-threads = true (or threads)"
    return None


_CALLS = {"gevent": "gevent.monkey.patch_all()", "eventlet": "eventlet.monkey_patch()"}


def _patches(modules: Mapping[str, Any]) -> list[tuple[str, dict[str, bool]]]:
    """Return for each library of greenlets that is imported what it has patched, threads first."""
    found = []
    monkey = modules.get("gevent.monkey")
    if monkey is not None:
        names = ("threading", "socket", "select")
        found.append(("gevent", {name: monkey.is_module_patched(name) for name in names}))
    patcher = modules.get("eventlet.patcher")
    if patcher is not None:
        names = ("thread", "socket", "select")
        found.append(("eventlet", {name: patcher.is_monkey_patched(name) for name in names}))
    return found


def _half(library: str, patched: Mapping[str, bool]) -> str:
    those = ", ".join(name for name, is_patched in patched.items() if is_patched)
    others = ", ".join(name for name, is_patched in patched.items() if not is_patched)
    return (
        f"{library} has patched {those}, but not {others}: call {_CALLS[library]} without "
        "arguments, first of all, or do not patch"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
