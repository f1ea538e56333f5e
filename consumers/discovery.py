"""Finds the consumers that a command names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from outbox import UsageError
from outbox.consumers.definition import Consumer, FunctionConsumer

__all__ = ["load", "selected"]


def load(names: Iterable[str]) -> list[Consumer]:
    """Import the consumers that ``MODULE[:ATTR]`` name, each once.

    Modules are looked for in the working directory, too.

    Raises:
        UsageError: there is no such module, or it has no such consumer.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: dict[object, Consumer] = {}
    for name in names:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module is there; something that it imports is not
            raise UsageError(f"there is no module {module_name!r}") from error
        for one in _of_module(module, attribute):
            found[one] = one() if isinstance(one, type) else one
    return list(found.values())


def selected(
    consumers: list[Consumer], groups: Sequence[str] | None
) -> tuple[list[Consumer], dict[str, int]]:
    """Return those of ``consumers`` that ``-Q`` asks for, and the ranks of their queues.

    Args:
        consumers: all that were loaded.
        groups: queues, separated by commas where they have an order; None or nothing for all.

    Raises:
        UsageError: no consumer has one of the queues, or one is named at different places.
    """
    if not groups:
        return consumers, {}
    known = {one.queue for one in consumers}
    ranks: dict[str, int] = {}
    for group in groups:
        names = [group] if group in known else [one.strip() for one in group.split(",")]
        for rank, name in enumerate(names):
            if name not in known:
                told = ", ".join(map(repr, sorted(known)))
                raise UsageError(f"no consumer has the queue {name!r}; there are {told}")
            if ranks.setdefault(name, rank) != rank:
                raise UsageError(f"-Q names the queue {name!r} twice, at different places")
    return [one for one in consumers if one.queue in ranks], ranks


def _of_module(module: ModuleType, attribute: str) -> list[type[Consumer] | FunctionConsumer]:
    if attribute:
        one = getattr(module, attribute, None)
        if not _is_consumer(one):
            raise UsageError(f"{module.__name__}:{attribute} is no consumer that names a queue")
        return [one]  # type: ignore[list-item]
    found = [one for one in vars(module).values() if _is_consumer(one)]
    if not found:
        raise UsageError(f"the module {module.__name__!r} has no consumer")
    return found


def _is_consumer(one: object) -> bool:
    if isinstance(one, type):
        return issubclass(one, Consumer) and bool(one.queue)
    return isinstance(one, FunctionConsumer)
