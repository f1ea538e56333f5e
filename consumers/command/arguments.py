"""The command line of ``outbox-consume``."""

from __future__ import annotations

import argparse
import math

from outbox.commands.options import Version, broker_option, positive
from outbox.consumers import logs
from outbox.consumers.command.framework import Framework
from outbox.consumers.command.limits import Limits, MemoryLimit
from outbox.service.faces import add_face_options
from outbox.service.policy_options import add_policy, duration

__all__ = ["limits_of", "make_parser"]

_EXAMPLES = """\
examples:
  outbox-consume shop.consumers
      run every consumer in the module shop.consumers, on the broker OUTBOX_URL
  outbox-consume shop.consumers:Thumbnails --url amqp://guest:guest@localhost/ -t 16
      run one consumer, sixteen messages at a time
  outbox-consume shop.consumers billing.consumers -Q invoices -Q thumbnails
      run the consumers of two queues, from two modules
  outbox-consume shop.consumers -Q high,medium,low
      process all messages of high before any of medium, and all of medium before any of low
  outbox-consume shop.consumers --prefetch 1 -t 1 --shutdown-timeout 300
      process one long message at a time, with five minutes to finish it on shutdown
  outbox-consume shop.consumers -p 4 --max-memory 300M --max-age 12h
      run four processes, and restart each when it exceeds 300 MiB or half a day
  outbox-consume shop.consumers -p 4 --http :9100
      answer the probes of Kubernetes, and Prometheus
  outbox-consume shop.consumers -p 4 --log-format json
      log one JSON object per line
  outbox-consume shop.consumers --reload
      during development, restart whenever a source file changes

On the first SIGTERM or SIGINT the command takes no new messages, gives running ones the shutdown
timeout to finish, and requeues the rest. On a second one, a second or more later, it exits at once.
With worker processes, SIGHUP replaces them one by one with new ones that import everything again.

With worker processes, SIGTSTP, unless it comes from a terminal, has them begin nothing more and
stay; SIGUSR1 logs the stacks of all threads.

exit codes: 0 all messages settled, 1 some did not finish in time, 2 wrong usage, 3 stopped at once
by a second signal, 5 given up, as no worker process was ever ready, 6 not ready in time to take
over
"""


def make_parser(
    prog: str = "outbox-consume", framework: Framework | None = None
) -> argparse.ArgumentParser:
    """Return the parser of the command line, for a command called ``prog``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run consumers until stopped by a signal.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[broker_option() if framework is None else broker_option(framework.url_default)],
    )
    parser.set_defaults(prog=prog)
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "consumers",
        nargs="+" if framework is None else "*",
        metavar="MODULE[:ATTR]",
        help="run all consumers in a module, or the one called ATTR"
        + ("" if framework is None else " (default: all that the project's apps have)"),
    )
    if framework is not None:
        framework.add_arguments(parser)
    _add_consuming(parser.add_argument_group("consuming"))
    _add_processes(parser.add_argument_group("processes"))
    add_face_options(parser.add_argument_group("service"))
    _add_log(parser.add_argument_group("logging, to standard error"))
    return parser


def limits_of(options: argparse.Namespace) -> Limits:
    """Return the limits at which a worker process is restarted."""
    return Limits(options.max_messages, options.max_memory, options.max_age)


def _add_consuming(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-Q",
        "--queue",
        action="append",
        metavar="QUEUE[,QUEUE]...",
        help="run only the consumers of these queues, and process all messages of a queue before "
        "any of the next; repeat the option for queues of equal rank",
    )
    group.add_argument(
        "-t",
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="messages that sync consumers process at the same time, per process (default: 8)",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=100,
        metavar="N",
        help="messages that async consumers process at the same time, per process (default: 100)",
    )
    group.add_argument(
        "--isolate",
        choices=("process",),
        help="run sync handlers in one subprocess per thread, and kill it on timeout",
    )
    group.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="messages of each queue that the broker delivers ahead, per process (default: four "
        "per thread, at least 50; twice the concurrency for async consumers)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_timeout,
        default=30.0,
        metavar="SECONDS",
        help="how long running messages may take to finish on shutdown (default: 30)",
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-p",
        "--processes",
        type=positive,
        metavar="N",
        help="run N worker processes under a parent that restarts them (default: the command "
        "itself is the worker; the options below imply -p 1)",
    )
    group.add_argument(
        "--max-messages",
        type=positive,
        metavar="N",
        help="restart a worker process after N messages",
    )
    group.add_argument(
        "--max-memory",
        type=_memory,
        metavar="SIZE[:N/M]",
        help="restart a worker process whose resident memory exceeds SIZE: 300M, 2G, or bytes; "
        "with N/M, as in 300M:3/5, in N of the last M looks, one each 10 s",
    )
    group.add_argument(
        "--max-age",
        type=_age,
        metavar="TIME",
        help="restart a worker process at this age, or up to a tenth sooner: 90s, 30m, 12h, 7d, or "
        "seconds",
    )
    add_policy(group)
    group.add_argument(
        "--reload",
        action="store_true",
        help="restart when a source file changes; for development",
    )


def _add_log(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-level",
        default="INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        help="the lowest level to log; INFO logs a line for every message (default: INFO)",
    )
    group.add_argument(
        "--log-format",
        default="text",
        choices=tuple(logs.FORMATS),
        help="the format of log lines (default: text)",
    )


_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_LONGEST_TIMEOUT = 7 * 86400.0  # seconds


def _size(text: str) -> int:
    number = _scaled(text.upper().removesuffix("B").removesuffix("I"), _SIZES)
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use for example 300M or 2G")
    return int(number)


def _memory(text: str) -> MemoryLimit:
    size, colon, looks = text.partition(":")
    exceeded, _, of = looks.partition("/")
    if not colon:
        return MemoryLimit(_size(size))
    if not (exceeded.isdecimal() and of.isdecimal() and 1 <= int(exceeded) <= int(of) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a limit; use for example 300M:3/5")
    return MemoryLimit(_size(size), int(exceeded), int(of))


def _age(text: str) -> float:
    number = duration(text)
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; use for example 90s or 12h")
    return number


def _timeout(text: str) -> float:
    seconds = _scaled(text, {"": 1})
    if not 0 <= seconds <= _LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 604800")
    return seconds


def _scaled(text: str, units: dict[str, int]) -> float:
    """Parse a number that may end in a unit; return NaN for anything else."""
    unit = text[-1:] if text[-1:] in units else ""
    try:
        return float(text.removesuffix(unit)) * units[unit]
    except ValueError:
        return math.nan
