"""``outbox relay``: publishes stored events until it is stopped."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from outbox import exit_codes
from outbox.commands.database_access import (
    DatabaseUnavailable,
    open_store,
    translate_errors,
)
from outbox.commands.options import broker_option, database_option, positive
from outbox.publisher import Publisher
from outbox.system.signals import Signals

if TYPE_CHECKING:
    from outbox.sql import Relay, Store

__all__ = ["add_parser"]

logger = logging.getLogger("outbox.relay")

_EXAMPLES = """\
examples:
  outbox relay --database postgresql://app@db/shop --url amqp://user:password@host:5672/vhost
  OUTBOX_DATABASE_URL=... OUTBOX_URL=... outbox relay --ordered
      keep the order of events with the same key, also across several relays
  outbox relay --once
      publish the events that are due, and exit

On the first SIGTERM or SIGINT the relay exits after waiting for outstanding confirms; on the second
it exits at once. Nothing is lost either way: unconfirmed events are published again, with the same
ids.

exit codes: 0 stopped as requested, 1 some events were not confirmed in time or --once was stopped,
2 wrong usage or no such table, 7 the database or the broker cannot be reached, 130 stopped at once
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
    relay.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if logging.getLogger().level == logging.CRITICAL:
        logging.getLogger().setLevel(logging.INFO)  # a service shows what it does only in its log
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


def _relay(store: Store, signals: Signals, options: argparse.Namespace) -> int:
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
        run = _publish_once if options.once else _serve
        return run(relay, signals, options.shutdown_timeout)
    finally:
        publisher.close(0)  # the relay has released the unconfirmed events


def _serve(relay: Relay, signals: Signals, timeout: float) -> int:
    progress = _Progress(relay)
    relay.start()
    logger.info("relaying")
    while not signals.asked:
        relay.wait(_POLL)
        progress.update()
    finished = relay.stop(timeout)
    progress.end()
    logger.info("stopped; %s events published", f"{_confirmed(relay):,}")
    return exit_codes.SUCCESS if finished else exit_codes.UNFINISHED


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
