"""The worker's side of isolation: handlers in subprocesses, which can be killed on timeout.

Each thread of the worker has one subprocess, started at the thread's first message. The subprocess
runs an attempt as a thread would, follow-on events and callbacks included, and sends back the
outcome. It never talks to the subscription: the worker settles the message. So a subprocess may die
at any point, and its message is still unsettled.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from outbox.consumers.current import set_current_message
from outbox.consumers.definition import Consumer
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Abandoned, Call, Steps
from outbox.consumers.outcome import (
    Failed,
    Hold,
    Outcome,
    ProcessDied,
    ProcessTimeout,
    Unconfirmed,
)
from outbox.consumers.tracebacks import strip_engine
from outbox.messages.delivery import Delivery
from outbox.messages.received_event import Undecodable, decode
from outbox.system.child_process import ChildProcess
from outbox.system.resident_memory import resident_bytes
from outbox.telemetry import tracing

__all__ = ["STOPPING", "IsolatedMessage", "Orders", "ProcessPool"]

STOPPING = b"stop"
"""The word to a subprocess that a signal stops its worker."""

_COMMAND = [sys.executable, "-m", "outbox.consumers.isolation.process_main"]
_START = 60.0  # seconds for a subprocess to import the application
_FINISH = 10.0  # seconds for idle subprocesses to publish the events that their callbacks left
_LOOK_EVERY = 1.0  # seconds between two checks whether a silent subprocess is still running


class _NotStarted(Exception):
    """A subprocess could not be started, or could not import the application."""


@dataclass(frozen=True, slots=True)
class Orders:
    """The configuration of a subprocess, sent to it when it starts.

    Attributes:
        consumers: the consumers to import, each as ``MODULE[:ATTR]``.
        url: the broker URL; None for ``OUTBOX_URL``.
        log_level: the level from which it logs.
        log_format: ``text`` or ``json``.
        path: where the worker finds modules; empty for where a subprocess does.
    """

    consumers: Sequence[str]
    url: str | None = field(repr=False)
    log_level: str
    log_format: str
    path: Sequence[str] = ()


class ProcessPool:
    """A pool of subprocesses, one per thread, that run attempts. Thread-safe."""

    def __init__(self, orders: Orders) -> None:
        """Create the pool, without starting subprocesses yet."""
        self._orders = orders
        self._children: dict[threading.Thread, _Child] = {}
        self._lock = threading.Lock()
        self._ended = False

    def attempt(self, delivery: Delivery, limit: float | None) -> Outcome:
        """Process ``delivery`` once in this thread's subprocess, and return the outcome.

        Args:
            delivery: the message.
            limit: seconds after which the subprocess is killed, or None.

        Raises:
            ProcessTimeout: the subprocess exceeded the limit and was killed.
            ProcessDied: the subprocess ended without an answer.
            _NotStarted: the subprocess never became ready to process a message.
            Abandoned: the worker has stopped meanwhile.
        """
        child = self._child()
        try:
            if not child.ready:
                child.wait_until_ready(self._orders)
            return child.attempt(delivery, limit)
        except BaseException:
            self._forget(child)  # the next message must not get a late answer to this one
            if self._ended:  # then end() killed it, which isn't the message's failure
                raise Abandoned from None
            raise

    def largest(self) -> int:
        """Return the resident size of the largest subprocess, in bytes."""
        with self._lock:
            return max((resident_bytes(child.pid) for child in self._children.values()), default=0)

    def announce_stop(self) -> None:
        """Let the subprocesses know that a signal stops the worker."""
        with self._lock:
            for child in self._children.values():
                child.say(STOPPING)

    def end(self) -> None:
        """Kill the subprocesses that are in a handler, and let the idle ones exit."""
        with self._lock:
            self._ended = True
            children = list(self._children.values())
        for child in children:
            if child.busy:
                child.kill()
            else:
                child.finish()
        deadline = time.monotonic() + _FINISH  # for all: they exit in parallel
        for child in children:
            if child.wait(max(0.0, deadline - time.monotonic())) is None:
                child.kill()
            child.close()

    def _child(self) -> _Child:
        thread = threading.current_thread()
        with self._lock:
            child = self._children.get(thread)
            if self._ended:
                raise Abandoned
            if child is None:
                try:
                    child = self._children[thread] = _Child()
                except OSError as error:
                    raise _NotStarted(f"cannot start a subprocess: {error}") from error
        return child

    def _forget(self, child: _Child) -> None:
        with self._lock:
            self._children.pop(threading.current_thread(), None)
        child.kill()


class _Child(ChildProcess):
    """One subprocess. Used by one thread only, except for ``kill``.

    It leads a process group, which includes the programs that its handlers start: a program that a
    handler waits for is killed with the handler. Start a program in another session if it must
    outlive the subprocess.
    """

    def __init__(self) -> None:
        self.ready = False
        self.busy = False
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        super().__init__(_COMMAND, theirs.detach(), leads_group=True)

    def wait_until_ready(self, orders: Orders) -> None:
        try:
            self._connection.send(orders)
            self._receive(_START, "import the application")
        except (ProcessTimeout, ProcessDied, OSError) as error:
            raise _NotStarted(f"no subprocess can run handlers: {error}") from error
        self.ready = True

    def attempt(self, delivery: Delivery, limit: float | None) -> Outcome:
        self.busy = True
        try:
            self._connection.send(delivery)
        except OSError:
            raise self._died() from None
        outcome: Outcome = self._receive(math.inf if limit is None else limit, "process a message")
        self.busy = False
        return outcome

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()

    def kill(self) -> None:
        super().kill()
        self.wait()
        self.close()

    def let_go(self) -> None:
        super().let_go()
        self._connection.close()

    def close(self) -> None:
        self.finish()
        super().close()

    def _receive(self, limit: float, what: str) -> Outcome:
        outcome: Outcome
        try:
            in_time = self._wait(limit)
            if in_time:
                outcome = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not in_time:
            raise ProcessTimeout.after(limit, what)
        return outcome

    def _wait(self, limit: float) -> bool:
        """Wait for an answer; return whether it arrived in time.

        Raises:
            EOFError: the subprocess has ended. A process that it forked may hold the connection
                open, so the end of the connection alone doesn't show it.
        """
        deadline = time.monotonic() + limit
        while not self._connection.poll(min(_LOOK_EVERY, max(0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            if self.code() is not None and not self._connection.poll():
                raise EOFError
        return True

    def _died(self) -> ProcessDied:
        code = self.wait(5)
        if code is None:
            return ProcessDied("its subprocess closed the connection, but did not exit")
        status = f"signal {-code}" if code < 0 else f"exit code {code}"
        return ProcessDied(f"its subprocess ended with {status}")


class IsolatedMessage(Message):
    """A message whose attempts run in a subprocess."""

    def __init__(
        self, consumer: Consumer, delivery: Delivery, services: Services, isolation: ProcessPool
    ) -> None:
        """Create the message, without processing it yet."""
        super().__init__(consumer, delivery, services)
        self._isolation = isolation
        self._is_concluded = False

    def attempt(self) -> Steps[Outcome | Failed | Unconfirmed]:
        """Process the message once in a subprocess, which also concludes it, if it survives."""
        self._is_concluded = False
        self.processing = None
        began = 0 if tracing.seam.tracer is None else time.time_ns()
        arguments = (self.delivery, self.consumer.time_limit)
        try:
            outcome: Outcome = yield Call(self._isolation.attempt, arguments)
        except _NotStarted as error:  # not the message's fault
            return Hold(error)
        except (ProcessTimeout, ProcessDied) as error:
            strip_engine(error)
            if tracing.seam.tracer is not None:  # the subprocess can't end the attempt any more
                settings = self._services.publisher.settings
                self.processing = tracing.seam.tracer.processing(self.delivery, settings, began)
                self.processing.enter()
            with contextlib.suppress(Undecodable):
                self.event = decode(self.delivery)  # for the callbacks, which run here now
                set_current_message(self.event)
            return Failed(error)
        self._is_concluded = True
        return outcome

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Conclude the message if the subprocess could not."""
        if self._is_concluded and not isinstance(result, Failed):
            return result
        return (yield from super().conclude(result))
