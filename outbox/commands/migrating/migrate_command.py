"""``outbox migrate-transport``: moves messages from one transport to another."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from outbox import exit_codes
from outbox.commands.printing import json_line, printable
from outbox.errors import UsageError
from outbox.messages.delivery import QueueSpec
from outbox.settings import Settings
from outbox.transports.message_source import Chosen, Source
from outbox.url import BrokerURL

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  outbox migrate-transport sqlite:///outbox.db postgresql://shop@db/shop --dry-run
      show how many messages would be moved from each queue
  outbox migrate-transport OLD_URL NEW_URL shop.consumers
      move what waits in the queues of these consumers, their dead letters and the parked events;
      the URLs are in the variables OLD_URL and NEW_URL, which keeps passwords out of the process
      list
  outbox migrate-transport amqp://rabbit sqlite:///outbox.db --queue thumbnails
      move what waits in one queue, and its dead letters

Stop workers, relays and publishers of the old transport first. A message is at its destination,
confirmed, before it is deleted; if the command fails in between, run it again. The message may then
be there twice, with one id.

exit codes: 0 done, 1 done in part (the output names what is left), 2 wrong usage, or the old
transport is in use, 7 a transport cannot be reached, 8 done except for what workers have in hand,
130 interrupted by Ctrl-C
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``migrate-transport`` to the sub-commands; see ``parked_command.add_parser``."""
    parser = commands.add_parser(
        "migrate-transport",
        parents=[common],
        help="move messages from one transport to another",
        description="Move what waits, is scheduled, parked or dead from one broker or database to "
        "another, with ids and headers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="FROM", help="the old URL, or the environment variable that has it"
    )
    parser.add_argument(
        "destination", metavar="TO", help="the new URL, or the environment variable that has it"
    )
    parser.add_argument(
        "modules",
        nargs="*",
        metavar="MODULE",
        help="modules with consumers: move the messages of their queues, and parked ones, and "
        "create the queues as workers would (default: all queues of a database)",
    )
    parser.add_argument(
        "--queue",
        action="append",
        default=[],
        metavar="QUEUE",
        help="move the messages of this queue and its dead letters; repeatable",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on although the old transport is in use; what workers have in hand stays there",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be moved, without changing anything"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.set_defaults(run=_migrate)


def _migrate(options: argparse.Namespace) -> int:
    url, new_url = _url("FROM", options.source), _url("TO", options.destination)
    with _source(url, new_url, options) as source:
        users = source.users()
        if options.dry_run:
            return _show(source, users, options)
        if users is not None and not options.force:
            raise UsageError(
                f"{BrokerURL.parse(url)} is in use: {users}; stop them first, or move the rest "
                "with --force"
            )
        return _move(source, new_url, options)


def _show(source: Source, users: str | None, options: argparse.Namespace) -> int:
    total = 0
    for place in source.places():
        count = source.count(place)
        total += count
        if count and options.json:
            print(json_line({"queue": place, "messages": count}))
        elif count:
            print(f"{printable(place)}: {_messages(count)}")
    if users is not None:
        print(f"in use: {printable(users)}", file=sys.stderr)
    _print_total(f"{_messages(total)} would be moved", options)
    return exit_codes.SUCCESS


def _move(source: Source, new_url: str, options: argparse.Namespace) -> int:
    from outbox.commands.migrating.destination import Destination

    total = unfinished = 0
    with Destination(new_url, options.application.settings) as destination:
        destination.create(source.specs())
        for place in source.places():
            count, left = 0, 0
            for moved in source.move(place, destination.publish):
                count += moved.number
                if destination.error is not None:
                    print(f"{_messages(total + count)} moved before the error", file=sys.stderr)
                    raise destination.error
                left += len(moved.left)
                for id, reason in moved.left:
                    named = f"{printable(id)} in {printable(place)}"
                    print(f"not moved: {named}: {printable(reason)}", file=sys.stderr)
                _print_progress(place, count)
            # Others may have published meanwhile, or had some of them in a transaction.
            left = max(left, source.count(place))
            total += count
            unfinished += left
            if options.json and (count or left):
                print(json_line({"queue": place, "moved": count, "left": left}))
            elif count or left:
                print(f"{printable(place)}: {count} moved, {left} left")
    in_hand = source.in_hand()
    if in_hand is not None:
        print(f"not moved: {printable(in_hand)}; run this again later", file=sys.stderr)
    _print_total(f"{_messages(total)} moved, {unfinished} left", options)
    if in_hand is not None:
        return exit_codes.IN_HAND
    return exit_codes.UNFINISHED if unfinished else exit_codes.SUCCESS


def _source(url: str, new_url: str, options: argparse.Namespace) -> Source:
    settings = Settings.load(url, options.application.settings)
    chosen = _chosen(url, settings, options)
    old, new = BrokerURL.parse(url), BrokerURL.parse(new_url)
    for each in (old, new):
        if each.scheme == "memory":
            raise UsageError("memory:// has no queues")
    if _are_same(old, new):
        raise UsageError(f"{old} and {new} are the same")
    if old.is_database:
        from outbox.transports.database.row_source import RowSource

        return RowSource(old, chosen)
    from outbox.transports.rabbitmq.migrating.queue_source import QueueSource

    return QueueSource(old, settings, chosen)


def _are_same(old: BrokerURL, new: BrokerURL) -> bool:
    if "sqlite" in (old.scheme, new.scheme):
        if old.scheme != new.scheme:
            return False
        return os.path.realpath(old.path) == os.path.realpath(new.path)
    if old.is_database and old.scheme == new.scheme:
        from outbox.transports.database.kinds import database_at, engine_at

        database, engine = database_at(old), engine_at(new)
        try:
            return database.holds(engine, {})
        finally:
            database.end()
            engine.dispose()
    if old.is_database or new.is_database:
        return False
    return old.vhost == new.vhost and not set(old.hosts).isdisjoint(new.hosts)


def _chosen(url: str, settings: Settings, options: argparse.Namespace) -> Chosen:
    """Return the queues of the modules and options; by default of the application's modules."""
    names, application = options.modules, options.application
    is_broker = not BrokerURL.parse(url).is_database
    if is_broker and not names and not options.queue and application.modules is not None:
        names = application.modules()
    specs = []
    if names:
        from outbox.consumers.discovery import load

        specs = [consumer.spec(settings.exchange) for consumer in load(names)]
    specs += [QueueSpec(name, (), "") for name in options.queue]
    return Chosen(tuple(specs), with_parked=bool(names) or not options.queue)


def _url(name: str, text: str) -> str:
    """Return the URL that ``text`` is, or that is in the environment variable of that name."""
    if "://" in text:
        return text
    url = os.environ.get(text)
    if not url:
        raise UsageError(f"{name} is neither a URL nor an environment variable that holds one")
    return url


def _print_progress(place: str, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{printable(place)}: {count}", end="\r", file=sys.stderr, flush=True)


def _print_total(text: str, options: argparse.Namespace) -> None:
    # Standard output has one JSON object per line, for programs: the total isn't one.
    print(text, file=sys.stderr if options.json else sys.stdout)


def _messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"
