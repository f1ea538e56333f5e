"""The work of one process, from importing the consumers to its exit code."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from outbox import NotConfigured, OutboxError, exit_codes
from outbox.configuration import default_publisher, override_url
from outbox.consumers.command.arguments import limits_of
from outbox.consumers.command.framework import Framework
from outbox.consumers.command.limits import Limits, Recycling
from outbox.consumers.definition import Consumer
from outbox.consumers.discovery import load, selected
from outbox.consumers.hooks import HookFailed
from outbox.consumers.isolation.process_pool import Orders, ProcessPool
from outbox.consumers.losses.begun_table import BegunTable
from outbox.consumers.worker.worker import Worker
from outbox.presence import announced
from outbox.system import signals
from outbox.system.resident_memory import resident_bytes
from outbox.system.signals import Stop

__all__ = ["run"]

logger = logging.getLogger("outbox.consumer")

_POLL = 0.2
"""Seconds, at most, until a signal is noticed."""
_FIRST_POLL = 0.05
"""Likewise, until the worker consumes."""
_LINE_EVERY = 60.0
"""Seconds between two log lines of a process that waits for its messages."""
_NAMED = 5
"""Messages that such a line names."""


def run(
    options: argparse.Namespace,
    stop: Stop,
    *,
    on_start: Callable[[Worker, Recycling], None] = lambda _worker, _recycling: None,
    on_ready: Callable[[], None] = lambda: None,
    on_leaving: Callable[[], None] = lambda: None,
    on_stopping: Callable[[], None] = lambda: None,
    begun: BegunTable | None = None,
    framework: Framework | None = None,
) -> int:
    """Consume until ``stop`` is requested, or a limit is reached.

    Args:
        options: the parsed command line.
        stop: the request to stop, which is checked several times a second.
        on_start: the function to call with the started worker and its limits.
        on_ready: the function to call when the worker begins to consume.
        on_leaving: the function to call when the worker begins to finish what runs, after a limit.
        on_stopping: the function to call when the worker begins to stop.
        begun: the table that the process shares with its siblings; see ``Worker``.
        framework: what the project of a framework adds.

    Returns:
        The exit code, one of ``outbox.exit_codes``.
    """
    limits = limits_of(options)
    try:
        override_url(options.url)
        if framework is not None:
            options.consumers = framework.consumers(options)
        consumers, ranks = selected(load(options.consumers), options.queue)
        publisher = default_publisher()  # the application's, if it has configured one
        isolation = _isolation(options)
        worker = Worker(
            consumers,
            publisher=publisher,
            threads=options.threads,
            concurrency=options.concurrency,
            prefetch=options.prefetch,
            max_messages=limits.messages,
            ranks=ranks,
            isolation=isolation,
            begun=begun,
        )
        recycling = Recycling(limits, time.monotonic(), resident=_resident(isolation))
        stop.begin()
        reason = None
        with contextlib.ExitStack() as beside:
            if framework is not None:
                beside.enter_context(framework.beside(options, publisher))
            beside.enter_context(_announced(options, worker, stop))
            _spare_what_stays()
            worker.start()
            try:
                on_start(worker, recycling)
                reason = _consume(worker, stop, limits, recycling, on_ready)
                if reason is not None:
                    logger.info("stopping: %s", reason)
                    on_leaving()
                    _leave(worker, stop)
                on_stopping()
                if isolation is not None and signals.stop_received:
                    isolation.announce_stop()
                if stop.asked or reason is None:
                    logger.info("stopping: shutdown requested")
            finally:
                finished = worker.stop(options.shutdown_timeout)
                beside.close()
                publisher.close()
    except HookFailed as error:  # logged with its traceback
        logger.critical("the worker ends before it consumes: %s", error)
        return exit_codes.UNFINISHED
    except OutboxError as error:
        text = str(error)
        if framework is not None and isinstance(error, NotConfigured):
            text = framework.not_configured
        if options.log_format == "json":
            logger.critical("%s", text)
        else:
            print(f"{options.prog}: {text}", file=sys.stderr)
        return exit_codes.USAGE
    if reason is not None and not stop.asked:
        return exit_codes.RECYCLED
    return exit_codes.SUCCESS if finished else exit_codes.UNFINISHED


def _spare_what_stays() -> None:
    """Have garbage collections leave out what is loaded by now, which stays until the end.

    Messages in flight bring about a full collection now and then, and that walks over all modules:
    of a large application for tenths of a second, in which no thread runs.
    """
    gc.collect()
    gc.freeze()


def _consume(
    worker: Worker,
    stop: Stop,
    limits: Limits,
    recycling: Recycling,
    on_ready: Callable[[], None],
) -> str | None:
    """Wait until there is a reason to stop; return it if the process is to be replaced."""
    is_ready = False
    while not stop.asked:
        stopped = worker.wait(_POLL if is_ready else _FIRST_POLL)
        if worker.is_consuming and not is_ready:
            is_ready = True
            on_ready()
            _log_start(worker)
        worker.take_over()
        if worker.has_begun_all:
            return f"{limits.messages} messages processed"
        if stopped:
            return None
        if stop.leaving or stop.quiet:
            return "replaced by another process" if stop.leaving else "asked to begin nothing more"
        reason = recycling.reason(time.monotonic(), has_worked=worker.has_worked)
        if reason is not None:
            return reason
    return None


def _leave(worker: Worker, stop: Stop) -> None:
    """Begin no more messages, and wait for those that run: only a stop or a timeout ends them.

    A quiet process waits for a stop, or to be let go.
    """
    worker.retire()
    began = time.monotonic()
    next_line = began + _LINE_EVERY
    while not stop.asked and not (worker.is_idle and (stop.leaving or not stop.quiet)):
        time.sleep(_FIRST_POLL)
        worker.give_back()
        if time.monotonic() >= next_line:
            next_line += _LINE_EVERY
            if not worker.is_idle:
                _log_running(worker, time.monotonic() - began)


def _log_running(worker: Worker, seconds: float) -> None:
    running = worker.running()
    names = [f"{delivery.message_id!r} of {delivery.queue!r}" for delivery in running[:_NAMED]]
    logger.info(
        "waiting for %d message(s) to end, for %.0f s now: %s%s",
        len(running),
        seconds,
        ", ".join(names),
        ", ..." if len(running) > _NAMED else "",
    )


def _log_start(worker: Worker) -> None:
    logger.info(
        "consuming %s with %d thread(s), %d task(s), prefetch %d",
        ", ".join(map(_described, worker.consumers.values())),
        worker.threads,
        worker.concurrency,
        worker.prefetch,
    )


def _announced(
    options: argparse.Namespace, worker: Worker, stop: Stop
) -> AbstractContextManager[None]:
    """Return the block in which the process is announced."""

    def phase() -> str:
        if stop.asked:
            return "stopping"
        if worker.is_stopping:
            return "leaving"
        return "ready" if worker.is_consuming else "starting"

    def describe() -> dict[str, Any]:
        return {
            "queues": list(worker.consumers),
            "threads": worker.threads,
            "concurrency": worker.concurrency,
            "in_flight": len(worker.running()),
            "late": worker.late,
        }

    return announced(worker.publisher, "worker", id=options.id, phase=phase, describe=describe)


def _described(consumer: Consumer) -> str:
    topics = f" (topics {', '.join(map(repr, consumer.topics))})" if consumer.topics else ""
    return f"{consumer.queue!r}{topics}"


def _isolation(options: argparse.Namespace) -> ProcessPool | None:
    if options.isolate is None:
        return None
    return ProcessPool(
        Orders(
            tuple(options.consumers),
            options.url,
            options.log_level,
            options.log_format,
            tuple(sys.path),
        )
    )


def _resident(isolation: ProcessPool | None) -> Callable[[], int]:
    """Return a function for the resident size of the largest process that runs handlers."""
    if isolation is None:
        return resident_bytes
    return lambda: max(resident_bytes(), isolation.largest())
