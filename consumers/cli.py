"""``outbox-consume``: runs consumers until it is told to stop."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence, Set
from types import FrameType, ModuleType

from outbox import OutboxError, UsageError, configure
from outbox.consumers import exit_codes
from outbox.consumers.consumer import Consumer, FunctionConsumer
from outbox.consumers.worker import Worker

__all__ = ["main"]

logger = logging.getLogger("outbox.consumer")

_POLL = 0.2
"""Seconds until a signal is seen, at the most."""

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

The first SIGTERM or SIGINT ends it in order: no new messages, those being processed finish within
the shutdown timeout, the rest goes back to the queue. The second ends it at once.

exit codes: 0 all settled, 1 some messages did not finish in time, 2 wrong usage, 3 killed by the
second signal
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, one of ``outbox.consumers.exit_codes``."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        publisher = configure(options.url)
        loaded = _load(options.consumers)
        ranks = _ranks(options.queue or (), {one.queue for one in loaded})
        worker = Worker(
            [one for one in loaded if not ranks or one.queue in ranks],
            publisher=publisher,
            threads=options.threads,
            prefetch=options.prefetch,
            ranks=ranks,
        )
        signals = _Signals()
        worker.start()
        logger.info(
            "consuming %s with %d thread(s), prefetch %d",
            ", ".join(map(repr, worker.consumers)),
            worker.threads,
            worker.prefetch,
        )
        try:
            while not signals.seen and not worker.wait(_POLL):
                pass
            logger.info("stopping")
        finally:
            finished = worker.stop(options.shutdown_timeout)
            publisher.close()
    except OutboxError as error:
        print(f"outbox-consume: {error}", file=sys.stderr)
        return exit_codes.USAGE
    return exit_codes.SUCCESS if finished else exit_codes.UNFINISHED


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "-Q",
        "--queue",
        action="append",
        metavar="QUEUE[,QUEUE]...",
        help="only the consumers of these queues, all messages of each before any of the next; "
        "repeated, the queues of one have no order towards those of another",
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="messages processed at a time (default: 8)",
    )
    parser.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="messages of each queue sent ahead (default: four a thread, at least 50)",
    )
    parser.add_argument(
        "--url",
        help="the broker, amqp://user:password@host:5672/vhost, or sqlite:///outbox.db (default: "
        "OUTBOX_URL, which does "
        "not show a password in the list of processes)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that messages being processed have at the end (default: 30)",
    )
    parser.add_argument(
        "--log-level",
        default="INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        help="of the log on standard error (default: INFO)",
    )
    return parser


def _load(names: Iterable[str]) -> list[Consumer]:
    """Import the consumers that ``MODULE[:ATTR]`` name, each once."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: dict[object, Consumer] = {}
    for name in names:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module is there; something that it imports is not
            raise UsageError(f"there is no module {module_name!r}") from error
        for one in _of_module(module, attribute):
            found[one] = one() if isinstance(one, type) else one
    return list(found.values())


def _of_module(module: ModuleType, attribute: str) -> list[type[Consumer] | FunctionConsumer]:
    if attribute:
        one = getattr(module, attribute, None)
        if not _is_consumer(one):
            raise UsageError(f"{module.__name__}:{attribute} is no consumer that names a queue")
        return [one]  # type: ignore[list-item]
    found = [one for one in vars(module).values() if _is_consumer(one)]
    if not found:
        raise UsageError(f"the module {module.__name__!r} has no consumer")
    return found


def _is_consumer(one: object) -> bool:
    if isinstance(one, type):
        return issubclass(one, Consumer) and bool(one.queue)
    return isinstance(one, FunctionConsumer)


def _ranks(groups: Sequence[str], known: Set[str]) -> dict[str, int]:
    """Return the queues that ``-Q`` names, each with its place in its group; none for all."""
    ranks: dict[str, int] = {}
    for group in groups:
        names = [group] if group in known else [one.strip() for one in group.split(",")]
        for rank, name in enumerate(names):
            if name not in known:
                told = ", ".join(map(repr, sorted(known)))
                raise UsageError(f"no consumer has the queue {name!r}; there are {told}")
            if ranks.setdefault(name, rank) != rank:
                raise UsageError(f"-Q names the queue {name!r} twice, at different places")
    return ranks


class _Signals:
    """Notes SIGTERM and SIGINT; a second one ends the process.

    A handler may interrupt anything, also a lock that is being taken: it takes none itself.
    """

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.seen:
            os._exit(exit_codes.KILLED)
        self.seen = True


if __name__ == "__main__":
    sys.exit(main())
