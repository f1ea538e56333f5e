"""``flask outbox``: the commands ``outbox`` and ``outbox-consume`` for the current application."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup, ScriptInfo

from outbox.commands import cli
from outbox.commands.application import Application
from outbox.errors import UsageError

__all__ = ["outbox_group"]

# As argparse, which has the options, wants them.
_PASS_ALL: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_DEFAULT_FILES = ("wsgi.py", "app.py")  # where flask looks for an application that isn't named

outbox_group = AppGroup("outbox", help="Consume events, and manage stored and parked ones.")


def _consume(arguments: tuple[str, ...]) -> int:
    from outbox.consumers.command import consume
    from outbox.consumers.discovery import FLASK_APP_VARIABLE

    path = _app_path()
    if path is not None:
        os.environ[FLASK_APP_VARIABLE] = path
    return consume.main(arguments, prog="flask outbox consume")


def _app_path() -> str | None:
    """Return the application as ``flask --app`` takes it; None if only the caller can make it."""
    info = click.get_current_context().find_object(ScriptInfo)
    if info is None or info.create_app is not None:
        return None
    if info.app_import_path:
        return info.app_import_path
    return next((name for name in _DEFAULT_FILES if Path(name).is_file()), None)


def _manage(name: str, arguments: tuple[str, ...]) -> int:
    present = current_app.extensions["outbox"]
    try:
        config = present.config()
    except UsageError as error:
        raise click.ClickException(str(error)) from None
    engine = None
    if present.stores:
        database = current_app.extensions["sqlalchemy"]
        engine = lambda: database.engine  # noqa: E731
    path = _app_path()
    application = Application(
        "flask outbox",
        config.url,
        config.overrides,
        config.database_url,
        engine,
        consume=("-m", "flask", *(("--app", path) if path else ()), "outbox", "consume"),
    )
    return cli.main([name, *arguments], application=application)


def _add(name: str, help_text: str) -> None:
    @outbox_group.command(name, help=help_text, context_settings=_PASS_ALL, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        code = _consume(arguments) if name == "consume" else _manage(name, arguments)
        if code:
            raise SystemExit(code)


_add("consume", "Run consumers in contexts of this application until stopped by a signal.")
_add("relay", "Publish the stored events of this application's database.")
_add("status", "Show the backlog of stored events.")
_add("retry", "Make dead stored events due again.")
_add("purge", "Delete dead stored events.")
_add("sql", "Create or check the tables.")
_add("doctor", "Find out what is wrong with this application's set-up.")
_add("init", "Write a first consumer, its test, and a unit file.")
_add("parked", "List, replay and delete parked events and dead letters.")
_add("spool", "Show, publish or recover kept events on the disk.")
_add("tail", "Show the events that pass through the broker.")
