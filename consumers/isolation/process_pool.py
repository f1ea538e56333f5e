"""Handlers in processes of their own, which can be killed when their time is over.

Each thread of the worker has one such process, started at its first message. The process runs an
attempt as a thread would, its follow-on events included, and sends back what became of it; the
message is settled here.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from outbox.consumers.current import set_current_message
from outbox.consumers.definition import Consumer
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Abandoned, Call, Steps
from outbox.consumers.outcome import Failed, Hold, Outcome, ProcessDied, ProcessTimeout
from outbox.consumers.received_event import Undecodable, decode
from outbox.messages.delivery import Delivery
from outbox.system.child_process import ChildProcess
from outbox.system.resident_memory import resident_bytes

__all__ = ["Isolation", "IsolatedMessage", "Orders"]

_COMMAND = [sys.executable, "-m", "outbox.consumers.isolation.process_main"]
_START = 60.0  # seconds that a process has to import the application
_FINISH = 10.0  # seconds that those which are idle have to publish what their callbacks have left
_LOOK_EVERY = 1.0  # seconds between two looks whether one that says nothing is still there


class _NotStarted(Exception):
    """A process could not be started, or could not import the application."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a process is told at its start.

    Attributes:
        consumers: ``MODULE[:ATTR]`` each.
        url: of the broker; None for ``OUTBOX_URL``.
        log_level: of its log.
        log_format: ``text`` or ``json``.
    """

    consumers: Sequence[str]
    url: str | None
    log_level: str
    log_format: str


class Isolation:
    """Runs attempts in other processes. Thread-safe."""

    def __init__(self, orders: Orders) -> None:
        """Start nothing yet."""
        self._orders = orders
        self._children: dict[threading.Thread, _Child] = {}
        self._lock = threading.Lock()
        self._ended = False

    def attempt(self, delivery: Delivery, limit: float | None) -> Outcome:
        """Return what became of ``delivery`` in this thread's process.

        Args:
            delivery: the message.
            limit: seconds; then the process is killed.

        Raises:
            ProcessTimeout: it was.
            ProcessDied: the process has ended by itself.
            _NotStarted: it never came so far as to process anything.
            Abandoned: the worker has stopped meanwhile.
        """
        child = self._child()
        try:
            if not child.ready:
                child.wait_until_ready(self._orders)
            return child.attempt(delivery, limit)
        except BaseException:
            self._forget(child)
            if self._ended:
                raise Abandoned from None
            raise

    def largest(self) -> int:
        """Return the resident size of the largest of the processes, in bytes."""
        with self._lock:
            return max((resident_bytes(child.pid) for child in self._children.values()), default=0)

    def end(self) -> None:
        """Kill the processes that are in a handler, and have the others end."""
        with self._lock:
            self._ended = True
            children = list(self._children.values())
        for child in children:
            if child.busy:
                child.kill()
            else:
                child.finish()
        deadline = time.monotonic() + _FINISH  # of all: they end beside each other
        for child in children:
            if child.wait(max(0.0, deadline - time.monotonic())) is None:
                child.kill()
            child.close()

    def _child(self) -> _Child:
        thread = threading.current_thread()
        with self._lock:
            found = self._children.get(thread)
            if self._ended:
                raise Abandoned
            if found is None:
                try:
                    found = self._children[thread] = _Child()
                except OSError as error:
                    raise _NotStarted(f"no process can be started: {error}") from error
        return found

    def _forget(self, child: _Child) -> None:
        with self._lock:
            self._children.pop(threading.current_thread(), None)
        child.kill()


class _Child(ChildProcess):
    """One process. For one thread, but for ``kill``.

    It leads a process group, in which is what its handlers start: a program that a handler waits
    for ends with the handler. What is to outlive it is started in another session.
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
            raise _NotStarted(f"no process can run handlers: {error}") from error
        self.ready = True

    def attempt(self, delivery: Delivery, limit: float | None) -> Outcome:
        self.busy = True
        try:
            self._connection.send(delivery)
        except OSError:
            raise self._died() from None
        found: Outcome = self._receive(math.inf if limit is None else limit, "process a message")
        self.busy = False
        return found

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()

    def kill(self) -> None:
        super().kill()
        self.wait()
        self.close()

    def close(self) -> None:
        self.finish()
        super().close()

    def _receive(self, limit: float, what: str) -> Outcome:
        found: Outcome
        try:
            in_time = self._wait(limit)
            if in_time:
                found = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not in_time:
            raise ProcessTimeout.after(limit, what)
        return found

    def _wait(self, limit: float) -> bool:
        """Wait for an answer; return whether it has come in time.

        Raises:
            EOFError: the process has ended. While one that it has forked is there, that does not
                end the connection.
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
            return ProcessDied("the process that ran it says nothing any more")
        told = f"signal {-code}" if code < 0 else f"exit code {code}"
        return ProcessDied(f"the process that ran it has ended with {told}")


class IsolatedMessage(Message):
    """A message whose attempts run in another process."""

    def __init__(
        self, consumer: Consumer, delivery: Delivery, services: Services, isolation: Isolation
    ) -> None:
        """Nothing is done yet."""
        super().__init__(consumer, delivery, services)
        self._isolation = isolation
        self._is_concluded = False

    def attempt(self) -> Steps[Outcome | Failed]:
        """Have the message processed once, and concluded, if that comes to an end."""
        self._is_concluded = False
        arguments = (self.delivery, self.consumer.time_limit)
        try:
            outcome: Outcome = yield Call(self._isolation.attempt, arguments)
        except _NotStarted as error:  # nothing that the message could help
            return Hold(error)
        except (ProcessTimeout, ProcessDied) as error:
            with contextlib.suppress(Undecodable):
                self.event = decode(self.delivery)
                set_current_message(self.event)
            return Failed(error)
        self._is_concluded = True
        return outcome

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Conclude what the other process could not."""
        if self._is_concluded and not isinstance(result, Failed):
            return result
        return (yield from super().conclude(result))
