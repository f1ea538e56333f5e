"""The subprocess that runs handlers for a worker (``--isolate process``).

``process_pool`` starts it. It receives deliveries over a socket, and sends back their outcomes.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from outbox import BrokerError, ConnectionLost, Nacked, exit_codes
from outbox.configuration import default_publisher, override_url
from outbox.consumers import logs
from outbox.consumers.discovery import load
from outbox.consumers.hooks import HookFailed, declared
from outbox.consumers.isolation.inline_hooks import InlineHooks
from outbox.consumers.isolation.process_pool import STOPPING, Orders
from outbox.consumers.message.deduplication import open_inbox
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message, may_be_excused
from outbox.consumers.message.steps import Steps
from outbox.consumers.outcome import Again, Dead, Failed, Hold, Outcome, RemoteError
from outbox.consumers.tasks.task_queue import open_results
from outbox.consumers.tracebacks import traceback_of
from outbox.messages.delivery import Delivery
from outbox.system import signals
from outbox.system.child_process import Parent

__all__ = ["main"]

logger = logging.getLogger("outbox.consumer")


def main(parent: Parent) -> int:
    """Process the deliveries from the parent's channel until it is closed."""
    _leave_signals_to_worker()
    parent.when_gone(_kill_group, _on_word)
    connection = Connection(parent.channel)
    orders: Orders = connection.recv()
    logs.set_up(orders.log_level, orders.log_format)
    # A script's folder, such as that of manage.py, is in the path of its own process alone.
    sys.path[:] = orders.path or sys.path
    override_url(orders.url)
    consumers = {consumer.queue: consumer for consumer in load(orders.consumers, warn=False)}
    _leave_signals_to_worker()  # also those that the application handles
    publisher = default_publisher()
    results = open_results(publisher.settings, consumers.values())
    if results is not None:
        results.start()
    inbox = open_inbox(publisher.settings, consumers.values())
    engine = InlineEngine(publisher, inbox, results)
    hooks = InlineHooks(declared(), engine.surroundings)
    try:
        hooks.start()
    except HookFailed as error:
        logger.critical("the subprocess ends before it runs a handler: %s", error)
        hooks.stop()
        return exit_codes.UNFINISHED
    connection.send(None)  # ready: what it imports doesn't count towards a handler's time limit
    while True:
        try:
            delivery: Delivery = connection.recv()
        except EOFError:
            break
        message = _Message(consumers[delivery.queue], delivery, engine)
        context = contextvars.copy_context()
        connection.send(_portable(context.run(engine.conclude, message)))
    hooks.stop()
    if results is not None:
        results.stop(time.monotonic())
    publisher.close()
    return exit_codes.SUCCESS


def _on_word(word: bytes) -> None:
    if word == STOPPING:
        signals.set_stop_received()


def _leave_signals_to_worker() -> None:
    """Have signals stop neither this process nor its handler: the worker decides when to stop."""
    signals.note_stop(signal.SIGINT)
    signals.note_stop(signal.SIGTERM)
    signals.ignore(signal.SIGHUP)


class _Message(Message):
    """A message that is concluded here, before its outcome is sent to the worker."""

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Conclude the message, or have the worker hold it if a stop may have failed it."""
        if signals.stop_received and may_be_excused(result):
            # If the worker doesn't stop, the signal was for this process alone: the next counts.
            signals.stop_received = False
            return Hold(_remote(result.error))
        return (yield from super().conclude(result))


def _portable(outcome: Outcome) -> Outcome:
    """Return ``outcome`` without the application's exceptions, which may not be picklable."""
    match outcome:
        case Again(error=error):
            return dataclasses.replace(outcome, error=_remote(error))
        case Dead(error=error, decisive=decisive) if error is not None:
            return dataclasses.replace(outcome, error=_remote(error, decisive), decisive=None)
        case Hold() if outcome.is_refusal:
            return Hold(Nacked(str(outcome.error)))
        case Hold(error=BrokerError()):  # its text says enough
            return Hold(ConnectionLost(str(outcome.error)))
        case Hold():
            return dataclasses.replace(outcome, error=_remote(outcome.error))
    return outcome


def _remote(error: BaseException, decisive: BaseException | None = None) -> RemoteError:
    if isinstance(error, RemoteError):
        return error
    return RemoteError(type(decisive or error).__qualname__, traceback_of(error))


def _kill_group() -> None:
    """Kill this process and the programs its handlers started; its message is redelivered."""
    if os.getpgrp() == os.getpid():  # otherwise the group isn't ours to kill
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    inherited = Parent.inherited()
    sys.exit(exit_codes.USAGE if inherited is None else main(inherited))
