"""``manage.py outbox_consume``: ``manage.py outbox consume`` by another name."""

from __future__ import annotations

from outbox.django.management.commands import outbox

__all__ = ["Command"]


class Command(outbox.Command):
    """The sub-command ``consume`` as a command."""

    help = "Run the consumers of the project's apps; see `manage.py outbox consume --help`."

    def run_from_argv(self, argv: list[str]) -> None:
        """Run ``manage.py outbox consume`` with the same options."""
        program, _, *arguments = argv
        super().run_from_argv([program, "outbox", "consume", *arguments])
