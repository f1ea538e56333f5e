"""What the project of a framework adds to ``outbox-consume``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from outbox import Publisher

__all__ = ["Framework"]


@dataclass(frozen=True, slots=True)
class Framework:
    """The framework whose command runs the consumers of a project.

    Attributes:
        url_default: where its broker URL is found, for the help.
        not_configured: what to say if there is none.
        add_arguments: adds its options.
        consumers: returns what to run with these options, each ``MODULE[:ATTR]``, or raises a
            ``UsageError``. It is called in each process that runs consumers.
        beside: returns what runs beside the worker, with the options and the worker's publisher.
    """

    url_default: str
    not_configured: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    consumers: Callable[[argparse.Namespace], Sequence[str]]
    beside: Callable[[argparse.Namespace, Publisher], AbstractContextManager[object]]
