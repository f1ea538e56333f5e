"""The command line of ``outbox-consume``."""

from __future__ import annotations

import argparse
import math

from outbox.consumers import logs
from outbox.consumers.command.limits import Limits

__all__ = ["limits_of", "make_parser"]

_EXAMPLES = """\
examples:
  outbox-consume shop.consumers
      run every consumer of the module shop.consumers, on the broker of OUTBOX_URL
  outbox-consume shop.consumers:Thumbnails --url amqp://guest:guest@localhost/ -t 16
      run one consumer, sixteen messages at a time
  outbox-consume shop.consumers billing.consumers -Q invoices -Q thumbnails
      of all consumers of two modules, run those of two queues
  outbox-consume shop.consumers -Q high,medium,low
      all of high before any of medium, and all of medium before any of low
  outbox-consume shop.consumers --prefetch 1 -t 1 --shutdown-timeout 300
      one long message at a time, with five minutes to finish it at the end
  outbox-consume shop.consumers -p 4 --max-memory 300M --max-age 12h
      four processes, each replaced when it takes more memory than that, or is half a day old
  outbox-consume shop.consumers -p 4 --log-format json
      the log as JSON, an object a line
  outbox-consume shop.consumers --reload
      while developing: begin anew whenever a source file changes

The first SIGTERM or SIGINT ends it in order: no new messages, those being processed finish within
the shutdown timeout, the rest goes back to the queue. The second ends it at once. With processes
SIGHUP replaces them one by one, by new ones that import everything anew.

exit codes: 0 all settled, 1 some messages did not finish in time, 2 wrong usage, 3 killed by the
second signal
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="outbox-consume",
        description="Run consumers until told to stop.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "consumers",
        nargs="+",
        metavar="MODULE[:ATTR]",
        help="a module, all of whose consumers run, or one consumer in it",
    )
    _add_consuming(parser.add_argument_group("what is consumed"))
    _add_processes(parser.add_argument_group("processes"))
    _add_log(parser.add_argument_group("the log, on standard error"))
    return parser


def limits_of(options: argparse.Namespace) -> Limits:
    """Return what a process may do before it is replaced."""
    return Limits(options.max_messages, options.max_memory, options.max_age)


def _add_consuming(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-Q",
        "--queue",
        action="append",
        metavar="QUEUE[,QUEUE]...",
        help="only the consumers of these queues, all messages of each before any of the next; "
        "repeated, the queues of one have no order towards those of another",
    )
    group.add_argument(
        "-t",
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="messages of plain consumers processed at a time, by each process (default: 8)",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=100,
        metavar="N",
        help="messages of asynchronous consumers processed at a time, by each process (default: "
        "100)",
    )
    group.add_argument(
        "--isolate",
        choices=("process",),
        help="run each plain handler in a process of its own, which is killed when its timeout is "
        "over: one for each thread",
    )
    group.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="messages of each queue sent ahead to each process (default: four a thread, at least "
        "50; twice the concurrency for asynchronous consumers)",
    )
    group.add_argument(
        "--url",
        help="the broker, amqp://user:password@host:5672/vhost, or sqlite:///outbox.db (default: "
        "OUTBOX_URL, which does "
        "not show a password in the list of processes)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_timeout,
        default=30.0,
        metavar="S",
        help="seconds that messages being processed have at the end (default: 30)",
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-p",
        "--processes",
        type=_count,
        metavar="N",
        help="worker processes, which a parent looks after (default: this one process is the "
        "worker; the options below mean -p 1)",
    )
    group.add_argument(
        "--max-messages",
        type=_count,
        metavar="N",
        help="replace a process that has processed so many",
    )
    group.add_argument(
        "--max-memory",
        type=_size,
        metavar="SIZE",
        help="replace a process that takes more resident memory: 300M, 2G, or a number of bytes",
    )
    group.add_argument(
        "--max-age",
        type=_age,
        metavar="TIME",
        help="replace a process that is so old, or up to a tenth less: 90s, 30m, 12h, 7d, or a "
        "number of seconds",
    )
    group.add_argument(
        "--reload",
        action="store_true",
        help="replace it when a source file changes; for development",
    )


def _add_log(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-level",
        default="INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        help="INFO has a line for every message (default: INFO)",
    )
    group.add_argument(
        "--log-format",
        default="text",
        choices=tuple(logs.FORMATS),
        help="(default: text)",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_AGES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _size(text: str) -> int:
    return int(_scaled(text.upper().removesuffix("B").removesuffix("I"), _SIZES))


def _age(text: str) -> float:
    return _scaled(text.lower(), _AGES)


def _scaled(text: str, units: dict[str, int]) -> float:
    unit = text[-1:] if text[-1:] in units else ""
    number = float(text.removesuffix(unit)) * units[unit]
    if not (math.isfinite(number) and number >= 1):
        raise ValueError(text)
    return number


_LONGEST_TIMEOUT = 7 * 86400.0  # seconds


def _timeout(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= _LONGEST_TIMEOUT:
        raise ValueError(text)
    return seconds


# What argparse calls them in its errors.
_count.__name__ = "number from 1 on"
_size.__name__ = "size such as 300M"
_age.__name__ = "time such as 12h"
_timeout.__name__ = "number of seconds, a week at most"
