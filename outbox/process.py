"""Which process this is, without asking the operating system each time."""

from __future__ import annotations

import os

__all__ = ["pid"]

pid = os.getpid()
"""The id of this process, also in a forked child."""


def _renew() -> None:
    global pid
    pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
