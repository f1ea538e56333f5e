"""``auto_publishing()``: a block of code as a unit of work.

A block *joins* the unit of work around it if that unit publishes at its end: on success the block
passes its events to the unit, on failure it drops only those. Otherwise the block is *outermost*: a
separate unit, which publishes at its end.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Token
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from outbox import sinks
from outbox.backlog.notifier import ids
from outbox.errors import OutboxError, UsageError
from outbox.observer import seam
from outbox.publisher import Publisher, refuse_running_loop
from outbox.report import PublishReport
from outbox.system import process
from outbox.system.log_lines import log
from outbox.unit_of_work.collector import EventCollector, set_console
from outbox.unit_of_work.unit_of_work import Buffer, Scope

__all__ = ["AutoPublishingEventCollector", "auto_publishing"]

logger = logging.getLogger("outbox.collector")

P = ParamSpec("P")
R = TypeVar("R")


class AutoPublishingEventCollector(EventCollector):
    """The collector of an ``auto_publishing()`` block.

    Usable once, as ``with`` or ``async with``; as a decorator it makes a new block for each call.

    Attributes:
        report: the report, once the block has published; None for a block that joined, or that has
            not ended.
    """

    __slots__ = ("_independent", "_options", "_token", "report")

    def __init__(self, *, independent: bool = False, **options: Any) -> None:
        """Create a block, without entering it; see :func:`auto_publishing`."""
        super().__init__(**options)
        self._independent = independent
        self._options = options
        self._token: Token[Scope | None] | None = None
        self.report: PublishReport | None = None

    def __del__(self) -> None:
        buffer: Buffer | None = getattr(self, "_buffer", None)  # None if interrupted when made
        if buffer is not None and not buffer.closed:  # a signal handler raised on leaving
            buffer.abandoned = buffer.closed = True

    @property
    def joined(self) -> bool:
        """Whether the block joined the unit of work around it."""
        return self._buffer.parent is not None

    def __enter__(self) -> Self:
        outer = self._buffer_to_join()
        if outer is None and not self.autoflush:
            refuse_running_loop()
        return self._enter(outer)

    def open(self) -> Self:
        """Enter the block until ``close()`` or the end of the process, for use at a console.

        It is current even if the console runs each line in a separate context
        (``python -m asyncio``, Jupyter). Meant for ``auto_publishing(autoflush=True)``.
        """
        self.__enter__()
        if not self.joined:
            set_console(self)
        return self

    def close(self) -> None:
        """Leave a block that was entered with ``open()``, as if a ``with`` ended."""
        set_console(None)
        self.__exit__(None, None, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leave()
            if kind is not None:
                self._fail(error)
            elif self._succeed():
                if self.autoflush or (self._buffer.events and self.publisher.runs_here):
                    self._flush(self._buffer)
                else:
                    self.report = self._publish(self._buffer)
        except BaseException as interruption:
            if kind is None:
                self._hand_over_rest(interruption)
            raise
        finally:
            self._end()

    async def __aenter__(self) -> Self:
        return self._enter(self._buffer_to_join())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leave()
            if kind is not None:
                self._fail(error)
            elif self._succeed():
                self.report = await self._publish_async(self._buffer)
        except BaseException as interruption:
            if kind is None:
                self._hand_over_rest(interruption)
            raise
        finally:
            self._end()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return ``function`` with each call in a new block.

        Raises:
            UsageError: ``function`` is a generator function, whose body runs in its callers'
                units of work, or isn't a function. What can't be known before it is called (a
                plain function that returns a coroutine or a generator) is refused by the call,
                in which case nothing is published.
        """
        if isinstance(function, type) or not callable(function):
            raise UsageError(f"auto_publishing decorates functions, not {function!r}")
        kind = _kind_of(function)
        if kind is _Kind.GENERATOR:
            raise UsageError(
                f"{_name_of(function)} is a generator function, whose body runs step by step "
                "in its callers' units of work; use a with block inside it"
            )
        if kind is _Kind.COROUTINE:

            @functools.wraps(function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with self._new_block():
                    return await cast("Any", function)(*args, **kwargs)

            return cast("Callable[P, R]", call_async)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            block = self._new_block()
            if kind is _Kind.PLAIN:
                with block:
                    return block._checked_result(function, function(*args, **kwargs))
            return block._call(function, *args, **kwargs)

        return call

    def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call in the block a function that may return a coroutine, or run one and return.

        Only the result says which: a wrapper has the same ``__wrapped__`` in both cases. A
        coroutine is returned in another, which goes on with the same block and ends it.
        """
        self._enter(self._buffer_to_join())
        try:
            result = function(*args, **kwargs)
            if inspect.isawaitable(result):
                return cast("R", self._finish(result))
            self._checked_result(function, result)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self.__exit__(None, None, None)
        return result

    def _finish(self, awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
        self._leave()

        async def finish() -> Any:
            self._token = Scope.enter(self, self._buffer)
            try:
                result = await awaitable
            except BaseException as error:
                await self.__aexit__(type(error), error, error.__traceback__)
                raise
            await self.__aexit__(None, None, None)
            return result

        return finish()

    def _checked_result(self, function: Callable[..., Any], result: R) -> R:
        """Return ``result``, unless it is work that hasn't run yet, and would outlive the block."""
        inner = getattr(result, "gen", None)  # of what contextlib.contextmanager has made
        if any(map(_is_pending, (result, inner))):
            if inspect.iscoroutine(result):
                result.close()  # or Python would warn that it was never awaited
            raise UsageError(
                f"{_name_of(function)} returned {result!r}, whose body would run after the block "
                "has ended; decorate the function that it belongs to, or give a wrapper of it "
                "functools.wraps(); in a generator use a with block"
            )
        return result

    def _new_block(self) -> AutoPublishingEventCollector:
        return type(self)(independent=self._independent, **self._options)

    def _buffer_to_join(self) -> Buffer | None:
        """Return the innermost open buffer of the unit that this block joins, or None."""
        if self._token is not None or self._buffer.closed:
            raise UsageError("an auto_publishing block can be entered only once; create another")
        present = Scope.present()
        if present is None:
            return None
        buffer, unit = present.buffer, present.buffer.unit
        outermost = buffer.outermost
        if (outermost.closed and not outermost.abandoned) or unit.pid != process.pid:
            return None
        if self._independent or not unit.publishes_itself:
            self._unit.follow(unit)
            return None
        if self._options:
            raise UsageError(
                f"this auto_publishing block joins the unit of work around it, whose options "
                f"apply; leave out {', '.join(sorted(self._options))}, "
                "or pass independent=True"
            )
        while buffer.closed and buffer.parent is not None:
            buffer = buffer.parent
        return None if buffer.closed else buffer

    def _enter(self, outer: Buffer | None) -> Self:
        if outer is None:
            self._unit.publishes_itself = True
            self._unit.observer = seam.observer
        else:
            self._unit = outer.unit
            self._buffer = Buffer(outer.unit, outer)
        before = Scope.present()
        try:
            self._token = Scope.enter(self, self._buffer)
        except BaseException:  # a signal handler raised, when it was current already
            Scope.resume(before)
            raise
        return self

    def _leave(self) -> None:
        token = self._token
        if token is not None:
            Scope.leave(token)
            self._token = None

    def _succeed(self) -> bool:
        """Close, and pass the events to the unit around the block; return whether to publish them.

        From here on a task or thread that outlives the block is refused: nothing can be enqueued
        while the block waits for the confirms, which would then be left behind.
        """
        if self._unit.pid != process.pid:
            self._buffer.close()  # a forked child leaves its parent's block: not its events
            return False
        if self.joined and self._buffer.merge():
            return False
        if sinks.is_begun is not None and self._buffer.events and sinks.is_begun():
            _warn_once_of_transaction()
        self._buffer.closed = True
        return True

    def _hand_over_rest(self, interruption: BaseException) -> None:
        """Submit what is left of a block that has succeeded, after something ended its publishing.

        A signal handler that raises (a time limit, Ctrl-C) doesn't undo the work, whose events must
        not be lost. What the publisher itself has refused would be refused again.
        """
        if not isinstance(interruption, OutboxError) and self._succeed() and self._buffer.events:
            with contextlib.suppress(Exception):  # what remains is logged as lost
                self._hand_over(self._buffer, self.publisher)

    def _fail(self, error: BaseException | None) -> None:
        events = self._buffer.close()
        if self._unit.pid != process.pid:
            return
        dropped = self._drop(events)
        if dropped:
            # Other exceptions show up elsewhere; a SystemExit would drop events without a trace.
            level = logging.WARNING if isinstance(error, SystemExit) else logging.DEBUG
            logger.log(level, "the block ended with %r; events dropped: %s", error, ids(dropped))

    def _end(self) -> None:
        self._leave()  # if that was interrupted before
        buffer = self._buffer
        buffer.closed = True
        if buffer.events and self._unit.pid == process.pid:  # publishing raised an exception
            # Logged before they are gone: a signal handler may raise at any of these lines.
            message = "%d event(s) lost at the end of a block: %s"
            log(logger, logging.ERROR, message, len(buffer.events), ids(buffer.events))
            self._drop(buffer.close())


class _Kind(enum.Enum):
    """What calling a function does, as far as is known before it is called."""

    PLAIN = enum.auto()
    COROUTINE = enum.auto()
    GENERATOR = enum.auto()
    UNKNOWN = enum.auto()
    """It wraps a coroutine function: it returns the coroutine, or runs it."""


def _kind_of(function: Callable[..., Any]) -> _Kind:
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = type(function).__call__  # an object that is called like a function
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return _Kind.GENERATOR
    if inspect.iscoroutinefunction(function):
        return _Kind.COROUTINE
    marked = hasattr(function, "_is_coroutine")  # asyncio's mark before Python 3.12
    wrapped = inspect.unwrap(function)
    if marked or (wrapped is not function and _kind_of(wrapped) is not _Kind.PLAIN):
        return _Kind.UNKNOWN
    return _Kind.PLAIN


def _is_pending(result: object) -> bool:
    return inspect.iscoroutine(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


@overload
def auto_publishing(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def auto_publishing(
    *,
    independent: bool = ...,
    publisher: Publisher | None = ...,
    autoflush: bool = ...,
    max_events: int | None = ...,
    max_bytes: int | None = ...,
) -> AutoPublishingEventCollector: ...


def auto_publishing(
    function: Callable[..., Any] | None = None, /, *, independent: bool = False, **options: Any
) -> Any:
    """Return a block that publishes its events if it succeeds, and drops them otherwise.

    Use it as ``with auto_publishing():``, as ``async with auto_publishing():``, or as a decorator
    of a function or coroutine function (with or without parentheses). Inside a unit of work that
    publishes at its end (middleware, an outer block, a consumer with ``auto_publish``) the block
    joins that unit; elsewhere, and with ``independent=True``, it is a separate unit.

    Args:
        function: the function to decorate.
        independent: True to never join.
        **options: ``publisher``, ``autoflush``, ``max_events``, ``max_bytes``, as in
            :class:`EventCollector`; not for a block that joins.

    Raises:
        UsageError: on entering: a ``with`` block that would have to wait on a running event loop
            (use ``async with``); options on a block that joins; a block that was entered before.
    """
    known = {"publisher", "autoflush", "max_events", "max_bytes"}
    if unknown := options.keys() - known:
        raise UsageError(f"auto_publishing has no option {', '.join(sorted(unknown))}")
    options = {name: value for name, value in options.items() if value is not None}
    block = AutoPublishingEventCollector(independent=independent, **options)
    return block if function is None else block(function)


@functools.cache
def _warn_once_of_transaction() -> None:
    logger.warning(
        "events are published before the transaction around their block is committed: put "
        "auto_publishing() around session.begin(), or store them with session= or "
        "outbox.sql.bind()"
    )
