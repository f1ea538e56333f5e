"""A newcomer follows docs/django.md, from an empty folder to the first event."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import SQLitePlace, reading
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "django.md").read_text()

# What the page leaves to the reader: two more views, and a second database.
REST = """
import asyncio
from django.test import RequestFactory
from orders import archive, async_views, payments
from orders.models import Order

asyncio.run(async_views.place_order(RequestFactory().get("/", {"item": "milk"})))
payments.refuse(1)
archive.archive(Order.objects.create(item="tea"))
"""
ARCHIVE = """
DATABASES["archive"] = {**DATABASES["default"], "NAME": BASE_DIR / "archive.sqlite3"}
"""


def environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("OUTBOX_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[list[str]]:
    """Return the commands that the page shows before its first table."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.split("\n## ")[1], re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project as the page has it, migrated."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, *arguments in commands():
        if name == "django-admin":
            run(folder, "-m", "django", *arguments)
        elif arguments[:2] == ["manage.py", "startapp"]:
            run(folder, *arguments)
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        if named := re.match(r"# (\S+\.py)\n", snippet):
            path = folder / named[1]
            before = path.read_text() if path.name == "settings.py" else ""
            path.write_text(before + snippet)
    with (folder / "shop" / "settings.py").open("a") as file:
        file.write(ARCHIVE)
    for _, *arguments in commands():
        if arguments[:2] in (["manage.py", "makemigrations"], ["manage.py", "migrate"]):
            run(folder, *arguments)
    run(folder, "manage.py", "migrate", "--database", "archive")
    return folder


@contextlib.contextmanager
def running(project: Path, name: str, *arguments: str, until: str) -> Iterator[Path]:
    """Run a command of the project; yield its log once it contains ``until``."""
    log = project / f"{name}.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "manage.py", *arguments],
            cwd=project,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: until in log.read_text() or child.poll() is not None, 30)
        assert child.poll() is None, log.read_text()
        yield log
    finally:
        child.terminate()
        child.wait(20)


def post(url: str, **form: str) -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, urllib.parse.urlencode(form).encode(), timeout=20) as response:
        return int(response.status)


def test_a_newcomer_sees_the_first_event(project: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    [expected] = re.findall(r"^The consumers print `(.*)`\.$", PAGE, re.M)
    with (
        running(project, "consume", "outbox", "consume", until="consuming 'shop.invoices'") as log,
        running(project, "server", "runserver", "--noreload", address, until="Quit the server"),
    ):
        assert post(f"http://{address}/orders", item="tea") == 201
        wait_until(lambda: expected in log.read_text().splitlines(), 20)
        run(project, "manage.py", "shell", "-c", "import orders.placing as p; p.place('milk')")
        wait_until(lambda: "please pay: milk, packed" in log.read_text().splitlines(), 20)


@pytest.mark.slow
def test_the_other_programs_of_the_page_do_what_it_says(project: Path) -> None:
    place = SQLitePlace(str(project / "events.db"), "outbox")
    with reading(place, "documentation", ["#"]) as reader:
        run(project, "manage.py", "shell", "-c", REST)
        targets = [delivery.target for delivery in reader.get(4)]
    assert sorted(targets) == ["order.archived", "order.placed", "order.viewed", "payment.refused"]
