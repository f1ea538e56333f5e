"""``outbox relay``: publishes stored events until it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from outbox import exit_codes
from outbox.commands.database_access import (
    DatabaseUnavailable,
    open_store,
    translate_errors,
)
from outbox.commands.options import DATABASE_VARIABLE, broker_option, database_option, positive
from outbox.errors import UsageError
from outbox.presence import announced
from outbox.publisher import Publisher
from outbox.service.faces import add_face_options, faces_of
from outbox.service.health.pulse import Pulse
from outbox.service.health.stacks import dump_on_signal
from outbox.service.http_options import http_address
from outbox.service.parent import supervise
from outbox.service.policy_options import add_policy, has_policy
from outbox.service.supervised import (
    LEAVING,
    MARGIN,
    READY,
    STOPPING,
    Supervised,
    SupervisedSignals,
)
from outbox.system.child_process import Parent
from outbox.system.signals import Signals
from outbox.telemetry.row_gauges import RowGauges

if TYPE_CHECKING:
    from outbox.sql import Relay, Store

__all__ = ["add_parser"]

logger = logging.getLogger("outbox.relay")

_EXAMPLES = """\
examples:
  outbox relay --database postgresql://app@db/shop --url amqp://user:password@host:5672/vhost
  OUTBOX_DATABASE_URL=... OUTBOX_URL=... outbox relay --ordered
      keep the order of events with the same key, also across several relays
  outbox relay -p 2 --http :9101
      run two processes, restart them when they die, and answer probes and Prometheus
  outbox relay --once
      publish the events that are due, and exit

On the first SIGTERM or SIGINT the relay exits after waiting for outstanding confirms; on the second
it exits at once. Nothing is lost either way: unconfirmed events are published again, with the same
ids.

