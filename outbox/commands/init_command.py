"""``outbox init``: writes a first consumer, its test, the tables, and a unit of systemd."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from outbox import exit_codes
from outbox.commands.application import Application
from outbox.commands.generated import Generated
from outbox.errors import UsageError
from outbox.service.own_command import working_directory

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  outbox init invoices --topic order.placed
      write invoices_consumer.py, its test, and outbox-invoices.service
  outbox init order-mails --queue mails --folder shop --tables postgresql
      write them into the package shop, and outbox.sql with the tables
  manage.py outbox init invoices --folder orders
      write orders/consumers.py, its test, and the unit; the tables come with `migrate`

Nothing is ever overwritten: if one of the files exists, nothing is written.
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``init`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    init = commands.add_parser(
        "init",
        parents=[common],
        help="write a first consumer, its test, tables and a unit file",
        description="Write a consumer, its test and a unit of systemd, which work as they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("name", metavar="NAME", help="the consumer, such as invoices or order-mails")
    init.add_argument("--queue", metavar="QUEUE", help="its queue (default: NAME)")
    init.add_argument(
        "--topic",
        action="append",
        default=[],
        metavar="TOPIC",
        help="a topic of the queue, such as order.placed or 'order.*'; repeatable (default: only "
        "the queue's name)",
    )
    init.add_argument(
        "--folder",
        default=".",
        metavar="FOLDER",
        help="the package for the consumer and its test, below the working directory (default: "
        "that); in a Django project the folder of an app, beside manage.py",
    )
    init.add_argument(
        "--tables",
        metavar="DIALECT",
        help="also write outbox.sql with the tables for stored events: postgresql, mariadb or "
        "sqlite",
    )
    init.add_argument(
        "--dry-run", action="store_true", help="print the files instead of writing them"
    )
    init.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    files = _files(options)
    if options.dry_run:
        for path, text in files.items():
            print(f"==> {path} <==\n{text}")
        return exit_codes.SUCCESS
    application: Application = options.application
    base = Path(application.folder)
    existing = [str(path) for path in files if os.path.lexists(base / path)]
    if existing:
        raise UsageError(
            f"already there: {', '.join(existing)}; nothing was written (--dry-run prints what "
            "would be)"
        )
    for path, text in files.items():
        try:
            with (base / path).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}") from error
        print(f"wrote {path}")
    if application.is_django:
        print("next: manage.py migrate, manage.py test, manage.py outbox consume")
        return exit_codes.SUCCESS
    module = _module(options)
    is_plain = application.prog == "outbox"
    consume = "outbox-consume" if is_plain else f"{application.prog} consume"
    print(
        f"next: python -m pytest; {'set OUTBOX_URL; ' if is_plain else ''}"
        f"{application.prog} doctor {module}; {consume} {module}"
    )
    return exit_codes.SUCCESS


def _module(options: argparse.Namespace) -> str:
    """Return the name of the consumer's module."""
    application: Application = options.application
    folder = _folder(options.folder, Path(application.folder))
    stem = options.name.replace("-", "_")
    return ".".join([*folder.parts, "consumers" if application.is_django else f"{stem}_consumer"])


def _files(options: argparse.Namespace) -> dict[Path, str]:
    """Return the files to write, by their paths in the application's folder."""
    application: Application = options.application
    folder = _folder(options.folder, Path(application.folder))
    stem = options.name.replace("-", "_")
    is_django = application.is_django
    module = _module(options)
    file = folder / f"{module.rpartition('.')[2]}.py"
    generated = Generated(options.name, options.queue or options.name, tuple(options.topic), module)
    generated.check()
    # "manage.py outbox consume" finds the modules of all apps.
    names = [] if is_django else [generated.module]
    command = [sys.executable, *application.consume, *names, "-p", "1"]
    where = os.path.normpath(os.path.join(working_directory(), application.folder))
    unit = generated.unit(where, command)
    files = {
        file: generated.consumer(),
        folder / f"test_{stem}_consumer.py": generated.test(django=is_django),
        Path(f"outbox-{options.name}.service"): unit,
    }
    if options.tables is not None:
        import outbox.sql.inbox  # noqa: F401  which adds its table
        from outbox.storage.creating import ddl

        files[Path("outbox.sql")] = ddl(options.tables)
    return files


def _folder(text: str, base: Path) -> Path:
    """Return a folder, relative to ``base``.

    Raises:
        UsageError: it isn't a folder below that one, or not a package's name.
    """
    folder = Path(os.path.relpath(base / text, base))
    if not (base / folder).is_dir():
        raise UsageError(f"--folder: there is no folder {text!r}")
    if not all(part.isidentifier() for part in folder.parts):
        raise UsageError(f"--folder: {text!r} is not a package below {base.resolve()}")
    return folder
