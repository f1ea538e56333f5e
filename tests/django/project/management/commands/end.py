"""``manage.py end NUMBER``: each ending, in a command."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from tests.django.project.endings import run


class Command(BaseCommand):
    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("number", type=int)

    def handle(self, *args: Any, number: int, **options: Any) -> None:
        run(number)
