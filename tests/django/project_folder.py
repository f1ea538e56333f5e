"""A Django project in a folder, whose commands run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import django

from tests.django.running import python_path

__all__ = ["ProjectFolder"]

_MANAGE = """\
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
"""

_SETTINGS = """\
from pathlib import Path

SECRET_KEY = "tests"
INSTALLED_APPS = ["outbox.django", "chat", "mail"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": Path(__file__).parents[2] / "shop.sqlite3",
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
    }
}
USE_TZ = True
OUTBOX = {"URL": f"sqlite:///{Path(__file__).parents[2]}/broker.db"}
"""

_CONSUMERS = """\
import os
from pathlib import Path

from django.conf import settings

from outbox.consumers import consumer


@consumer("mail", topics=["order.*"])
def send_mail(event):
    line = f"{event.id} {os.environ['DJANGO_SETTINGS_MODULE']}\\n"
    with open(Path(settings.BASE) / "mails.txt", "a") as mails:
        mails.write(line)
"""


class ProjectFolder:
    """A project with the apps ``mail``, which has a consumer, and ``chat``, which has others'.

    Attributes:
        root: the folder in which everything is; ``manage.py`` is in a folder below it.
    """

    def __init__(self, root: Path, settings: str = "", **modules: str) -> None:
        """Write the files, and create the tables.

        Args:
            root: an empty folder.
            settings: what to add to the settings.
            **modules: further modules of ``mail``, by name.
        """
        self.root = root
        site = root / "site"
        for name in ("config", "mail", "chat"):
            (site / name).mkdir(parents=True)
            (site / name / "__init__.py").touch()
        (site / "manage.py").write_text(_MANAGE)
        settings = f"{_SETTINGS}BASE = {str(root)!r}\n{settings}"
        if django.VERSION < (5, 1):
            backend = "tests.django.sqlite_immediate"
            settings = settings.replace("django.db.backends.sqlite3", backend)
        (site / "config" / "settings.py").write_text(settings)
        (site / "mail" / "consumers.py").write_text(_CONSUMERS)
        (site / "chat" / "consumers.py").write_text("class ChatConsumer:\n    pass\n")
        for name, text in modules.items():
            (site / "mail" / f"{name}.py").write_text(text)
        done = self.run("migrate", "--run-syncdb", "--verbosity", "0")
        assert done.returncode == 0, done.stderr

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of ``manage.py`` with ``arguments``."""
        return [sys.executable, str(self.root / "site" / "manage.py"), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``manage.py`` in another folder than its own, to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``manage.py`` until the block ends, if it doesn't end before."""
        with open(self.root / "log.txt", "w") as log:
            process = subprocess.Popen(
                self.command(*arguments), cwd=self.root, env=self._environment(), stderr=log
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def shell(self, code: str) -> str:
        """Run ``code`` in ``manage.py shell``; return what it prints."""
        quiet = ("--no-imports",) if django.VERSION >= (5, 2) else ()
        done = self.run("shell", *quiet, "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def consumes(self) -> bool:
        """Return whether the process that runs has begun to consume."""
        return "consuming 'mail'" in self.log

    @property
    def log(self) -> str:
        """What the process that runs has written to standard error."""
        return (self.root / "log.txt").read_text()

    @property
    def mails(self) -> list[str]:
        """The lines that the consumer has written."""
        path = self.root / "mails.txt"
        return path.read_text().splitlines() if path.exists() else []

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OUTBOX", "DJANGO"))
        }
        return {**kept, "PYTHONPATH": python_path()}
