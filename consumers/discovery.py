"""The discovery of the consumers that a command line names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType, ModuleType
from typing import TypeAlias, TypeGuard, TypeVar

from outbox import BrokerError, OutboxError, UsageError
from outbox.consumers import logs
from outbox.consumers.definition import Consumer, FunctionConsumer, has_process, instance_of
from outbox.consumers.tasks.task_queue import task_queues_of
from outbox.consumers.tasks.task_table import tasks_among, tasks_of
from outbox.consumers.tracebacks import strip_import, traceback_of

__all__ = ["FLASK_APP_VARIABLE", "load", "selected", "with_consumers"]

logger = logging.getLogger("outbox.consumer")

T = TypeVar("T")

FLASK_APP_VARIABLE = "OUTBOX_FLASK_APP"
"""The variable from which subprocesses know the Flask application, as ``flask --app`` takes it."""

_Member: TypeAlias = type[Consumer] | Consumer

# What fails in the same way each time. Anything else, such as a database that is unavailable while
# a module is imported, may pass.
_WRONG = (ImportError, SyntaxError, NameError, AttributeError, TypeError)


def load(names: Iterable[str], *, warn: bool = True) -> list[Consumer]:
    """Import and return the consumers named by ``names`` (``MODULE[:ATTR]``), each once.

    Modules are also looked for in the working directory. If ``DJANGO_SETTINGS_MODULE`` is set,
    Django is set up first. In a subprocess of ``flask outbox consume``, a context of the Flask
    application is pushed for the rest of the process. Of a module without an attribute, these are
    the consumers that it or a module below it defines and those that ``__all__`` names; if there
    are none, all that it imports. A class is left out where one derived from it, or an instance,
    has the same queue. The queues of tasks of the modules are consumed from, too; a function or
    class that is named has those that are called later without being decorated.

    Args:
        names: the names.
        warn: whether to log what is left out although it looks like a consumer to run.

    Raises:
        UsageError: a module does not exist, can't be imported, or does not have such a consumer.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    _imported("the Django project", _set_up_django)
    _imported("the Flask application", _push_flask_context)
    members: dict[int, _Member] = {}
    left_out: list[tuple[_Member, str]] = []
    of_tasks: dict[str, ModuleType] = {}
    without: list[_Found] = []
    has_undecorated = False
    for name in names:
        module_name, _, attribute = name.partition(":")
        if not module_name or module_name.startswith("."):
            raise UsageError(f"{name!r} is not the name of a module, or MODULE:ATTR")
        module = _imported(f"the module {module_name!r}", partial(_module, module_name))
        if attribute:
            member = _attribute(module, attribute)
            if _is_target(member):
                of_tasks[module_name] = module
                has_undecorated |= not tasks_among([member])
                continue
            consumer = _named(module, attribute)
            members[id(consumer)] = consumer
        else:
            found = _Found(module)
            if found.has_tasks or not found.members:
                of_tasks[module_name] = module
            if not (found.has_tasks or found.members):
                without.append(found)
            members |= {id(member): member for member in found.members}
            left_out += found.left_out
    has_undecorated |= bool(without)
    if without and len(without) == len(of_tasks):  # there are no tasks at all
        raise UsageError(without[0].problem)
    consumers = [instance_of(member) for member in members.values()]
    consumers += task_queues_of(of_tasks.values(), has_undecorated=has_undecorated)
    if logs.enable() and warn:
        logger.warning(
            "logging.config has disabled the loggers of outbox; they are enabled again. Configure "
            "logging with disable_existing_loggers=False"
        )
    if warn:
        for member, why in left_out:
            if id(member) not in members:
                logger.warning("%s is not run: %s", _name_of(member), why)
    return consumers


def with_consumers(names: Iterable[str]) -> list[str]:
    """Import modules, and return the names of those that have a consumer or a task to run.

    Raises:
        UsageError: one of them can't be imported.
    """

    def has_consumer(name: str) -> bool:
        module = _imported(f"the module {name!r}", partial(_module, name))
        return bool(tasks_of(module)) or any(
            _is_consumer(member) and member.queue for member in vars(module).values()
        )

    return [name for name in names if has_consumer(name)]


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


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module exists; something that it imports does not
        meant = name.removesuffix(".py").replace("/", ".")
        hint = "" if meant == name else f"; did you mean {meant!r}?"
        raise UsageError(f"there is no module {name!r}{hint}") from error


def _imported(what: str, run: Callable[[], T]) -> T:
    """Run ``run``, which imports ``what``.

    Raises:
        UsageError: the application's code can't be imported; the message has the traceback.
        RuntimeError: the broker was unavailable meanwhile.
    """
    try:
        return run()
    except BrokerError as error:
        raise RuntimeError(f"the broker was unavailable while {what} was imported") from error
    except OutboxError:
        raise  # it names its cause
    except SystemExit as error:
        raise UsageError(f"{what} exits with {error.code!r} when it is imported") from error
    except Exception as error:
        is_djangos = type(error).__module__ == "django.core.exceptions"
        if not is_djangos and not isinstance(error, _WRONG):
            raise
        hint = ""
        if is_djangos and not os.environ.get("DJANGO_SETTINGS_MODULE"):
            hint = "\nSet DJANGO_SETTINGS_MODULE: then outbox-consume calls django.setup() first."
        strip_import(error)
        raise UsageError(f"cannot import {what}:\n{traceback_of(error)}{hint}") from None


