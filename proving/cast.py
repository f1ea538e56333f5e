"""The programs of a proof: their command lines and environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from proving.processes import Program, Server
from proving.queues import CALLS

__all__ = ["SPOOL", "free_port", "programs"]

SPOOL = "spool"
"""The folder, below that of the history, in which the script with a spool has it."""

_MARGIN = 5.0
"""Seconds for a server to end after its workers."""


def programs(
    environment: Mapping[str, str],
    folder: Path,
    ports: Mapping[str, int],
    pooler: str | None,
    grace: float,
) -> dict[str, Program]:
    """Return all programs by their kinds, in the order to start them.

    Args:
        environment: their variables.
        folder: the folder of the history.
        ports: the ports of the servers.
        pooler: the URL of the database behind a pooler, for one of the relays, or None.
        grace: the seconds for an orderly exit.
    """

    def program(kind: str, *arguments: str, **more: str) -> Program:
        return Program(kind, arguments, {**environment, **more}, folder, grace=grace)

    def server(
        kind: str,
        *arguments: str,
        children: int,
        survives: bool = True,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Server:
        return Server(
            *(kind, arguments, {**environment, **more}, folder),
            children=children,
            survives=survives,
            grace=grace,
        )

    # The database keeps the results of tasks, too.
    tasks = {
        "OUTBOX_RESULTS": environment.get("OUTBOX_DATABASE_URL", ""),
        "OUTBOX_TASKS_QUEUE": f"{environment['OUTBOX_EXCHANGE']}.{CALLS}",
    }
    # Notifications don't pass through the pooler: the relay has to find that out.
    listens = [] if pooler is None else ["--listen"]
    behind = {} if pooler is None else {"OUTBOX_DATABASE_URL": pooler}
    return {
        "script": program("script", "proving.programs.script"),
        "spooled": program("spooled", "proving.programs.script", OUTBOX_SPOOL=str(folder / SPOOL)),
        "wsgi": server(
            "wsgi",
            *("gunicorn", "-k", "gthread", "--threads", "3"),
            # Longer than the drain at a worker's exit, or gunicorn kills it meanwhile.
            *("--graceful-timeout", f"{grace - _MARGIN:.0f}"),
            *("-b", f"127.0.0.1:{ports['wsgi']}", "proving.programs.wsgi:app"),
            *("--log-level", "warning"),
            children=99,
        ),
        "asgi": server(
            "asgi",
            *("uvicorn", "--port", str(ports["asgi"]), "proving.programs.asgi:app"),
            *("--log-level", "warning"),
            children=0,
        ),
        "prefork": server(
            "prefork",
            *("celery", "-A", "proving.programs.prefork", "worker", "--concurrency", "1"),
            *("--max-tasks-per-child", "3", "--without-gossip", "--without-mingle"),
            *("--without-heartbeat", "--loglevel", "WARNING"),
            children=1,
            survives=False,
        ),
        "durable": program("durable", "proving.programs.durable"),
        "django": program("django", "proving.programs.django_writer"),
        "caller": program("caller", "proving.calling.caller", **tasks),
        "relay": program("relay", "proving.programs.relay"),
        "relay2": program("relay2", "proving.programs.relay", *listens, **behind),
        "tenants": program("tenants", "proving.programs.tenants"),
        "worker": server(
            "worker",
            *("outbox.consumers", "proving.programs.worker", "-p", "2", "-t", "16"),
            # A broker that is away for long is no reason to end with an error.
            *("--log-level", "WARNING", "--shutdown-timeout", f"{grace - 5:.0f}"),
            children=1,
        ),
        "calls": server(
            "calls",
            *("outbox.consumers", "proving.calling.called", "-p", "2", "-t", "8"),
            *("--log-level", "WARNING", "--shutdown-timeout", f"{grace - 5:.0f}"),
            children=1,
            more=tasks,
        ),
    }


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free just now."""
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        port: int = candidate.getsockname()[1]
        return port
