"""The discovery of the consumers that a command line names."""

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
    """Import and return the consumers named by ``names`` (``MODULE[:ATTR]``), each once.

    Modules are also looked for in the working directory.

    Raises:
        UsageError: a module does not exist, or does not have such a consumer.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    consumers: dict[object, Consumer] = {}
    for name in names:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module exists; something that it imports does not
            raise UsageError(f"there is no module {module_name!r}") from error
        for member in _of_module(module, attribute):
            consumers[member] = member() if isinstance(member, type) else member
    return list(consumers.values())


def selected(
    consumers: list[Consumer], groups: Sequence[str] | None
) -> tuple[list[Consumer], dict[str, int]]:
    """Return the consumers that ``-Q`` selects, and the ranks of their queues.

    Args:
        consumers: all loaded consumers.
        groups: queues, separated by commas if they have an order; None or empty for all.

    Raises:
        UsageError: no consumer has one of the queues, or a queue has two ranks.
    """
    if not groups:
        return consumers, {}
    known = {consumer.queue for consumer in consumers}
    ranks: dict[str, int] = {}
    for group in groups:
        names = [group] if group in known else [name.strip() for name in group.split(",")]
        for rank, name in enumerate(names):
            if name not in known:
                queues = ", ".join(map(repr, sorted(known)))
                raise UsageError(f"no consumer has the queue {name!r}; the queues are {queues}")
            if ranks.setdefault(name, rank) != rank:
                raise UsageError(f"-Q names the queue {name!r} twice, with different ranks")
    return [consumer for consumer in consumers if consumer.queue in ranks], ranks


def _of_module(module: ModuleType, attribute: str) -> list[type[Consumer] | FunctionConsumer]:
    if attribute:
        member = getattr(module, attribute, None)
        if not _is_consumer(member):
            raise UsageError(f"{module.__name__}:{attribute} is not a consumer with a queue")
        return [member]  # type: ignore[list-item]
    members = [member for member in vars(module).values() if _is_consumer(member)]
    if not members:
        raise UsageError(f"the module {module.__name__!r} has no consumer")
    return members


def _is_consumer(member: object) -> bool:
    if isinstance(member, type):
        return issubclass(member, Consumer) and bool(member.queue)
    return isinstance(member, FunctionConsumer)
