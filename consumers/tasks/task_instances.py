"""Mapped instances in a worker: loaded in one session, which outbox commits or rolls back.

For Django's models the session is a transaction of each database that they are in.

An instance that isn't there may be about to be committed: its task was enqueued before. Only if
both were committed together is it gone for good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outbox import UsageError, sinks
from outbox.consumers.outcome import NotYet, Reject

__all__ = ["TaskSession", "session_provider"]

Provider = Callable[[], Any]


class InstanceMissing(NotYet):
    """A failed attempt: there is no row for an instance that a task was called with."""

    delays = (1.0, 5.0, 30.0)
    lasts = 30.0


def session_provider(task_session: Provider | None) -> Provider | None:
    """Return what makes the sessions of instances, or None if nothing was configured."""
    return task_session or sinks.session


class TaskSession:
    """The session of one attempt, opened when the first instance is needed.

    Use it as ``with`` for a plain function, as ``async with`` for a coroutine function.
    """

    def __init__(self, provider: Provider | None, classes: Mapping[str, type]) -> None:
        """Open sessions with ``provider``, for instances of ``classes``."""
        self._provider = provider
        self._classes = classes
        self._session: Any = None
        self._transactions: contextlib.ExitStack | None = None
        self._databases: set[str] = set()

    def connections(self) -> list[Any]:
        """Return the connections whose transactions are committed after the task has returned.

        Those of Django take the statements of the results, too, but no others of SQLAlchemy. In a
        coroutine function call it in :meth:`in_sync`.
        """
        found = [] if self._session is None else [self.sync_session.connection()]
        for alias in self._databases:
            connection = sinks.framework.connection(alias)
            if connection is not None:
                found.append(connection)
        return found

    def instance(
        self, name: str, key: Sequence[Any], *, is_committed: bool, using: str | None
    ) -> Any:
        """Return the instance of a class with a key.

        Raises:
            Reject: the class isn't one whose instances may be named, or the key isn't one of it, or
                there is no such database; or the instance was deleted.
            InstanceMissing: there is no such row yet.
            UsageError: nothing was configured that opens sessions.
        """
        kind = self._classes.get(name)
        if kind is None:
            raise Reject(f"no mapped class of the worker's modules is {name!r:.300}")
        framework = sinks.framework
        if framework is not None and framework.is_mapped(kind):
            found = self._model(framework, kind, key, using)
        else:
            found = self.sync_session.get(kind, _key_for(kind, key))
        return self._found(found, name, key, is_committed=is_committed)

    def _model(self, framework: Any, kind: type, key: Sequence[Any], using: str | None) -> Any:
        """Return the instance of one of Django's models, or None."""
        try:
            alias, found_key = framework.address(kind, key, using)
        except ValueError as error:
            raise Reject(str(error)) from None
        if self._transactions is not None and alias not in self._databases:
            self._transactions.enter_context(framework.transaction(alias))
            self._databases.add(alias)
        return framework.load(kind, found_key, alias)

    def _found(self, found: Any, name: str, key: Sequence[Any], *, is_committed: bool) -> Any:
        if found is not None:
            return found
        text = f"there is no {name:.255} with the key {[*key]!r:.300}"
        if is_committed:
            raise Reject(f"{text}; it was committed with the task, so it was deleted since")
        raise InstanceMissing(
            f"{text}; if it was committed after the task had been published, store the task in "
            "the same transaction"
        )

    @property
    def sync_session(self) -> Any:
        """The session, opened if it isn't; the synchronous one of an ``AsyncSession``."""
        session = self.opened()
        return getattr(session, "sync_session", session)

    def opened(self) -> Any:
        """Return the session, opened if it isn't.

        Raises:
            UsageError: nothing was configured that opens sessions.
        """
        if self._session is None:
            provider = self._provider
            self._session = None if provider is None else provider()
            if self._session is None:
                raise UsageError(
                    "a task needs a session, and nothing opens one here; "
                    "configure(task_session=sessionmaker(...)), or give a scoped_session to "
                    "outbox.sql.bind()"
                )
        return self._session

    def __enter__(self) -> TaskSession:
        if sinks.framework is not None:
            self._transactions = contextlib.ExitStack()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if self._transactions is not None:
                self._transactions.__exit__(kind, error, traceback)
        except BaseException as failure:
            self._end_session(type(failure))
            raise
        self._end_session(kind)

    def _end_session(self, kind: Any) -> None:
        session = self._session
        if session is None:
            return
        try:
            if kind is None:
                session.commit()
            else:
                session.rollback()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()

    async def __aenter__(self) -> TaskSession:
        # Without transactions of Django: it has none for coroutines.
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        session = self._session
        if session is None:
            return
        if not hasattr(session, "sync_session"):
            self._end_session(kind)
            return
        try:
            if kind is None:
                await session.commit()
            else:
                await session.rollback()
        except BaseException:
            await session.rollback()
            raise
        finally:
            await session.close()

    async def reading(self, read: Callable[[], Any]) -> Any:
        """Return what ``read`` returns, which may load instances, in a coroutine."""
        session = None if self._provider is None else self.opened()
        if session is not None and hasattr(session, "run_sync"):
            return await session.run_sync(lambda _: read())
        if session is None and sinks.framework is not None:
            return await sinks.framework.in_thread(read)
        return read()

    async def in_sync(self, work: Callable[[], None]) -> None:
        """Call ``work``, which may use the synchronous session if one was opened."""
        session = self._session
        if hasattr(session, "run_sync"):
            await session.run_sync(lambda _: work())
        else:
            work()


def _key_for(kind: type, key: Sequence[Any]) -> tuple[Any, ...]:
    from outbox.sql.mapped_instances import key_for

    try:
        return key_for(kind, key)
    except ValueError as error:
        raise Reject(str(error)) from None