exit codes: 0 stopped as requested, 1 some events were not confirmed in time or --once was stopped,
2 wrong usage or no such table, 5 given up, as no process of -p was ever ready, 6 not ready in time
to take over, 7 the database or the broker cannot be reached, 130 stopped at once
by a second signal
"""

_POLL = 0.1  # seconds, at most, until a signal is noticed
_TERMINAL_INTERVAL = 1.0  # seconds between updates of the line on a terminal
_LOG_INTERVAL = 60.0  # seconds between log lines


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``relay`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    database = database_option(common.get_default("application"))
    relay = commands.add_parser(
        "relay",
        parents=[common, broker_option(), database],
        help="publish stored events",
        description="Publish the events that transactions have stored. Any number of relays may "
        "run at the same time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    relay.add_argument(
        "--batch", type=positive, default=1000, metavar="N", help="rows per claim (default: 1000)"
    )
    relay.add_argument(
        "--lease",
        type=float,
        metavar="SECONDS",
        help="how long a claimed row is reserved for this relay (default: 60)",
    )
    relay.add_argument(
        "--ordered", action="store_true", help="keep the order of events with the same key"
    )
    relay.add_argument(
        "--listen",
        action="store_true",
        help="react to PostgreSQL's NOTIFY outbox_events instead of polling every 2 s",
    )
    relay.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for confirms when stopping (default: 10)",
    )
    relay.add_argument("--once", action="store_true", help="publish what is due, and exit")
    processes = relay.add_argument_group("processes")
    processes.add_argument(
        "-p",
        "--processes",
        type=positive,
        metavar="N",
        help="run N relays in processes under a parent that restarts them (default: the command "
        "itself is the relay; the options below imply -p 1)",
    )
    add_policy(processes)
    add_face_options(relay.add_argument_group("service"))
    relay.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if logging.getLogger().level == logging.CRITICAL:
        logging.getLogger().setLevel(logging.INFO)  # a service shows what it does only in its log
    parent = Parent.inherited()
    if parent is not None:
        return _run_supervised(options, parent)
    dump_on_signal()
    faces = [] if options.once else faces_of(options, [_database_of(options)])
    if faces or options.processes or has_policy(options):
        if options.once:
            raise UsageError(
                "--once can't be used with -p, --stuck-after, --max-cpu or --max-restarts"
            )
        return supervise(
            options, faces, logger=logging.getLogger("outbox.relay.processes"), name="relay"
        )
    signals = Signals(second_exits=exit_codes.INTERRUPTED)
    signals.begin()
    try:
        with open_store(options) as store:
            return _relay(store, signals, options)
    except DatabaseUnavailable:
        # A service that is stopped while it waits for its first connection has stopped cleanly.
        if signals.asked and not options.once:
            return exit_codes.SUCCESS
        raise


def _run_supervised(options: argparse.Namespace, parent: Parent) -> int:
    """Run a relay under a parent; return its exit code."""
    supervised = Supervised(parent, logger)
    signals = SupervisedSignals(supervised)
    supervised.stop_with_parent(signals, options.shutdown_timeout + MARGIN)
    signals.begin()
    with open_store(options) as store:
        return _relay(store, signals, options, supervised)


def _database_of(options: argparse.Namespace) -> str:
    """Return what identifies the database, without a password."""
    named = options.database or options.application.database_url
    named = named or os.environ.get(DATABASE_VARIABLE) or ""
    url = urlsplit(named)
    where = f"{url.hostname or ''}{url.path}" if url.scheme else named
    settings = os.environ.get("DJANGO_SETTINGS_MODULE") or os.environ.get("FLASK_APP") or ""
    return f"outbox relay {settings}:{where}"


def _relay(
    store: Store,
    signals: Signals,
    options: argparse.Namespace,
    supervised: Supervised | None = None,
) -> int:
    from outbox.sql import Relay

    application = options.application
    publisher = Publisher(options.url or application.url, **application.settings)
    try:
        relay = Relay(
            store,
            publisher,
            batch=options.batch,
            lease=options.lease,
            ordered=options.ordered,
            listen=options.listen,
        )
        if options.once:
            return _publish_once(relay, signals, options.shutdown_timeout)
        with contextlib.ExitStack() as beside:
            beside.enter_context(_announced(options, relay, signals))
            if supervised is not None and http_address(options):
                gauges = RowGauges(store.status, [""])
                beside.callback(gauges.stop)
                gauges.start()
            return _serve(relay, signals, options.shutdown_timeout, supervised)
    finally:
        publisher.close(0)  # the relay has released the unconfirmed events


def _announced(
    options: argparse.Namespace, relay: Relay, signals: Signals
) -> AbstractContextManager[None]:
    """Return the block in which the process is announced."""

    def phase() -> str:
        if signals.asked:
            return "stopping"
        return "leaving" if signals.leaving else "quiet" if signals.quiet else "ready"

    return announced(relay.publisher, "relay", id=options.id, phase=phase, describe=dict)


def _serve(
    relay: Relay, signals: Signals, timeout: float, supervised: Supervised | None = None
) -> int:
    progress = _Progress(relay)
    relay.start()
    logger.info("relaying")
    if supervised is not None:
        relay.publisher.make_ready()
        pulse = Pulse(relay.publisher.ping)

        def report(seconds: float) -> dict[str, Any]:
            silence = pulse.step(seconds)
            return {
                "links": {"publisher": relay.publisher.connected},
                "pulses": {} if silence is None else {"publisher": silence},
            }

        supervised.report_each_second(report)
        supervised.say(READY)
    while not (signals.asked or signals.leaving or signals.quiet):
        relay.wait(_POLL)
        progress.update()
    if supervised is not None:
        supervised.say(STOPPING if signals.asked else LEAVING)
    finished = relay.stop(timeout)
    while signals.quiet and not (signals.asked or signals.leaving):
        time.sleep(_POLL)
    progress.end()
    logger.info("stopped; %s events published", f"{_confirmed(relay):,}")
    if not finished:
        return exit_codes.UNFINISHED
    return exit_codes.SUCCESS if signals.asked else exit_codes.RECYCLED


def _publish_once(relay: Relay, signals: Signals, timeout: float) -> int:
    progress = _Progress(relay)
    # run_once() blocks: on another thread, so that this one notices signals meanwhile.
    with ThreadPoolExecutor(1) as executor:
        published = executor.submit(relay.run_once)
        while not signals.asked and not wait([published], _POLL).done:
            progress.update()
        if signals.asked:
            relay.ask_to_stop(timeout)
        with translate_errors():
            count = published.result()
    progress.end()
    print(f"{count:,} event{'' if count == 1 else 's'} published")
    return exit_codes.UNFINISHED if signals.asked else exit_codes.SUCCESS


class _Progress:
    """The progress: on a terminal one line that is overwritten, otherwise log lines."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._on_terminal = sys.stderr.isatty()
        self._interval = _TERMINAL_INTERVAL if self._on_terminal else _LOG_INTERVAL
        self._shown_at, self._shown = time.monotonic(), 0

    def update(self) -> None:
        """Show the progress, unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown_at < self._interval:
            return
        published = _confirmed(self._relay)
        rate = (published - self._shown) / (now - self._shown_at)
        if self._on_terminal:
            sys.stderr.write(f"\r\x1b[K{published:,} events published, {rate:,.0f} a second ")
            sys.stderr.flush()
        elif published != self._shown:
            logger.info("%s events published, %s a second", f"{published:,}", f"{rate:,.0f}")
        self._shown_at, self._shown = now, published

    def end(self) -> None:
        """End the line on the terminal."""
        if self._on_terminal:
            sys.stderr.write("\n")


def _confirmed(relay: Relay) -> int:
    stats = relay.stats()
    return stats.published + stats.parked