def _set_up_django() -> None:
    name = os.environ.get("DJANGO_SETTINGS_MODULE")
    if name and importlib.util.find_spec("django") is not None:
        django = importlib.import_module("django")
        if not importlib.import_module("django.apps").apps.ready:
            django.setup()


def _push_flask_context() -> None:
    """Push a context of the application that ``flask outbox consume`` has found in its parent."""
    path = os.environ.get(FLASK_APP_VARIABLE)
    if not path or importlib.util.find_spec("flask") is None:
        return
    flask = importlib.import_module("flask")
    if not flask.has_app_context():
        importlib.import_module("flask.cli").ScriptInfo(path).load_app().app_context().push()


def _named(module: ModuleType, path: str) -> _Member:
    """Return the member of ``module`` that the command line names, such as ``Outer.Inner``."""
    name = f"{module.__name__}:{path}"
    member = _attribute(module, path)
    if member is None:
        raise UsageError(f"{name} is not a consumer: there is no such attribute")
    if not _is_consumer(member):
        raise UsageError(f"{name} is not a consumer")
    if not member.queue:
        raise UsageError(f"{name} has no queue")
    return member


def _attribute(module: ModuleType, path: str) -> object:
    """Return the attribute, such as ``Outer.Inner``, or None."""
    member: object = module
    for name in path.split("."):
        member = getattr(member, name, None)
    return member


class _Found:
    """The consumers of a module.

    Attributes:
        members: those to run.
        left_out: others that look as if they should run, with the reason and the remedy.
        has_tasks: whether it has tasks; then consumers that it only imports aren't run.
    """

    def __init__(self, module: ModuleType) -> None:
        """Look at the module's namespace."""
        self.has_tasks = bool(tasks_of(module))
        self.left_out: list[tuple[_Member, str]] = []
        self._module = module
        self._name = module.__name__
        there = {id(member): member for member in vars(module).values() if _is_consumer(member)}
        exported = {id(getattr(module, name, None)) for name in getattr(module, "__all__", ())}
        own = [
            member
            for key, member in there.items()
            if key in exported or not self._is_imported(member)
        ]
        self.members = self._runnable(own)
        runnable = self._runnable(there.values())
        if not self.members and not self.has_tasks:
            self.members = runnable
        for member in runnable:
            if member not in self.members and member not in own:
                why = (
                    f"{self._name} only imports it; name {_name_of(member)}, too, or list it in "
                    f"{self._name}.__all__"
                )
                self.left_out.append((member, why))
        for kind in _all_subclasses(Consumer):
            self._look_at(kind, set(map(id, own)))

    @property
    def problem(self) -> str:
        """What to say if it has nothing to run."""
        why = "".join(f"; {_name_of(member)} {why}" for member, why in self.left_out)
        return f"the module {self._name!r} has no consumer and no task{why}"

    def _is_imported(self, member: _Member) -> bool:
        """Return whether ``member`` is another module's, which is not below this one."""
        origin = str(getattr(member, "__module__", ""))
        if (origin + ".").startswith(self._name + "."):
            return False
        # What another module has made for this one isn't there.
        other = sys.modules.get(origin)
        return other is not None and any(value is member for value in vars(other).values())

    def _runnable(self, members: Iterable[_Member]) -> list[_Member]:
        candidates = [
            member
            for member in members
            if member.queue and not (isinstance(member, type) and inspect.isabstract(member))
        ]
        return [
            member
            for member in candidates
            if not any(_stands_for(other, member) for other in candidates)
        ]

    def _look_at(self, kind: type[Consumer], own: set[int]) -> None:
        """Note a class of this module that isn't run, and probably should."""
        if (
            kind.__module__ != self._name
            or _attribute(self._module, kind.__qualname__) is not kind
            or kind.__name__.startswith("_")
            or kind.__subclasses__()
            or not has_process(kind)
            or inspect.isabstract(kind)
            or any(isinstance(member, kind) for member in self.members)
        ):
            return
        if not kind.queue and id(kind) in own:
            self.left_out.append(
                (kind, "it has no queue; set queue = 'name', or _ before a base's name")
            )
        elif kind.queue and "." in kind.__qualname__ and id(kind) not in own:
            self.left_out.append((kind, f"it is nested; name {_name_of(kind)}"))


def _stands_for(other: _Member, member: _Member) -> bool:
    """Return whether ``other`` is run instead of ``member``: a class, from which it is made."""
    if other is member or not isinstance(member, type):
        return False
    kind = other if isinstance(other, type) else type(other)
    return issubclass(kind, member) and (other.queue == member.queue or not has_process(member))


def _is_target(member: object) -> bool:
    """Return whether ``member`` can be named for the tasks that it is, or has."""
    if isinstance(member, type):
        return not issubclass(member, Consumer)
    return isinstance(member, FunctionType) or bool(tasks_among([member]))


def _is_consumer(member: object) -> TypeGuard[_Member]:
    if isinstance(member, type):
        return issubclass(member, Consumer) and member not in (Consumer, FunctionConsumer)
    return isinstance(member, Consumer)


def _all_subclasses(kind: type[Consumer]) -> Iterator[type[Consumer]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _all_subclasses(subclass)


def _name_of(member: _Member) -> str:
    name = getattr(member, "__qualname__", None) or type(member).__qualname__
    return f"{member.__module__}:{name}"
