"""``outbox tail``: shows the events that pass through a RabbitMQ."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from outbox import exit_codes
from outbox.commands.options import broker_option, not_negative
from outbox.commands.printing import json_line, payload_text, printable
from outbox.settings import Settings

if TYPE_CHECKING:
    from outbox.messages.received_event import ReceivedEvent

__all__ = ["add_parser"]

_SHOWN = 1_000
"""Characters of a payload in a line of text."""

_EXAMPLES = """\
examples:
  outbox tail
      show each event that is published to the exchange of OUTBOX_EXCHANGE (default: outbox)
  outbox tail 'order.*' 'photo.#'
      show those whose target matches one of the patterns
  outbox tail --exchange billing --exchange outbox --json | jq .payload
      show those of two exchanges as JSON, one object per line

Nothing is taken away: the command gets copies, in a queue that disappears with it. Events are
missing while it isn't connected, or if it is too slow; it says so on standard error.

exit codes: 0 the limit is reached, 2 wrong usage or no such exchange, 7 the broker cannot be
reached, 130 interrupted by Ctrl-C
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``tail`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    tail = commands.add_parser(
        "tail",
        parents=[common, broker_option()],
        help="show the events that pass through a RabbitMQ",
        description="Show the events that pass through a RabbitMQ, until it is interrupted.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tail.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="show events whose target matches: * matches one word, # any number of words "
        "(default: all)",
    )
    tail.add_argument(
        "--exchange",
        action="append",
        metavar="EXCHANGE",
        help="watch this exchange; repeatable (default: OUTBOX_EXCHANGE, or outbox)",
    )
    tail.add_argument(
        "--limit", type=not_negative, metavar="N", help="exit after N events (default: no limit)"
    )
    tail.add_argument("--json", action="store_true", help="print one JSON object per line")
    tail.add_argument("--no-payload", action="store_true", help="leave the payloads out")
    tail.set_defaults(run=_tail)


def _tail(options: argparse.Namespace) -> int:
    import asyncio  # slow to import, and the other commands don't need it

    asyncio.run(_show(options))
    return exit_codes.SUCCESS


async def _show(options: argparse.Namespace) -> None:
    from outbox.tap import Tap

    application = options.application
    tap = Tap(
        *options.patterns,
        exchange=options.exchange,
        on_gap=_say,
        settings=Settings.load(options.url or application.url, application.settings),
    )
    left = options.limit
    async with tap:
        patterns = ", ".join(map(repr, options.patterns or ["#"]))
        exchanges = ", ".join(map(repr, options.exchange or [tap.settings.exchange]))
        _say(f"watching {patterns} of {exchanges}")
        if left == 0:
            return
        async for event in tap:
            as_shown = _as_json if options.json else _as_text
            print(as_shown(event, payload=not options.no_payload), flush=True)
            if left is not None:
                left -= 1
                if not left:
                    return


def _say(text: str) -> None:
    print(f"outbox: {printable(text)}", file=sys.stderr, flush=True)


def _as_text(event: ReceivedEvent, *, payload: bool) -> str:
    moment = event.occurred_at.isoformat(timespec="milliseconds")
    line = f"{moment}  {printable(event.target)}  {printable(event.id)}"
    if not payload:
        return f"{line}  {len(event.body)} bytes"
    name, text = payload_text(event.body)
    more = f"... ({len(event.body)} bytes)" if len(text) > _SHOWN else ""
    encoding = "" if name == "payload" else "base64: "
    return f"{line}  {encoding}{printable(text[:_SHOWN])}{more}"


def _as_json(event: ReceivedEvent, *, payload: bool) -> str:
    fields: dict[str, Any] = {
        "id": event.id,
        "exchange": event.exchange,
        "target": event.target,
        "key": event.key,
        "occurred_at": event.occurred_at.isoformat(),
        "priority": event.priority,
        "headers": _plain(event.headers),
        "size": len(event.body),
        "content_type": event.content_type,
    }
    if payload:
        name, text = payload_text(event.body)
        fields[name] = text
    return json_line(fields)


def _plain(value: Any) -> Any:
    """Return headers as JSON can hold them: what it has no type for becomes text."""
    match value:
        case None | bool() | int() | str():
            return value
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {str(name): _plain(item) for name, item in value.items()}
        case bytes():
            return value.decode(errors="backslashreplace")
    return str(value)
