"""``outbox parked``: lists, replays and deletes parked events and dead letters."""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from outbox import exit_codes
from outbox.commands.options import age, broker_option, positive
from outbox.commands.printing import json_line, payload_text, printable
from outbox.errors import UsageError
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.parked_message import Address, ParkedMessage, Selection
from outbox.settings import Settings
from outbox.transports.parked_queues import Browsing, ParkedQueues
from outbox.transports.registry import open_parked_queues

__all__ = ["add_parser"]

_LISTED = 50
_MANY_RETURNS = 10
_TOO_MANY_RETURNS = (
    f"outbox: some messages have been requeued {_MANY_RETURNS} times or more, and this look counts "
    "as well; RabbitMQ 4.0 to 4.2 deletes them after 20 times, unless the queue (x-delivery-limit) "
    "or a policy has another limit"
)

_EXAMPLES = """\
examples:
  outbox parked list
      show the events in outbox.unroutable on the broker OUTBOX_URL, with the reasons
  outbox parked list --queue outbox.unroutable --queue thumbnails.dead --json
      also show the dead letters of the queue thumbnails, one JSON object per line
  outbox parked replay --target 'order.#' --dry-run
      show where the parked events with a matching target would be published
  outbox parked replay --queue thumbnails.dead --reason 'ValueError'
      send dead letters with this text in their reason back to the queue they came from
  outbox parked purge --queue thumbnails.dead --id 0199f3a2-... --yes
      delete one message
  outbox parked purge --queue thumbnails.dead --older-than 30d --yes
      delete the dead letters of more than 30 days ago

Replayed events keep their ids. A message is removed from its queue only after the broker has
confirmed the new one. If the command fails in between, the message isn't lost, but may be delivered
twice.

exit codes: 0 done, 1 done in part (the rest is named and still in its queue) or cancelled at the
prompt, 2 wrong usage or no such queue, 7 the broker cannot be reached, 130 interrupted by Ctrl-C
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``parked`` to the sub-commands of ``outbox``.

    Args:
        commands: the result of ``add_subparsers``.
        common: the parser of the options that all sub-commands share.
    """
    parked = commands.add_parser(
        "parked",
        help="list, replay or delete parked events and dead letters",
        description="List, replay or delete the events in outbox.unroutable and in dead-letter "
        "queues.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parked.add_subparsers(title="actions", metavar="ACTION", required=True)
    filters = _filters()
    broker = broker_option()

    listing = actions.add_parser(
        "list",
        parents=[common, broker, filters],
        help="show messages, without changing anything",
        description="Show messages, oldest first, then requeue them in order.",
    )
    listing.add_argument(
        "--limit",
        type=positive,
        default=_LISTED,
        metavar="N",
        help=f"show at most N messages of each queue (default: {_LISTED})",
    )
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    listing.add_argument("--payload", action="store_true", help="show the payloads as well")
    listing.set_defaults(run=_list)

    replay = actions.add_parser(
        "replay",
        parents=[common, broker, filters],
        help="publish messages again to their original destination",
        description="Publish parked events to their original address, and dead letters to the "
        "queue they came from. Messages that cannot be published stay where they are.",
    )
    replay.add_argument(
        "--to-origin",
        action="store_true",
        help="publish dead letters to their original address, so that every queue bound there "
        "receives them",
    )
    _limit_and_dry_run(replay, "replay")
    replay.set_defaults(run=_replay)

    purge = actions.add_parser(
        "purge",
        parents=[common, broker, filters],
        help="delete messages",
        description="Delete messages permanently.",
    )
    purge.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    _limit_and_dry_run(purge, "delete")
    purge.set_defaults(run=_purge)


def _filters() -> argparse.ArgumentParser:
    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument(
        "--queue",
        action="append",
        metavar="QUEUE",
        help=f"{PARKING_QUEUE} (the default) or a dead-letter queue, <queue>.dead; repeatable "
        "with list",
    )
    filters.add_argument(
        "--id", action="append", default=[], metavar="ID", help="select this message; repeatable"
    )
    filters.add_argument("--reason", metavar="TEXT", help="select by text in the reason")
    filters.add_argument(
        "--target",
        metavar="PATTERN",
        help="select by original target: * matches one word, # any number of words",
    )
    filters.add_argument(
        "--older-than",
        type=age,
        metavar="TIME",
        help="select what came here longer ago than, for example, 30m, 12h, 7d or 4w",
    )
    return filters


def _limit_and_dry_run(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--limit", type=positive, metavar="N", help=f"{verb} at most N messages (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done")


def _list(options: argparse.Namespace) -> int:
    queues = _queues(options)
    selection = _selection(options)
    with _open(options) as parked:
        for queue in queues:
            total = parked.count(queue)
            limit = total if selection else min(total, options.limit)
            shown = 0
            with parked.browse(queue, limit) as browsing:
                for message in itertools.islice(_selected(browsing, selection), options.limit):
                    shown += 1
                    if options.json:
                        print(json_line(_as_json(message, payload=options.payload)))
                    else:
                        print(_as_text(message, payload=options.payload))
            # Standard output has one JSON object per line, for programs: the total isn't one.
            print(
                f"{queue}: {_messages(total)}, {shown} shown",
                file=sys.stderr if options.json else sys.stdout,
            )
    return exit_codes.SUCCESS


def _replay(options: argparse.Namespace) -> int:
    queue = _one_queue(options)
    done = left = 0
    with _open(options) as parked:
        total = parked.count(queue)
        with parked.browse(queue, total) as browsing:
            for chosen in _chosen(browsing, _selection(options), options.limit):
                if options.dry_run:
                    for message in chosen:
                        reason = parked.obstacle(message, to_origin=options.to_origin)
                        left += reason is not None
                        done += reason is None
                        _print_plan(message, reason, to_origin=options.to_origin)
                    continue
                outcome = parked.replay(chosen, to_origin=options.to_origin)
                browsing.remove(outcome.done)
                done += len(outcome.done)
                left += len(outcome.left)
                for message, reason in outcome.left:
                    print(f"not replayed: {_named(message)}: {printable(reason)}", file=sys.stderr)
                if outcome.error is not None:
                    print(f"{_messages(done)} replayed before the error", file=sys.stderr)
                    raise outcome.error
    replayed, failed = (
        ("would be replayed", "would fail") if options.dry_run else ("replayed", "failed")
    )
    print(f"{queue}: {_messages(total)}, {done} {replayed}, {left} {failed}")
    return exit_codes.UNFINISHED if left else exit_codes.SUCCESS


def _purge(options: argparse.Namespace) -> int:
    queue = _one_queue(options)
    selection = _selection(options)
    with _open(options) as parked:
        total = parked.count(queue)
    if not options.yes and not options.dry_run and not _confirmed(queue, total, options):
        print("nothing was deleted", file=sys.stderr)
        return exit_codes.UNFINISHED
    done = 0
    # Reconnect: nothing answered heartbeats during the prompt. Browse only as many messages as the
    # prompt named: those that have arrived since were not agreed to.
    with _open(options) as parked, parked.browse(queue, total) as browsing:
        for chosen in _chosen(browsing, selection, options.limit):
            done += len(chosen)
            if options.dry_run:
                for message in chosen:
                    print(f"would delete {_named(message)}")
            else:
                browsing.remove(chosen)
    what = "would be deleted" if options.dry_run else "deleted"
    print(f"{queue}: {_messages(total)}, {done} {what}")
    return exit_codes.SUCCESS


def _confirmed(queue: str, total: int, options: argparse.Namespace) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("purge deletes messages permanently; confirm with --yes, or try --dry-run")
    some = "the selected ones of " if _selection(options) or options.limit else ""
    try:
        answer = input(f"Delete {some}the {_messages(total)} in {queue!r} permanently? [y/N] ")
    except EOFError:  # Ctrl-D
        return False
    return answer.strip().lower() in ("y", "yes")


def _open(options: argparse.Namespace) -> ParkedQueues:
    application = options.application
    settings = Settings.load(options.url or application.url, application.settings)
    return open_parked_queues(settings)


def _queues(options: argparse.Namespace) -> list[str]:
    queues = list(dict.fromkeys(options.queue or [PARKING_QUEUE]))
    for queue in queues:
        # Messages in other queues are still to be delivered: this command must not take them.
        if queue != PARKING_QUEUE and not queue.endswith(dead_letter_queue("")):
            raise UsageError(
                f"{queue!r} is neither {PARKING_QUEUE!r} nor a dead-letter queue; "
                f"the dead letters of {queue!r} are in {dead_letter_queue(queue)!r}"
            )
    return queues


def _one_queue(options: argparse.Namespace) -> str:
    queues = _queues(options)
    if len(queues) > 1:
        raise UsageError("give only one --queue; only list takes several")
    return queues[0]


def _selection(options: argparse.Namespace) -> Selection:
    before = None
    if options.older_than is not None:
        before = datetime.datetime.now(datetime.UTC) - options.older_than
    return Selection(frozenset(options.id), options.reason, options.target, before)


def _selected(browsing: Browsing, selection: Selection) -> Iterator[ParkedMessage]:
    return itertools.chain.from_iterable(_chosen(browsing, selection, None))


def _chosen(
    browsing: Browsing, selection: Selection, limit: int | None
) -> Iterator[Sequence[ParkedMessage]]:
    """Yield the selected messages of each window, at most ``limit`` in all."""
    left = limit
    warned = False
    for window in browsing.windows():
        if not warned and any(message.returns >= _MANY_RETURNS for message in window):
            warned = True
            print(_TOO_MANY_RETURNS, file=sys.stderr)
        chosen = [message for message in window if message in selection][:left]
        if chosen:
            yield chosen
        if left is not None:
            left -= len(chosen)
            if not left:
                return


def _messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"


def _named(message: ParkedMessage) -> str:
    return printable(message.id) if message.id else "a message without an id"


def _print_plan(message: ParkedMessage, reason: str | None, *, to_origin: bool) -> None:
    if reason is not None:
        print(f"would not replay {_named(message)}: {printable(reason)}")
    else:
        destination = message.destination(to_origin=to_origin)
        print(f"would replay {_named(message)} to {printable(str(destination))}")


def _as_text(message: ParkedMessage, *, payload: bool) -> str:
    lines = [
        f"{_named(message)}  {_origin(message.origin)}  {len(message.body)} bytes"
        + (f"  since {printable(message.at)}" if message.at else "")
        + (f"  {message.attempts} attempt(s)" if message.attempts is not None else ""),
        f"    {printable(message.reason or '')}"
        if message.reason is not None
        else "    no reason recorded; the message comes from another client",
    ]
    if payload:
        name, text = payload_text(message.body)
        lines.append(f"    {'' if name == 'payload' else 'base64: '}{printable(text)}")
    return "\n".join(lines)


def _origin(origin: Address | None) -> str:
    return printable(str(origin)) if origin is not None else "unknown address"


def _as_json(message: ParkedMessage, *, payload: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "queue": message.queue,
        "kind": message.kind,
        "id": message.id or None,
        "exchange": message.origin.exchange if message.origin else None,
        "target": message.origin.target if message.origin else None,
        "died_in": message.died_in,
        "reason": message.reason,
        "error": message.error,
        "at": message.at,
        "attempts": message.attempts,
        "size": len(message.body),
        "content_type": message.content_type,
    }
    if payload:
        name, text = payload_text(message.body)
        fields[name] = text
    return fields
