"""Runs the present command as the parent of processes that run the same command."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence

from outbox.service.identity.instance import Instance
from outbox.service.own_command import own_command, working_directory
from outbox.service.policy_options import policy_of
from outbox.service.state import Face
from outbox.service.supervisor import Supervisor
from outbox.service.worker_process import Keeper

__all__ = ["supervise"]


def supervise(
    options: argparse.Namespace,
    faces: Sequence[Face],
    *,
    logger: logging.Logger,
    name: str = "worker",
    keeper: Keeper | None = None,
) -> int:
    """Run the present command in processes until a signal stops them; return the exit code.

    Args:
        options: its options, with ``processes`` and ``shutdown_timeout``.
        faces: what shows the service.
        logger: the parent's log.
        name: what the log calls a process.
        keeper: see ``Supervisor``.
    """
    in_background = any(isinstance(face, Instance) and face.in_background for face in faces)
    return Supervisor(
        own_command(),
        options.processes or 1,
        folder=_link(),
        shutdown_timeout=options.shutdown_timeout,
        policy=policy_of(options, in_background=in_background),
        keeper=keeper,
        faces=faces,
        logger=logger,
        name=name,
    ).run()


def _link() -> str | None:
    """Return the working directory if links lead to it, which may be switched; else None."""
    given = working_directory()
    with contextlib.suppress(OSError):
        if given != os.getcwd():
            return given
    return None
