"""``auto_publishing()``: a block of code as a unit of work.

A block *joins* the unit of work around it if that unit publishes at its end: on success the block
passes its events to the unit, on failure it drops only those. Otherwise the block is *outermost*: a
separate unit, which publishes at its end.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import Token
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from outbox.backlog.notifier import ids
from outbox.errors import UsageError
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
        self._leave()
        if kind is not None:
            self._fail(error)
        elif self._succeed():
            try:
                if self.autoflush or (self._buffer.events and self.publisher.runs_here):
                    self._flush()
                else:
                    self.report = self.publish()
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
        self._leave()
        if kind is not None:
            self._fail(error)
        elif self._succeed():
            try:
                self.report = await self.publish_async()
            finally:
                self._end()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return ``function`` with each call in a new block.

        Raises:
            UsageError: ``function`` is a generator function, whose body runs in its callers'
                units of work, or isn't callable.
        """
        if not callable(function):
            raise UsageError(f"auto_publishing decorates functions, not {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(
                f"{function.__qualname__} is a generator function, whose body runs step by step "
                "in its callers' units of work; use a with block inside it"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with self._new_block():
                    return await function(*args, **kwargs)

            return cast("Callable[P, R]", call_async)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._new_block():
                return function(*args, **kwargs)

        return call

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
        if buffer.outermost.closed or unit.pid != process.pid:
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
        return buffer

    def _enter(self, outer: Buffer | None) -> Self:
        if outer is None:
            self._unit.publishes_itself = True
            self._unit.observer = seam.observer
        else:
            self._unit = outer.unit
            self._buffer = Buffer(outer.unit, outer)
        self._token = Scope.enter(self, self._buffer)
        return self

    def _leave(self) -> None:
        if self._token is not None:
            Scope.leave(self._token)

    def _succeed(self) -> bool:
        """Pass the events to the unit around the block; return whether to publish them instead."""
        if self._unit.pid != process.pid:
            self._buffer.close()  # a forked child leaves its parent's block: not its events
            return False
        return not (self.joined and self._buffer.merge())

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
        lost = self._drop(self._buffer.close())
        if lost:  # publishing raised, and the caller gets the exception
            message = "%d event(s) lost at the end of a block: %s"
            log(logger, logging.ERROR, message, len(lost), ids(lost))


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
