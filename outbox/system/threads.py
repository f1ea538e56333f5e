"""Checks that a background thread can work here, and whether it is a thread or a greenlet."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from outbox.errors import UsageError

__all__ = ["check_start", "check_threads", "greenlets_of", "why_not", "why_not_yet"]


def check_threads() -> None:
    """Raise UsageError if a publisher's thread would not run, or would block all others."""
    reason = why_not(sys.modules)
    if reason:
        raise UsageError(f"a publisher's thread cannot work here: {reason}")


def check_start() -> None:
    """Raise UsageError if a publisher's thread must not be started, now or at all."""
    check_threads()
    reason = why_not_yet(sys.modules, os.getpid())
    if reason:
        raise UsageError(f"a publisher's thread cannot work here: {reason}")


def why_not_yet(modules: Mapping[str, Any], pid: int) -> str | None:
    """Return the reason why a thread must not be started in the process ``pid`` yet, or None.

    uWSGI's master imports the application, then forks workers, and prepares Python for that only if
    configured to: if a thread of the master waits for the interpreter at that moment, the worker
    inherits an interpreter lock that is changing hands, and hangs.
    """
    uwsgi = modules.get("uwsgi")
    if uwsgi is None or greenlets_of(modules) is not None:
        return None
    if getattr(uwsgi, "masterpid", int)() != pid:
        return None
    if "py-call-uwsgi-fork-hooks" in {_text(name) for name in getattr(uwsgi, "opt", ())}:
        return None
    return (
        "uWSGI's master would fork workers while it runs, and they may hang: set "
        "py-call-uwsgi-fork-hooks = true (or lazy-apps), or publish only in workers"
    )


def greenlets_of(modules: Mapping[str, Any]) -> str | None:
    """Return the library whose greenlets :mod:`threading` starts instead of threads, or None."""
    for library, patched in _patches(modules):
        if next(iter(patched.values())):
            return library
    return None


def why_not(modules: Mapping[str, Any]) -> str | None:
    """Return the reason why threads cannot work here, with the remedy, or None.

    Only ``modules``, those that are already imported, are checked:

    - gevent: must be patched completely, or not at all. Greenlet sockets in a real thread, or real
      sockets in a greenlet, block each other.
    - eventlet: likewise.
    - uWSGI: before version 2.0.27, releases the interpreter to threads only if configured to (its
      documentation, "Things to know", on ``enable-threads``). It runs greenlets continuously only
      in its own loop engine for them; otherwise only during requests, and heartbeats stop.
    """
    for library, patched in _patches(modules):
        if len(set(patched.values())) > 1:
            return _half_patched(library, patched)
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
        return "uWSGI does not run background threads: set enable-threads = true (or threads)"
    return None


_CALLS = {"gevent": "gevent.monkey.patch_all()", "eventlet": "eventlet.monkey_patch()"}


def _patches(modules: Mapping[str, Any]) -> list[tuple[str, dict[str, bool]]]:
    """Return what each imported library of greenlets has patched, threads first."""
    patches = []
    monkey = modules.get("gevent.monkey")
    if monkey is not None:
        names = ("threading", "socket", "select")
        patches.append(("gevent", {name: monkey.is_module_patched(name) for name in names}))
    patcher = modules.get("eventlet.patcher")
    if patcher is not None:
        names = ("thread", "socket", "select")
        patches.append(("eventlet", {name: patcher.is_monkey_patched(name) for name in names}))
    return patches


def _half_patched(library: str, patched: Mapping[str, bool]) -> str:
    names = ", ".join(name for name, is_patched in patched.items() if is_patched)
    others = ", ".join(name for name, is_patched in patched.items() if not is_patched)
    return (
        f"{library} has patched {names}, but not {others}: call {_CALLS[library]} without "
        "arguments, before all else, or do not patch"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
