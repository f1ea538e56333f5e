"""What tasks need to know of a Django project: its models, and Django's own tasks.

An instance of a model travels as its class and primary key. The worker gets it from the database
that Django would write it to, past managers that hide rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings as django_settings
from django.core.exceptions import ValidationError
from django.db import DEFAULT_DB_ALIAS, connections, router, transaction
from django.db.models import Field, Model

from outbox.django import project
from outbox.django.connecting import can_hand_over, engine_of
from outbox.django.storing import followed
from outbox.django.tasks.atomic_connection import AtomicConnection
from outbox.errors import InvalidEvent, UsageError
from outbox.event import Event
from outbox.sinks import Bound, OpenRow

if TYPE_CHECKING:
    from outbox.tasks import Task

__all__ = ["PROJECT_TASKS", "ProjectTasks"]

_OF_MIGRATIONS = "__fake__"


class ProjectTasks:
    """The models of the project, as ``outbox.tasks.mapped.Mapping`` wants them."""

    def is_mapped(self, kind: Any) -> bool:
        """Return whether ``kind`` is a model that has a table."""
        if not (isinstance(kind, type) and issubclass(kind, Model)):
            return False
        model: Any = kind
        return not model._meta.abstract

    def mapped_classes(self) -> list[type]:
        """Return the models of all apps."""
        return list(apps.get_models(include_auto_created=True))

    def key_of(self, instance: Any) -> list[Any]:
        """Return the primary key of the instance's row, as JSON has it.

        Raises:
            InvalidEvent: there is no such row yet, or no more, or JSON can't carry its key.
        """
        name = type(instance).__qualname__
        if type(instance).__module__ == _OF_MIGRATIONS:
            raise InvalidEvent(
                f"the {name} is of a migration's model, which no worker has; give the task its key"
            )
        if instance._state.adding:  # with a default, its key is there before the row is
            raise InvalidEvent(
                f"the {name} has no row yet, so that the task would not find it; save() it first"
            )
        fields = _key_fields(type(instance))
        values = [getattr(instance, field.attname) for field in fields]
        if None in values:
            raise InvalidEvent(f"the {name} was deleted; the task would not find it")
        return [
            _written(field, instance, value) for field, value in zip(fields, values, strict=True)
        ]

    def transaction_of(self, instance: Any) -> str | None:
        """Return the alias of the database that the instance is from."""
        alias: str | None = instance._state.db
        return alias

    def alias_of(self, instance: Any) -> str | None:
        """Return the alias of the database that it would be saved in; None for the default one."""
        alias: str = router.db_for_write(type(instance), instance=instance)
        return None if alias == DEFAULT_DB_ALIAS else alias

    def open_transaction(self, using: str | Bound) -> str | None:
        """Return the alias of the database that takes an event, if it has an open transaction."""
        alias = project.current().store if isinstance(using, Bound) else using
        if alias not in django_settings.DATABASES:
            return None  # refused when the event is stored, or STORE is None
        return alias if connections[alias].in_atomic_block else None

    def engine_of(self, using: str | Bound) -> Any:
        """Return an engine for the database that takes an event; None if there can't be one."""
        alias = project.current().store if isinstance(using, Bound) else using
        try:
            return None if alias is None else engine_of(alias)
        except UsageError:  # it is in memory
            return None

    def followed(self, event: Event, using: str | Bound) -> OpenRow | None:
        """Return what becomes of an event that was just stored in an open transaction, or None."""
        return followed(event, using)

    def address(
        self, kind: type[Model], key: Sequence[Any], using: str | None
    ) -> tuple[str, tuple[Any, ...]]:
        """Return the alias and the key, in the types of its fields, that a message names.

        Raises:
            ValueError: they don't name a row.
        """
        alias = DEFAULT_DB_ALIAS if using is None else using
        if alias not in django_settings.DATABASES:
            raise ValueError(f"no database of the worker is {alias!r:.60}")
        fields = _key_fields(kind)
        if len(fields) != len(key):
            raise ValueError(
                f"the key of {kind.__qualname__} has {len(fields)} part(s): {key!r:.60}"
            )
        return alias, tuple(_read(field, part) for field, part in zip(fields, key, strict=True))

    def transaction(self, alias: str) -> AbstractContextManager[None]:
        """Return a transaction in which instances are loaded and their methods run."""
        atomic: AbstractContextManager[None] = transaction.atomic(using=alias)
        return atomic

    def connection(self, alias: str) -> AtomicConnection | None:
        """Return what writes results in the open transaction of a database.

        None where outbox can't connect to it, to compare it with the database of the results. And
        None on SQLite unless transactions begin with the lock: one that has only read would fail if
        another connection has written meanwhile.
        """
        try:
            return AtomicConnection(alias) if can_hand_over(alias) else None
        except UsageError:  # it is in memory
            return None

    def load(self, kind: type[Model], key: tuple[Any, ...], alias: str) -> Model | None:
        """Return the instance with a key, or None."""
        pk = key if len(key) > 1 else key[0]
        try:
            instance: Model = kind._base_manager.using(alias).get(pk=pk)
        except kind.DoesNotExist:
            return None
        return instance

    def tasks_among(self, members: Iterable[Any]) -> list[Task[Any, Any]]:
        """Return tasks for those of Django's own among ``members``, ready to run."""
        if "django.tasks" not in sys.modules:
            return []
        from outbox.django.tasks.task_backend import tasks_among

        return tasks_among(members)

    async def in_thread(self, read: Callable[[], Any]) -> Any:
        """Return what ``read`` returns, in the thread that a coroutine's queries run in."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(read)()


PROJECT_TASKS = ProjectTasks()


def _key_fields(kind: type[Model]) -> Sequence[Field]:
    """Return the fields of the primary key: several with a ``CompositePrimaryKey``."""
    fields: Sequence[Field] = getattr(kind._meta, "pk_fields", None) or [kind._meta.pk]
    return fields


def _written(field: Field, instance: Any, value: Any) -> Any:
    """Return a part of a key as JSON has it.

    Raises:
        InvalidEvent: it would come back changed.
    """
    if type(value) in (int, str):
        return value
    text = field.value_to_string(instance)
    try:
        is_same = field.to_python(text) == value
    except ValidationError:
        is_same = False
    if not is_same:
        raise InvalidEvent(f"a key with {value!r:.60} can't be carried: it would be {text!r:.60}")
    return text


def _read(field: Field, part: Any) -> Any:
    """Return a part of a key in the type of its field.

    Raises:
        ValueError: it isn't one.
    """
    if type(part) not in (int, str):
        raise ValueError(f"{part!r:.60} is no part of a key")
    try:
        return field.to_python(part)
    except ValidationError as error:
        raise ValueError(f"{part!r:.60} is no {field.name}: {' '.join(error.messages)}") from None
