"""``outbox relay``: publishes stored events until it is stopped."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from outbox.commands import exit_codes
from outbox.commands.database import open_store, told
from outbox.commands.options import broker_option, database_option, positive
from outbox.publisher import Publisher

if TYPE_CHECKING:
    from outbox.sql import Relay

__all__ = ["add_parser"]

logger = logging.getLogger("outbox.relay")

_EXAMPLES = """\
examples:
  outbox relay --database postgresql://app@db/shop --url amqp://user:password@host:5672/vhost
  OUTBOX_DATABASE_URL=... OUTBOX_URL=... outbox relay --ordered
      events of one key strictly in their order, beside any number of relays that do so
  outbox relay --once
      publish what is due, and end

SIGTERM and SIGINT let what is on its way be confirmed; a second one ends at once. Nothing is lost
either way: what is not confirmed is published again, with the same id.

exit codes: 0 stopped in order, 1 some events were not confirmed in time, 2 wrong usage or no such
table, 3 the database or the broker cannot be reached, 130 ended by a second signal
"""

_PROGRESS = 1.0  # seconds between two lines on a terminal
_LOGGED = 60.0  # seconds between two lines in a log


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``relay`` to the sub-commands of ``outbox``; see ``parked.add_parser``."""
    relay = commands.add_parser(
        "relay",
        parents=[common, broker_option(), database_option()],
        help="publish stored events",
        description="Publish what transactions have stored. Any number of relays may run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    relay.add_argument(
        "--batch", type=positive, default=1000, metavar="N", help="rows in a claim (default: 1000)"
    )
    relay.add_argument(
        "--lease",
        type=float,
        metavar="SECONDS",
        help="for which a claimed row is left to this relay (default: 60)",
    )
    relay.add_argument(
        "--ordered", action="store_true", help="keep the order of events of one key strictly"
    )
    relay.add_argument(
        "--listen",
        action="store_true",
        help="look as soon as PostgreSQL tells (NOTIFY outbox_events), rather than within 2 s",
    )
    relay.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="that events on their way have to be confirmed at the end (default: 10)",
    )
    relay.add_argument("--once", action="store_true", help="publish what is due, and end")
    relay.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if logging.getLogger().level == logging.CRITICAL:
        logging.getLogger().setLevel(logging.INFO)  # it is a service: its log is what one sees
    with open_store(options) as store, Publisher(options.url) as publisher:
        from outbox.sql import Relay

        relay = Relay(
            store,
            publisher,
            batch=options.batch,
            lease=options.lease,
            ordered=options.ordered,
            listen=options.listen,
        )
        if options.once:
            with told():
                count = relay.run_once()
            print(f"{count:,} event{'' if count == 1 else 's'} published")
            return exit_codes.SUCCESS
        return _serve(relay, options.shutdown_timeout)


def _serve(relay: Relay, timeout: float) -> int:
    asked = threading.Event()

    def ask(number: int, _: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        relay.start()
        logger.info("relaying")
        _tell_progress(relay, asked)
        finished = relay.stop(timeout)
        logger.info("stopped; %s events published", f"{relay.stats().published:,}")
        return exit_codes.SUCCESS if finished else exit_codes.INCOMPLETE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_progress(relay: Relay, asked: threading.Event) -> None:
    """Tell how it goes, on a terminal in one line, otherwise in the log, until asked to stop."""
    on_terminal = sys.stderr.isatty()
    every = _PROGRESS if on_terminal else _LOGGED
    then, before = time.monotonic(), 0
    while not asked.wait(every):
        now, published = time.monotonic(), relay.stats().published
        rate = (published - before) / (now - then)
        if on_terminal:
            sys.stderr.write(f"\r\x1b[K{published:,} events published, {rate:,.0f} a second ")
            sys.stderr.flush()
        elif published != before:
            logger.info("%s events published, %s a second", f"{published:,}", f"{rate:,.0f}")
        then, before = now, published
    if on_terminal:
        sys.stderr.write("\n")
